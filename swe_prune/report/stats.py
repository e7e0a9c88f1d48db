"""Means, spreads and paired differences over seeds; the only place where numbers are averaged.

A loss that is not finite means that the model was destroyed. It is kept as +inf, so it can never
vanish from a mean and make a criterion look better than it is.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from swe_prune.report.records import RULES, Row

MARGIN = 0.01
"""Nats per token that are called nothing: 1 % of perplexity. Stated wherever it decides."""

Verdict = Literal["lower", "equal", "higher", "undecided"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; no `sd` for one seed or no finite mean."""

    mean: float
    sd: float | None
    n: int
    diverged: int = 0

    @property
    def low(self) -> float:
        """One standard deviation below the mean."""
        return self.mean - (self.sd or 0.0)

    @property
    def high(self) -> float:
        """One standard deviation above the mean."""
        return self.mean + (self.sd or 0.0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """All seeds of one (rule, criterion, requested); None where nothing was measured."""

    rule: str
    criterion: str
    requested: float
    seeds: tuple[int, ...]
    sparsity: Spread  # achieved, of the prunable weights
    total: Spread  # achieved, of all parameters
    nonzero: Spread
    pruned: Spread
    finetuned: Spread | None
    pruned_minus_dense: Spread | None
    minus_control: Spread | None  # fine-tuned minus control, paired by seed
    minus_dense: Spread | None  # fine-tuned minus dense, paired by seed


def spread(values: Iterable[float | None]) -> Spread | None:
    """Returns mean and sample standard deviation; None for no value.

    >>> spread([1.0, 2.0, None])
    Spread(mean=1.5, sd=0.7071067811865476, n=2, diverged=0)
    >>> spread([1.0, float("nan")])
    Spread(mean=inf, sd=None, n=2, diverged=1)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    diverged = sum(not math.isfinite(value) for value in known)
    if diverged:
        return Spread(math.inf, None, len(known), diverged)
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), sd, len(known))


def difference(value: float | None, base: float | None) -> float | None:
    """Returns `value - base`; +inf if only `value` is destroyed, None where it says nothing."""
    if value is None or base is None or not math.isfinite(base):
        return None
    return value - base if math.isfinite(value) else math.inf


def verdict(change: Spread, margin: float = MARGIN) -> Verdict:
    """Judges a paired change in loss by mean ± one standard deviation against a margin.

    lower: mean below -margin and mean + sd below 0; equal: mean + sd within margin (from above);
    higher: mean - sd above margin; undecided: the seeds scatter across the margin. One seed has no
    sd, and is then judged by its value alone.
    """
    if change.mean < -margin and change.high < 0:
        return "lower"
    if change.high <= margin:
        return "equal"
    return "higher" if change.low > margin else "undecided"


def _at_least_one(values: Iterable[float]) -> Spread:
    result = spread(values)
    assert result is not None  # a group of rows is never empty
    return result


def summarise(rows: Sequence[Row]) -> list[Cell]:
    """Returns one `Cell` per (rule, criterion, requested), by rule, criterion and sparsity."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.rule, row.criterion, row.requested), []).append(row)
    cells = [_cell(key, group) for key, group in groups.items()]
    return sorted(cells, key=lambda c: (RULES.index(c.rule), c.criterion, c.sparsity.mean))


def _cell(key: tuple[str, str, float], group: list[Row]) -> Cell:
    return Cell(
        *key,
        seeds=tuple(sorted(row.seed for row in group)),
        sparsity=_at_least_one(row.sparsity_prunable for row in group),
        total=_at_least_one(row.sparsity_total for row in group),
        nonzero=_at_least_one(row.nonzero_params for row in group),
        pruned=_at_least_one(row.pruned_loss for row in group),
        finetuned=spread(row.finetuned_loss for row in group),
        pruned_minus_dense=spread(difference(r.pruned_loss, r.dense_loss) for r in group),
        minus_control=spread(difference(r.finetuned_loss, r.control_loss) for r in group),
        minus_dense=spread(difference(r.finetuned_loss, r.dense_loss) for r in group),
    )


def per_seed(rows: Iterable[Row], field: str) -> dict[int, float]:
    """Returns `dense_loss` or `control_loss` once per seed, seeds without a value left out."""
    found: dict[int, float] = {}
    for row in rows:
        value = getattr(row, field)
        if value is not None:
            found.setdefault(row.seed, value)
    return dict(sorted(found.items()))


def nearest(cells: Iterable[Cell], target: float, within: float = 1.0) -> Cell | None:
    """Returns the cell whose achieved sparsity is nearest to `target`, or None if none is near."""
    near = [cell for cell in cells if abs(cell.sparsity.mean - target) <= within]
    return min(near, key=lambda cell: abs(cell.sparsity.mean - target), default=None)


def order(criteria: Iterable[str]) -> list[str]:
    """Returns criteria with swe first, its rivals next, the rest by name."""
    first = {name: i for i, name in enumerate(("swe", "swe_spread", "magnitude", "random"))}
    return sorted(set(criteria), key=lambda name: (first.get(name, len(first)), name))
