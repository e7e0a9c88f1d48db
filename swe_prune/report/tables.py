"""The tables of the page and of tables.md, as text; template and Markdown only lay them out."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from swe_prune import ledger
from swe_prune.evaluation.prices import PICTURES
from swe_prune.ledger import second_source
from swe_prune.report import stats
from swe_prune.report.comparison import Comparison
from swe_prune.report.formats import (
    DASH,
    count,
    mean_sd,
    number,
    percent,
    percent_sd,
    plural,
    signed,
)
from swe_prune.report.records import CellGroup, CutModel, Results, key_of, name_and_part_of
from swe_prune.report.stats import Cell, spread

NEAR = "\N{ALMOST EQUAL TO}"
"""Marks an entry within the margin of the best."""


class Bold(str):
    """An entry set in bold: the best of its column."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text; the first `words` columns are left-aligned, the others are numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    @property
    def groups(self) -> list[list[Sequence[str]]]:
        """The rows, those with the same first entry together."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0])]


def costs(results: Results) -> list[Table]:
    """Returns what every phase took over all attempts, no table without a ledger."""
    if not results.ledger or results.factors is None:
        return []
    caption = (
        "Time, energy, carbon and water by phase, of all attempts; intervals in brackets. "
        f"Energy at the building's meter; meters: {ledger.sources(results.ledger)}."
    )
    head = ["Phase", "Seconds", "Energy", "Carbon", "Water"]
    rows = ledger.lines(results.ledger, results.factors)
    if results.beside:
        rows.append(second_source.line(results.beside))
    return [Table(caption, head, rows)]


def comparison(found: Comparison) -> Table:
    """Returns criteria by sparsity, each entry the loss against the control."""
    rows = [[name, *(_entry(found, name, at) for at in found.levels)] for name in found.names]
    heads = [f"rate {at:g}" if found.group.by_rate else percent(at) for at in found.levels]
    return Table(_caption(found), ["Criterion", *heads], rows)


def _entry(found: Comparison, name: str, level: float) -> str:
    cell = found.cells.get((name, level))
    if cell is None:
        return DASH
    value = cell.change(found.recovered)
    text = mean_sd(value, sign=True)
    if value is not None and value.n < found.seeds:
        text += f" (n={value.n})"
    if found.group.by_rate:
        text += f" at {percent(cell.sparsity.mean)}"
    if found.best.get(level) == name:
        return Bold(text)
    return f"{NEAR} {text}" if name in found.near.get(level, ()) else text


def _caption(found: Comparison) -> str:
    if found.recovered:
        what = "Fine-tuned validation loss minus the control's"
    else:
        what = "Validation loss straight after pruning minus the dense model's"
    text = f"{found.group.title}. {what}, in nats per token; "
    if found.seeds > 1:
        text += f"mean ± standard deviation over n = {plural(found.seeds, 'seed')}, paired by seed"
    else:
        text += "n = 1 seed"
    if found.group.by_rate:
        return (
            f"{text}; then the sparsity that the rate led to. The sparsities of a column differ, "
            "so no entry is marked as its best."
        )
    text += ". Bold: the best of its column"
    if found.seeds == 1:
        return f"{text}; with one seed no margin can be told."
    return (
        f"{text}. {NEAR}: within the margin of the best, so the paired difference to it is no "
        "larger than its own standard deviation over seeds."
    )


def cells(found: Sequence[Cell], group: CellGroup) -> Table:
    """Returns every cell of one comparison with what it removed, lost and took."""
    head = (
        "Criterion,Requested,Achieved,Of all parameters,Non-zero parameters,Pruned minus dense,"
        "Fine-tuned minus control,Generalisation gap,Control's gap,Seconds,Seeds"
    )
    return Table(
        f"{group.title}, all cells. Pruned: straight after pruning, with a schedule under its "
        "final masks. Gap: validation minus training loss, on equally many fixed windows. Losses "
        "in nats per token, mean ± standard deviation over seeds, differences paired by seed.",
        head.split(","),
        [_cell(cell) for cell in found if cell.group == group],
    )


def _cell(cell: Cell) -> list[str]:
    nonzero, seconds, total = (
        cell.of(name) for name in ("nonzero_params", "seconds", "sparsity_total")
    )
    return [
        cell.name,
        f"rate {cell.level:g}" if cell.group.by_rate else percent(cell.level),
        percent_sd(cell.sparsity),
        DASH if total is None else percent_sd(total),
        DASH if nonzero is None else count(nonzero.mean),
        mean_sd(cell.change(recovered=False), sign=True),
        mean_sd(cell.change(recovered=True), sign=True),
        mean_sd(cell.of("generalisation_gap"), 3, sign=True),
        mean_sd(cell.of("control_gap"), 3, sign=True),
        DASH if seconds is None else number(seconds.mean, 1),
        str(len(cell.rows)),
    ]


def seeds(results: Results) -> Table:
    """Returns the dense and the control loss of each seed."""
    dense = stats.per_seed(results.rows, "dense_loss")
    control = stats.per_seed(results.rows, "control_loss")
    rows = []
    for seed in results.seeds:
        change = stats.difference(control.get(seed), dense.get(seed))
        rows.append(
            [
                str(seed),
                number(dense[seed]),
                number(control[seed]) if seed in control else DASH,
                DASH if change is None else signed(change),
                str(sum(row.seed == seed for row in results.rows)),
            ]
        )
    return Table(
        "The two references of each seed: the dense model, and the control, which is the dense "
        "model trained for the same extra steps. Validation loss in nats per token.",
        ["Seed", "Dense", "Control", "Control minus dense", "Cells"],
        rows,
    )


def perplexities(results: Results, found: Sequence[Cell]) -> Table:
    """Returns perplexity, distance from the dense model and repetition, before and after recovery.

    The perplexity is exp of the mean loss over seeds.
    """
    rows = []
    before = [one["pretrained_loss"] for one in results.dense.values() if "pretrained_loss" in one]
    dense = stats.per_seed(results.rows, "dense_loss").values()
    control = stats.per_seed(results.rows, "control_loss").values()
    for name, values in (("pretrained", before), ("dense", dense), ("control", control)):
        if values:
            rows.append([name, DASH, DASH, perplexity(spread(values)), *[DASH] * 5])
    for cell in found:
        rows.append(
            [
                cell.name,
                cell.group.phrase,
                percent(cell.sparsity.mean),
                *(perplexity(cell.of(f"{stage}_loss")) for stage in ("pruned", "finetuned")),
                *(_number(cell.of(f"{stage}_kl")) for stage in ("pruned", "finetuned")),
                *(_percent(cell.of(f"{stage}_repetition")) for stage in ("pruned", "finetuned")),
            ]
        )
    head = "Model,Comparison,Sparsity,Perplexity,recovered,KL,recovered,Repetition,recovered"
    return Table(
        "Perplexity on the validation windows, straight after pruning and after the recovery. KL: "
        "divergence of the next-token probabilities from the dense model's, in nats per token. "
        "Repetition: the share of 3-grams of the samples that occurred in them before.",
        head.split(","),
        rows,
        words=2,
    )


def samples(results: Results) -> Table:
    """Returns what the models of the first seed wrote, greedily, after each prompt."""
    seed = results.seeds[0]
    rows = []
    for one in results.dense.get(seed, {}).get("dense_samples", []):
        rows.append(["dense", DASH, *_shown(one), DASH])
    for row in results.rows:
        detail = results.details.get(key_of(row))
        if row.seed != seed or detail is None:
            continue
        pruned, tuned = (detail.samples.get(stage, []) for stage in ("pruned", "finetuned"))
        for one, two in itertools.zip_longest(pruned, tuned):
            prompt, text = _shown(one or two)
            last = _shown(two)[1] if two else DASH
            shown = percent(row.sparsity_prunable)
            name = name_and_part_of(row)
            rows.append([name, shown, prompt, text if one else DASH, last])
    head = ["Model", "Sparsity", "Prompt", "Continuation, pruned", "Continuation, recovered"]
    return Table(f"What the models of seed {seed} wrote, greedily.", head, rows, words=5)


def prices(results: Results, found: Sequence[Cell]) -> Table:
    """Returns the errors of prices read off pictures, and of prices given without looking."""
    head = "Model,Comparison,Sparsity,MAE pruned,MAE,Blank,Shuffled,Teacher-forced,No price"
    dense = [one["dense_prices"] for one in results.dense.values() if "dense_prices" in one]
    rows = [["dense", DASH, DASH, DASH, *_price_cells(dense)]]
    control = stats.per_seed(results.rows, "control_mae").values()
    if control:
        rows.append(["control", DASH, DASH, DASH, _number(spread(control)), *[DASH] * 4])
    for cell in found:
        details = [results.details.get(key_of(row)) for row in cell.rows]
        last = [one.prices.get("finetuned") or one.prices.get("pruned") for one in details if one]
        rows.append(
            [
                cell.name,
                cell.group.phrase,
                percent(cell.sparsity.mean),
                _number(cell.of("pruned_mae")),
                *_price_cells([one for one in last if one]),
            ]
        )
    for name in dict.fromkeys(cut.name for cut in results.cuts):
        rows += _cut_prices([cut for cut in results.cuts if cut.name == name])
    return Table(
        "Mean absolute error of prices, mean over seeds: generated straight after pruning, and "
        "after the recovery with the picture, with a blank one, and with another example's; and "
        "by the published recipe, which predicts every figure with the true ones before it. "
        "No price: answers without one, which the generated errors leave out. The sparsity of a "
        "cut is that of its units; under it are models of smaller shapes, trained from random "
        "weights.",
        head.split(","),
        rows,
        words=2,
    )


def _cut_prices(cuts: Sequence[CutModel]) -> list[list[str]]:
    """Returns rows for a cut of several seeds, and for the smaller shapes next to it."""
    of_model: dict[str, list[dict[str, Any]]] = {}
    for cut in cuts:
        for model, errors in cut.prices.items():
            of_model.setdefault(model, []).append(errors)
    first, about = cuts[0], "cut " + cuts[0].units.replace("_", " ")
    before = _number(spread(one["generated"]["own"] for one in of_model.pop("cut", [])))
    rows = []
    for model, errors in of_model.items():
        start = [first.name, about, percent(first.sparsity), before]
        if model != "recovered":
            share = float(model.removeprefix("smaller_"))
            start = ["from random weights", about, percent(share), DASH]
        rows.append([*start, *_price_cells(errors)])
    return rows


def _price_cells(errors: Sequence[dict[str, Any]]) -> list[str]:
    values = [[one["generated"][shown] for one in errors] for shown in PICTURES]
    values.append([one["teacher_forced"] for one in errors])
    missing = spread(one["unparsable"]["own"] for one in errors)
    cells = [_number(spread(known)) for known in values]
    return [*cells, DASH if missing is None else number(missing.mean, 1)]


def _shown(sample: dict[str, Any]) -> list[str]:
    return [" ".join(str(sample[key]).split()) for key in ("prompt", "text")]


def perplexity(loss: stats.Spread | None) -> str:
    """Returns exp of a mean loss as a table shows it.

    >>> perplexity(spread([math.log(20)])), perplexity(None)
    ('20.00', '\N{EN DASH}')
    """
    if loss is None:
        return DASH
    return number(math.exp(loss.mean), 2) if loss.mean < 700 else number(math.inf)


def _number(value: stats.Spread | None) -> str:
    return DASH if value is None else number(value.mean, 3)


def _percent(value: stats.Spread | None) -> str:
    return DASH if value is None else percent(value.mean)
