"""The page's content but for its layout: key numbers, groups of figures with captions, settings."""

import dataclasses
from typing import Any

from swe_prune.report import curves, language, missing, stats, study, tables, weights, words
from swe_prune.report.findings import Findings
from swe_prune.report.formats import DASH, NBSP, count, number, percent, plural, seeds_of, signed
from swe_prune.report.look import Picture
from swe_prune.report.records import RULES, Results

QUESTIONS = {
    "std": "Ranking and allocation together, as the paper prunes: in each tensor, away goes the "
    "weight whose score does not exceed the standard deviation of the scores times a rate.",
    "tensor": "Every criterion removes the same share of every tensor, so only the order in which "
    "weights go differs: this isolates the ranking.",
    "global": "Every criterion removes the same number of weights in all, and its scores decide "
    "from which tensors: beside the comparison per tensor, this isolates the allocation.",
    "row": "Every criterion removes the same share of every row, the strictest allocation.",
}
HOW_TO_READ = (
    "Straight after pruning the loss explodes, so that axis is logarithmic. What the mask costs is "
    "the fine-tuned loss minus the control's, paired by seed: the grey band is the margin of "
    f"{stats.MARGIN:g} nats per token called free, inside it the axis is linear and outside "
    "logarithmic, and a curve's knee is where it leaves the band upwards."
)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key number of the page's top."""

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


def keys(results: Results, found: Findings) -> list[Key]:
    """Returns the numbers a reader looks for first."""
    dense = stats.spread(stats.per_seed(results.rows, "dense_loss").values())
    control = stats.spread(stats.per_seed(results.rows, "control_loss").values())
    steps = sorted({row.steps for row in results.rows if row.steps})
    after = f"; {count(steps[-1])} extra steps, no mask" if steps else "; no mask"
    unit = "nats per token"
    return [
        Key("Dense model, validation loss", _mean(dense), f"{_sd(dense)}{unit}"),
        Key(
            "Control, validation loss",
            _mean(control),
            f"{_sd(control)}{unit}{after}" if control else "not run yet",
        ),
        _moderate_key(found),
        _knee_key(found),
        *_size_key(results),
        Key("Seeds", str(len(results.seeds)), _seed_note(found)),
    ]


def _mean(value: stats.Spread | None) -> str:
    return DASH if value is None else number(value.mean, 3)


def _sd(value: stats.Spread | None, digits: int = 3) -> str:
    return "" if value is None or value.sd is None else f"±{NBSP}{number(value.sd, digits)} "


def _moderate_key(found: Findings) -> Key:
    cell, main = found.main.moderate, found.main
    name = f"{main.criterion}, {words.rule_phrase(main.rule)}"
    if cell is None:
        return Key("At moderate sparsity", DASH, f"no cell of {name} near 60{NBSP}%")
    label = f"At {percent(cell.sparsity.mean)} sparsity, against the control"
    if cell.minus_control is None:
        return Key(label, DASH, f"{name}; not fine-tuned yet")
    change = cell.minus_control
    return Key(label, signed(change.mean), f"{_sd(change, 4)}nats per token; {name}")


def _knee_key(found: Findings) -> Key:
    knee, label = found.main.knee, "Knee: sparsest at no cost"
    if knee is None:
        return Key(label, DASH, "needs fine-tuned cells and a control")
    if knee.free is None:
        return Key(label, "none", "no level is within the margin of the control")
    if knee.costly is None:
        note = "no level tested is shown to cost"
    else:
        note = f"clear cost from {percent(knee.costly.sparsity.mean)} on"
    return Key(label, percent(knee.free.sparsity.mean), note)


def _size_key(results: Results) -> list[Key]:
    sizes = next(iter(results.dense.values()), {})
    params, prunable = sizes.get("params"), sizes.get("prunable")
    if not isinstance(params, int) or not isinstance(prunable, int) or not params:
        return []
    note = f"of {count(params)} parameters ({percent(prunable / params)})"
    return [Key("Prunable weights", count(prunable), note)]


def _seed_note(found: Findings) -> str:
    counts = {}
    for cell in found.cells:
        counts.setdefault(cell.rule, []).append(len(cell.seeds))
    if max(max(numbers) for numbers in counts.values()) == 1:
        return "one per cell: no spread can be given"
    return "; ".join(f"{seeds_of(n)}: {words.rule_phrase(rule)}" for rule, n in counts.items())


def comparisons(results: Results, found: Findings) -> list[Group]:
    """Returns one group of figures per comparison that has cells."""
    groups = []
    for rule in RULES:
        if any(cell.rule == rule for cell in found.cells):
            pictures = curves.comparison(results, found.cells, rule)
            title = words.rule_title(rule)
            groups.append(Group(pictures, _loss_caption(found, rule), title, QUESTIONS[rule]))
    return groups


def _loss_caption(found: Findings, rule: str) -> str:
    knees = [(c.criterion, c.knee) for c in found.claims if c.rule == rule and c.knee]
    if knees:
        ends = [
            f"{name} {percent(k.free.sparsity.mean) if k.free else 'none'}" for name, k in knees
        ]
        text = f"The sparsest free level of each criterion: {', '.join(ends)}. "
    else:
        text = "No fine-tuned loss can be compared with a control yet. "
    text += "Lines across: dense model (dotted) and control (solid). "
    counts = [len(cell.seeds) for cell in found.cells if cell.rule == rule]
    if max(counts) == 1:
        return f"{text}One seed: no spread can be given."
    return (
        f"{text}Points are means over {seeds_of(counts)}; error bars, and the grey around the "
        "lines across, reach one standard deviation to either side."
    )


def heat(results: Results, found: Findings) -> Group:
    """Returns the maps of the sparsity that each tensor got."""
    rules = [rule for rule in ("std", "global") if any(c.rule == rule for c in found.cells)]
    return Group(
        weights.heat_maps(results, found, rules or [found.main.rule]),
        f"Share pruned of each tensor (%), at the level of each criterion nearest 60{NBSP}%; below "
        "its name the sparsity achieved over all tensors; seeds pooled. The darker, the emptier; "
        "all maps share one range of shades.",
    )


def paths(results: Results, found: Findings) -> Group:
    """Returns the trajectories of sampled weights."""
    chosen = weights.example(results, found)
    if chosen is None:
        return Group([], "")
    (seed, rule, criterion, _), detail = chosen
    row = next((row for row in results.rows if row.key == chosen[0]), None)
    at = f" at {percent(row.sparsity_prunable)} sparsity" if row else ""
    return Group(
        weights.trajectories(results, chosen[0], detail),
        f"Sampled weights while the dense model of seed {seed} trains, marked by what {criterion} "
        f"({words.rule_phrase(rule)}{at}) decides in the end. The tensors are the first, the "
        "middle and the last of the sample, the weights the first few of each kind: none was "
        "picked by its looks. See how far pruned paths stay from 0, and which ones cross it late.",
    )


def histograms(results: Results, found: Findings) -> Group:
    """Returns the histograms of the weights before and after."""
    return Group(
        weights.histograms(results, found),
        "All prunable weights before pruning (grey), after it (solid) and after fine-tuning "
        f"(dashed), at the level nearest 60{NBSP}%, {words.rule_phrase(found.main.rule)}, first "
        "seed. Exact zeros are left out after pruning, so what is missing under the grey was "
        f"pruned. The outermost 0.5{NBSP}% of the weights lie off the axis.",
    )


def training(results: Results) -> Group:
    """Returns the training curve."""
    picture = curves.training(results)
    return Group(
        [picture] if picture else [],
        f"Training of the dense model, {plural(len(results.training), 'seed')}. The loss of single "
        "batches scatters; the validation loss is what the figures above start from.",
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
    """Returns what the cells took, as measured."""
    minutes = sum(row.seconds for row in results.study) / 60
    return f"The {plural(len(results.study), 'cell')} took {minutes:.1f} minutes in all."


def study_of(results: Results) -> dict[str, Any] | None:
    """Returns the study's sentence and table; None where all cells are of the usual kind."""
    if all(row.plain for row in results.study):
        return None
    found = study.combinations(results.study)
    return {"answer": study.answer(found), "table": study.table(found)}


def content(results: Results, found: Findings) -> dict[str, Any]:
    """Returns every variable of the template that needs no file of its own."""
    rules = dict.fromkeys(cell.rule for cell in found.cells)
    return {
        "name": results.name,
        "headline": words.headline(found),
        "keys": keys(results, found),
        "missing": missing.missing(results),
        "findings": words.statements(found),
        "how_to_read": HOW_TO_READ,
        "yardstick": words.yardstick(found),
        "comparisons": comparisons(results, found),
        "study": study_of(results),
        "language": language.of(results),
        "heat": heat(results, found),
        "paths": paths(results, found),
        "histograms": histograms(results, found),
        "training": training(results),
        "tables": [
            tables.best(found),
            tables.claims(found),
            tables.contests(found),
            *[tables.full(found, rule) for rule in rules],
            tables.seeds(results),
        ],
        "config": settings(results),
        "fingerprint": (results.fingerprint or "")[:12],
        "cost": cost(results),
    }
