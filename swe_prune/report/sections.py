"""Content of the page: the sentence, key numbers, tables, figures with captions, settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from swe_prune import ledger
from swe_prune.report import answers, claims, comparison, curves, energy, stats, tables, weights
from swe_prune.report.formats import DASH, NBSP, count, number, percent, plural, seeds_of, signed
from swe_prune.report.look import Picture
from swe_prune.report.records import CellGroup, Results
from swe_prune.report.stats import Cell, Spread

QUESTIONS = {
    "tensor": "The same sparsity in every tensor, so only the order in which weights are removed "
    "differs: this compares the rankings.",
    "global": "The same number of removed weights in all, from the tensors that the scores choose: "
    "this compares ranking and allocation.",
    "row": "The same sparsity in every row of every tensor, the strictest allocation.",
    "rate": "Ranking and allocation as in the paper: weights at or below a threshold are removed, "
    "which is the standard deviation of the scores of their tensor times a rate.",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key number at the top of the page."""

    label: str
    value: str
    note: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Figures under one caption."""

    pictures: list[Picture]
    caption: str
    title: str = ""
    question: str = ""


def content(results: Results) -> dict[str, Any]:
    """Returns every variable of the template that does not need a file to be read."""
    cells = stats.summarise(results.rows)
    # Curves and maps show the cells pruned in one shot and fine-tuned; the tables show all.
    shown = stats.usual(cells)
    names = stats.order(shown)
    present, groups = (
        list(dict.fromkeys(cell.group for cell in known)) for known in (cells, shown)
    )
    subject = _subject(shown)
    recovered = any(cell.changes(recovered=True) for cell in cells)
    compared = [comparison.compare(cells, group, recovered) for group in present]
    return {
        "name": results.name,
        "headline": " ".join(
            [comparison.headline(cells), *claims.of_prices(cells, _blank(results))]
        ),
        "keys": keys(results),
        "missing": missing(results),
        "compared": [tables.comparison(one) for one in compared if one],
        "linear": curves.LINEAR,
        "losses": [_losses(shown, group, names) for group in groups],
        "heat": _heat(results, shown, groups),
        "paths": _paths(results, subject),
        "histograms": _histograms(results, subject),
        "training": _training(results),
        "language": _language(results, cells),
        "answers": _answers(results),
        "energy": _energy(results),
        "tables": [
            *(tables.cells(cells, group) for group in present),
            tables.seeds(results),
            *tables.costs(results),
            *energy.table(results),
        ],
        "config": settings(results),
        "fingerprint": (results.fingerprint or "")[:12],
        "cost": cost(results),
    }


def _blank(results: Results) -> float | None:
    """Returns the mean error of the dense models that were shown blank pictures."""
    found = [one["dense_prices"] for one in results.dense.values() if "dense_prices" in one]
    mean = stats.spread(one["generated"]["blank"] for one in found)
    return None if mean is None else mean.mean


def _language(results: Results, cells: Sequence[Cell]) -> list[tables.Table]:
    if any("dense_prices" in one for one in results.dense.values()):
        return [tables.prices(results, cells)]
    if all(row.pruned_kl is None for row in results.rows):
        return []  # the study writes no samples
    return [tables.perplexities(results, cells), tables.samples(results)]


def _subject(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that the figures of single weights show: one comparison, swe's if any."""
    ranked = sorted(cells, key=lambda cell: cell.criterion != comparison.PAPER)
    return [cell for cell in cells if cell.group == ranked[0].group]


def missing(results: Results) -> list[str]:
    """Returns what is not finished or not there, one line each, none if all is."""
    rows, lines = results.rows, []
    # 1. What is still to be computed.
    if results.wanted is None:
        lines.append("Cells asked for: unknown without a config.json of this version")
    elif results.wanted > len(rows):
        lines.append(f"Cells pruned: {len(rows)} of {results.wanted}")
    recovered = [row for row in rows if row.recovery != "none"]
    tuned = sum(row.finetuned_loss is not None for row in recovered)
    if tuned < len(recovered):
        lines.append(f"Pruned cells fine-tuned: {tuned} of {len(recovered)}")
    controls = {(row.seed, row.recovery): row.control_loss is not None for row in recovered}
    if not all(controls.values()):
        lines.append(f"Controls trained: {sum(controls.values())} of {len(controls)}")
    # 2. What the page leaves out for want of a file.
    for there, what in (
        (results.training, "Training curve: left out, there is no metrics.jsonl of a dense model"),
        (results.details, "Figures of weights: left out, there is no result.json of a cell"),
        (results.trajectories, "Paths of weights: left out, there is no trajectory.jsonl"),
    ):
        if not there:
            lines.append(what)
    if results.repeated:
        lines.append(f"Rows of results.csv replaced by a later row: {results.repeated}")
    return lines


def keys(results: Results) -> list[Key]:
    """Returns the numbers a reader looks for first."""
    by_seed = [stats.per_seed(results.rows, f"{name}_loss") for name in ("dense", "control")]
    dense, control = (stats.spread(losses.values()) for losses in by_seed)
    gained = stats.spread(
        stats.difference(loss, by_seed[0].get(seed)) for seed, loss in by_seed[1].items()
    )
    steps = sorted({row.steps for row in results.rows if row.steps})
    after = f"; {count(steps[-1])} extra steps, no mask" if len(steps) == 1 else "; no mask"
    unit = "nats per token"
    found = [
        Key("Dense model, validation loss", _mean(dense), f"{_sd(dense)}{unit}"),
        Key(
            "Control, validation loss",
            _mean(control),
            f"{_sd(control)}{unit}{after}" if control else "not run yet",
        ),
    ]
    if gained:
        note = f"{_sd(gained)}by the extra steps alone"
        found.append(Key("Control minus dense", signed(gained.mean, 3), note))
    sizes = next(iter(results.dense.values()), {})
    params, prunable = sizes.get("params"), sizes.get("prunable")
    if isinstance(params, int) and isinstance(prunable, int) and params:
        note = f"of {count(params)} parameters ({percent(prunable / params)})"
        found.append(Key("Prunable weights", count(prunable), note))
    single = len(results.seeds) == 1
    note = "no spread can be given" if single else "numbers are mean ± standard deviation"
    return [*found, Key("Seeds", str(len(results.seeds)), note)]


def _mean(value: Spread | None) -> str:
    return DASH if value is None else number(value.mean, 3)


def _sd(value: Spread | None) -> str:
    return "" if value is None or value.sd is None else f"±{NBSP}{number(value.sd, 3)} "


def _losses(cells: Sequence[Cell], group: CellGroup, names: Sequence[str]) -> Group:
    seeds = [len(cell.rows) for cell in cells if cell.group == group]
    text = "Lines across: dense model (dotted) and control (solid). "
    if max(seeds) == 1:
        text += "One seed: no spread can be given."
    else:
        text += (
            f"Points are means over {seeds_of(seeds)}; error bars, and the grey around the lines "
            "across, reach one standard deviation to either side."
        )
    return Group(curves.comparison(cells, group, names), text, group.title, QUESTIONS[group.rule])


def _heat(results: Results, cells: Sequence[Cell], groups: Sequence[CellGroup]) -> Group:
    # Without an allocation, equal sparsity per tensor or row would be one number everywhere.
    uneven = [
        group
        for group in groups
        if group.rule in ("global", "rate")
        or any(cell.rows[0].allocation for cell in cells if cell.group == group)
    ]
    return Group(
        weights.heat_maps(results, cells, uneven),
        f"Sparsity of each tensor (%), at the level of each criterion nearest to 60{NBSP}%; below "
        "its name the sparsity achieved over all tensors; seeds pooled. The darker, the sparser; "
        "all maps share one range of shades.",
    )


def _paths(results: Results, cells: Sequence[Cell]) -> Group:
    own = [cell for cell in cells if cell.criterion == comparison.PAPER] or cells
    chosen = weights.example(results, own)
    if chosen is None:
        return Group([], "")
    cell, row, detail = chosen
    return Group(
        weights.trajectories(results, row.seed, detail),
        f"Sampled weights while the dense model of seed {row.seed} trains, marked by what "
        f"{cell.name} ({cell.group.phrase}) at {percent(row.sparsity_prunable)} sparsity decides "
        "in the end. The tensors are the first, the middle and the last of the sample, the weights "
        "the first few of each kind: none was picked by its looks.",
    )


def _histograms(results: Results, cells: Sequence[Cell]) -> Group:
    return Group(
        weights.histograms(results, cells),
        "All prunable weights before pruning (grey), after it (solid) and after fine-tuning "
        f"(dashed), at the level nearest to 60{NBSP}%, {cells[0].group.phrase}, first seed. Exact "
        "zeros are left out after pruning, so what is missing under the grey was pruned. The "
        f"outermost 0.5{NBSP}% of the weights lie off the axis.",
    )


def _training(results: Results) -> Group:
    picture = curves.training(results)
    return Group(
        [picture] if picture else [],
        f"Training of the dense model, {plural(len(results.training), 'seed')}. The loss of single "
        "batches scatters; pruning starts from the validation loss at the end.",
    )


def _answers(results: Results) -> Group:
    picture = answers.answers(results)
    return Group(
        [picture] if picture else [],
        "The first pictures that the models of the first seed were evaluated on, with the true "
        "price above and below it what the models read, pruned ones after their recovery.",
    )


def _energy(results: Results) -> Group:
    return Group(
        energy.pictures(results),
        " ".join(sentence for one in results.paybacks for sentence in one.sentences),
    )


def settings(results: Results) -> list[dict[str, Any]]:
    """Returns the settings by group, the ungrouped ones first."""
    config = results.config or {}
    loose = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = {"general": loose, **{k: v for k, v in config.items() if isinstance(v, dict)}}
    return [
        {"name": name, "entries": [(key, _setting(value)) for key, value in group.items()]}
        for name, group in groups.items()
        if group
    ]


def _setting(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return plural(len(value), "cell")
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def cost(results: Results) -> str:
    """Returns what the cells took, and the whole run by its ledger."""
    minutes = sum(row.seconds for row in results.rows) / 60
    text = f"The {plural(len(results.rows), 'cell')} took {minutes:.1f} minutes in all."
    if results.ledger and results.factors is not None:
        text += f" {ledger.summary(results.ledger, results.factors)}"
    return text
