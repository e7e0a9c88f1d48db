"""What was found, as numbers: the paper's two claims, the knee, and who beats whom.

Pure functions from rows to dataclasses. `words.py` makes sentences of them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from swe_prune.report.records import RULES, Row
from swe_prune.report.stats import (
    MARGIN,
    Cell,
    Spread,
    Verdict,
    difference,
    nearest,
    order,
    spread,
    summarise,
    verdict,
)

MODERATE = 0.6
"""The paper's moderate sparsity. A level counts as moderate within MODERATE_WITHIN of it."""
MODERATE_WITHIN = 0.12

Phase = Literal["pruned", "finetuned"]


@dataclasses.dataclass(frozen=True)
class Knee:
    """Where a curve leaves the control.

    Attributes:
        levels: the fine-tuned cells by rising sparsity.
        free: the sparsest cell shown to be within the margin of its control, if any.
        costly: the first cell sparser than `free` shown to be above it, if any.
        dip: a cell less sparse than `free` that costs: the curve is then not monotone.
        slope: nats per token for every further 10 points of sparsity, from `free` (or the first
            level) to the sparsest one; None where there is no way to go.
    """

    levels: tuple[Cell, ...]
    free: Cell | None
    costly: Cell | None
    dip: Cell | None
    slope: float | None

    @property
    def last(self) -> Cell:
        """The sparsest level."""
        return self.levels[-1]


@dataclasses.dataclass(frozen=True)
class Claims:
    """The paper's two claims for one rule and one criterion."""

    rule: str
    criterion: str
    moderate: Cell | None
    against_control: Verdict | None
    against_dense: Verdict | None
    knee: Knee | None


@dataclasses.dataclass(frozen=True)
class Bout:
    """One level of a contest: loss of the criterion minus loss of its rival, paired by seed."""

    sparsity: float
    change: Spread
    outcome: Literal["win", "tie", "loss"]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A criterion against a rival at equal sparsity, level by level."""

    rule: str
    phase: Phase
    criterion: str
    rival: str
    bouts: tuple[Bout, ...]

    def count(self, outcome: str) -> int:
        """How many levels ended in `win`, `tie` or `loss`."""
        return sum(bout.outcome == outcome for bout in self.bouts)

    @property
    def moderate(self) -> Bout:
        """The level nearest 60 %."""
        return min(self.bouts, key=lambda bout: abs(bout.sparsity - MODERATE))


def knee(cells: Iterable[Cell], margin: float = MARGIN) -> Knee | None:
    """Returns where the fine-tuned loss leaves the control; None without fine-tuned cells."""
    levels = sorted(
        (cell for cell in cells if cell.minus_control), key=lambda cell: cell.sparsity.mean
    )
    if not levels:
        return None
    verdicts = [verdict(cell.minus_control, margin) for cell in levels if cell.minus_control]
    free = max((i for i, v in enumerate(verdicts) if v in ("lower", "equal")), default=-1)
    costly = next((i for i, v in enumerate(verdicts) if v == "higher" and i > free), None)
    dip = next((i for i, v in enumerate(verdicts) if v == "higher" and i < free), None)
    return Knee(
        levels=tuple(levels),
        free=levels[free] if free >= 0 else None,
        costly=None if costly is None else levels[costly],
        dip=None if dip is None else levels[dip],
        slope=_slope(levels[max(free, 0)], levels[-1]),
    )


def _slope(start: Cell, end: Cell) -> float | None:
    run = end.sparsity.mean - start.sparsity.mean
    rise = difference(
        end.minus_control and end.minus_control.mean,
        start.minus_control and start.minus_control.mean,
    )
    return None if rise is None or run <= 0 else rise / (run * 10)


def claims(cells: Iterable[Cell], rule: str, criterion: str, margin: float = MARGIN) -> Claims:
    """Returns the two claims as measured for one rule and criterion."""
    own = [cell for cell in cells if (cell.rule, cell.criterion) == (rule, criterion)]
    tuned = [cell for cell in own if cell.finetuned]
    moderate = nearest(tuned or own, MODERATE, MODERATE_WITHIN)

    def judge(change: Spread | None) -> Verdict | None:
        return None if change is None else verdict(change, margin)

    return Claims(
        rule,
        criterion,
        moderate,
        judge(moderate.minus_control) if moderate else None,
        judge(moderate.minus_dense) if moderate else None,
        knee(own, margin),
    )


def protagonist(cells: Sequence[Cell]) -> tuple[str, str]:
    """Returns the (rule, criterion) the claims are about: swe, the paper's rule if measured."""
    present = {(cell.rule, cell.criterion) for cell in cells}
    names = sorted({name for _, name in present}, key=lambda name: (name != "swe", name))
    for name in names:
        for rule in RULES:
            if (rule, name) in present:
                return rule, name
    raise ValueError("no cells")


def contest(
    rows: Sequence[Row], rule: str, phase: Phase, criterion: str, rival: str, margin: float = MARGIN
) -> Contest | None:
    """Returns a criterion against its rival at every level and seed both have; None if none.

    A level is won or lost when the mean paired difference exceeds its standard deviation over
    seeds; with one seed, when it exceeds the margin.
    """
    losses: dict[tuple[str, float, int], float] = {}
    for row in rows:
        value = getattr(row, f"{phase}_loss")
        if row.rule == rule and row.criterion in (criterion, rival) and value is not None:
            losses[row.criterion, row.requested, row.seed] = value
    bouts = []
    for level in sorted({level for name, level, _ in losses if name == criterion}):
        seeds = {seed for name, at, seed in losses if at == level and name == criterion}
        changes = [
            _duel(losses[criterion, level, seed], losses[rival, level, seed])
            for seed in sorted(seeds)
            if (rival, level, seed) in losses
        ]
        if changes:
            bouts.append(_bout(level, changes, margin))
    return Contest(rule, phase, criterion, rival, tuple(bouts)) if bouts else None


def _duel(mine: float, rival: float) -> float:
    """Returns mine minus rival; ±inf where one is destroyed, 0 where both are."""
    against_rival, against_mine = difference(mine, rival), difference(rival, mine)
    if against_rival is not None:
        return against_rival
    return 0.0 if against_mine is None else -against_mine


def _bout(level: float, changes: list[float], margin: float) -> Bout:
    lost, won = float("inf") in changes, float("-inf") in changes
    if lost or won:
        # Destroyed in some seed and not in its rival's (or the reverse) outweighs any finite gap.
        mean = 0.0 if lost and won else (float("inf") if lost else float("-inf"))
        change = Spread(mean, None, len(changes), sum(abs(c) == float("inf") for c in changes))
        return Bout(level, change, "tie" if lost and won else ("loss" if lost else "win"))
    change = spread(changes)
    assert change is not None  # the caller gives at least one
    threshold = margin if change.sd is None else change.sd
    if abs(change.mean) <= threshold:
        return Bout(level, change, "tie")
    return Bout(level, change, "win" if change.mean < 0 else "loss")


def contests(rows: Sequence[Row], rivals: Sequence[str] = ("magnitude", "random")) -> list[Contest]:
    """Returns every contest at equal sparsity: each criterion against each rival, both phases."""
    found = []
    phases: tuple[Phase, ...] = ("pruned", "finetuned")
    for rule in RULES[1:]:
        names = order(row.criterion for row in rows if row.rule == rule)
        for rival in rivals:
            for name in names:
                if name in ("random", rival):
                    continue
                for phase in phases:
                    one = contest(rows, rule, phase, name, rival)
                    found += [one] if one else []
    return found


@dataclasses.dataclass(frozen=True)
class Best:
    """The best cells of one comparison, over all its criteria."""

    rule: str
    lowest: Cell  # by fine-tuned loss, or by pruned loss while nothing is fine-tuned
    sparsest_free: Cell | None  # the sparsest within the margin of its control


def best(cells: Sequence[Cell], rule: str, margin: float = MARGIN) -> Best | None:
    """Returns the cell of lowest loss and the sparsest that costs nothing; ties go to sparser."""
    own = [cell for cell in cells if cell.rule == rule]
    if not own:
        return None
    tuned = [cell for cell in own if cell.finetuned]
    lowest = min(
        tuned or own,
        key=lambda cell: ((cell.finetuned or cell.pruned).mean, -cell.sparsity.mean),
    )
    free = [
        cell
        for cell in tuned
        if cell.minus_control and verdict(cell.minus_control, margin) in ("lower", "equal")
    ]
    sparsest = max(free, key=lambda c: (c.sparsity.mean, -_mean(c.minus_control)), default=None)
    return Best(rule, lowest, sparsest)


def _mean(value: Spread | None) -> float:
    return float("inf") if value is None else value.mean


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything the page says in numbers."""

    cells: list[Cell]
    main: Claims
    claims: list[Claims]
    contests: list[Contest]
    bests: list[Best]


def find(rows: Sequence[Row]) -> Findings:
    """Returns all findings of an experiment."""
    cells = summarise(rows)
    names = order(cell.criterion for cell in cells)
    present = {(cell.rule, cell.criterion) for cell in cells}
    pairs = [(rule, name) for rule in RULES for name in names if (rule, name) in present]
    bests = (best(cells, rule) for rule in RULES)
    return Findings(
        cells,
        claims(cells, *protagonist(cells)),
        [claims(cells, rule, criterion) for rule, criterion in pairs],
        contests(rows),
        [one for one in bests if one],
    )
