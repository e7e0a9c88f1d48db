"""The tables of the page, as plain text cells; the template only lays them out."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from swe_prune.report import stats
from swe_prune.report.findings import Claims, Contest, Findings
from swe_prune.report.formats import DASH, count, mean_sd, number, percent, percent_sd, signed
from swe_prune.report.records import Results
from swe_prune.report.stats import Cell, Spread, verdict
from swe_prune.report.words import PHASES, VERDICTS, rule_phrase, standing


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text; the first `words` columns are left-aligned, the others are numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    @property
    def groups(self) -> list[list[Sequence[str]]]:
        """The rows, those that begin alike together."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0])]


TITLES = {"std": "Paper's rule", "tensor": "Per tensor", "global": "Global", "row": "Per row"}


def requested(cell: Cell) -> str:
    """Returns what was asked of a cell: a rate under the paper's rule, else a sparsity."""
    return f"rate {cell.requested:g}" if cell.rule == "std" else percent(cell.requested)


def _verdict(change: Spread | None) -> str:
    return VERDICTS[None if change is None else verdict(change)]


def best(found: Findings) -> Table:
    """Returns two rows per comparison: the lowest loss, and the sparsest cell that is free."""
    rows = []
    for one in found.bests:
        label = "lowest loss" if one.lowest.finetuned else "lowest loss, not fine-tuned"
        rows.append([TITLES[one.rule], label, *_summary(one.lowest)])
        if one.sparsest_free:
            rows.append([TITLES[one.rule], "sparsest free cell", *_summary(one.sparsest_free)])
        elif one.lowest.minus_control:
            rows.append([TITLES[one.rule], "sparsest free cell", "none", *[DASH] * 6])
    head = (
        "Comparison,Best by,Criterion,Requested,Achieved,Pruned,Fine-tuned,Minus control,"
        "Minus dense"
    )
    return Table(
        "The best cell of each comparison. Free: fine-tuned loss within "
        f"{stats.MARGIN:g} nats per token of the control. Losses in nats per token, "
        "mean ± standard deviation over seeds.",
        head.split(","),
        rows,
        words=3,
    )


def _summary(cell: Cell) -> list[str]:
    return [
        cell.criterion,
        requested(cell),
        percent_sd(cell.sparsity),
        mean_sd(cell.pruned),
        mean_sd(cell.finetuned),
        mean_sd(cell.minus_control, sign=True),
        mean_sd(cell.minus_dense, sign=True),
    ]


def claims(found: Findings) -> Table:
    """Returns the paper's two claims for every criterion under every comparison."""
    head = (
        "Comparison,Criterion,Near 60\N{NO-BREAK SPACE}%,Minus control,Verdict,Minus dense,Verdict,"
        "Knee,Costs from,Slope per 10 points"
    )
    return Table(
        "The paper's two claims for every criterion, at its cell nearest 60\N{NO-BREAK SPACE}% "
        "achieved sparsity. Verdict: against the yardstick before it. Knee: the sparsest level "
        "within the margin of the control. Slope: mean rise from there to the sparsest level. "
        "Losses in nats per token.",
        head.split(","),
        [_claim(one) for one in found.claims],
        words=2,
    )


def _claim(one: Claims) -> list[str]:
    cell, knee = one.moderate, one.knee
    nothing = "none" if knee else DASH
    slope = knee.slope if knee else None
    return [
        TITLES[one.rule],
        one.criterion,
        percent_sd(cell.sparsity) if cell else DASH,
        mean_sd(cell.minus_control if cell else None, sign=True),
        VERDICTS[one.against_control],
        mean_sd(cell.minus_dense if cell else None, sign=True),
        VERDICTS[one.against_dense],
        percent_sd(knee.free.sparsity) if knee and knee.free else nothing,
        percent_sd(knee.costly.sparsity) if knee and knee.costly else nothing,
        DASH if slope is None else signed(slope, 3) if math.isfinite(slope) else "diverged",
    ]


def contests(found: Findings) -> Table | None:
    """Returns every contest at equal sparsity with its tally and the gap at each level."""
    levels = sorted({bout.sparsity for one in found.contests for bout in one.bouts})
    if not levels:
        return None
    head = "Comparison,Criterion,Rival,Fine-tuning,Result"
    return Table(
        "Who is ahead at equal sparsity: loss of the criterion minus loss of its rival (nats per "
        "token, paired by seed, mean ± standard deviation; below 0 the criterion is better). A "
        "level is tied when the mean is within its standard deviation, or with one seed within "
        f"{stats.MARGIN:g}.",
        [*head.split(","), *map(percent, levels)],
        [_contest(one, levels) for one in found.contests],
        words=5,
    )


def _contest(one: Contest, levels: list[float]) -> list[str]:
    marks = {"win": " won", "loss": " lost", "tie": " tied"}
    by_level = {
        bout.sparsity: mean_sd(bout.change, 3, sign=True) + marks[bout.outcome]
        if math.isfinite(bout.change.mean)
        else f"diverged{marks[bout.outcome]}"
        for bout in one.bouts
    }
    cells = [by_level.get(level, DASH) for level in levels]
    return [
        TITLES[one.rule],
        one.criterion,
        one.rival,
        PHASES[one.phase].split()[0],
        standing(one),
        *cells,
    ]


def full(found: Findings, rule: str) -> Table:
    """Returns every cell of one comparison."""
    rows = [
        [
            cell.criterion,
            requested(cell),
            percent_sd(cell.sparsity),
            percent_sd(cell.total),
            count(cell.nonzero.mean),
            mean_sd(cell.pruned),
            mean_sd(cell.finetuned),
            mean_sd(cell.minus_control, sign=True),
            _verdict(cell.minus_control),
            str(len(cell.seeds)),
        ]
        for cell in _ordered(found, rule)
    ]
    head = (
        "Criterion,Requested,Achieved prunable,Achieved total,Non-zero parameters,Pruned,"
        "Fine-tuned,Minus control,Verdict,Seeds"
    )
    return Table(
        f"All cells, {rule_phrase(rule)}. Losses in nats per token, mean ± standard deviation over "
        "seeds; the difference to the control is paired by seed.",
        head.split(","),
        rows,
    )


def _ordered(found: Findings, rule: str) -> list[Cell]:
    own = [cell for cell in found.cells if cell.rule == rule]
    names = stats.order(cell.criterion for cell in own)
    return sorted(own, key=lambda cell: (names.index(cell.criterion), cell.sparsity.mean))


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
        "The two yardsticks of each seed: the dense model, and the control, which is the dense "
        "model trained for the same extra steps. Validation loss in nats per token.",
        ["Seed", "Dense", "Control", "Control minus dense", "Cells"],
        rows,
    )
