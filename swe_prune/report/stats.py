"""Means, spreads and paired differences over seeds; the only place where numbers are averaged.

A loss that is not finite means that the model was destroyed. It is kept as +inf, so it can never
vanish from a mean and make a criterion look better than it is.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from swe_prune.report.records import GROUPS, CellGroup, group_of, key_of, name_of
from swe_prune.study.results import Row

MODERATE = 0.6
"""The paper's moderate sparsity."""


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
    """All seeds of one cell.

    Attributes:
        group: Comparison it belongs to.
        name: Criterion or method with its unusual settings.
        level: Requested sparsity, or the rate of the paper's rule.
        rows: One row per seed, by seed.
    """

    group: CellGroup
    name: str
    level: float
    rows: tuple[Row, ...]

    def of(self, field: str) -> Spread | None:
        """Returns a column over the seeds; None where nothing was measured."""
        return spread(getattr(row, field) for row in self.rows)

    @property
    def criterion(self) -> str:
        """Criterion without its settings; empty for a method."""
        return self.rows[0].criterion

    @property
    def sparsity(self) -> Spread:
        """Achieved sparsity of the prunable weights."""
        found = self.of("sparsity_prunable")
        assert found is not None  # every row has it
        return found

    def changes(self, recovered: bool) -> dict[int, float]:
        """Returns the loss of each seed minus its reference.

        Args:
            recovered: Whether to take the fine-tuned loss minus the control's, or the loss straight
                after pruning minus the dense model's.
        """
        stage, base = ("finetuned", "control") if recovered else ("pruned", "dense")
        found = {
            row.seed: difference(getattr(row, f"{stage}_loss"), getattr(row, f"{base}_loss"))
            for row in self.rows
        }
        return {seed: change for seed, change in found.items() if change is not None}

    def change(self, recovered: bool) -> Spread | None:
        """Returns `changes` over the seeds; None where nothing was measured."""
        return spread(self.changes(recovered).values())


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


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """Returns one `Cell` for the seeds of each, by comparison, name and achieved sparsity."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row)[1:], []).append(row)  # all that names it but the seed
    cells = []
    for same in found.values():
        first = same[0]
        level = first.sparsity if first.rate is None else first.rate
        assert level is not None  # `read` refuses a row that has neither
        by_seed = tuple(sorted(same, key=lambda row: row.seed))
        cells.append(Cell(group_of(first), name_of(first), level, by_seed))
    ranks = {name: rank for rank, name in enumerate(order(cells))}
    rules, parts = list(GROUPS), list(dict.fromkeys(cell.group.part for cell in cells))
    return sorted(
        cells,
        key=lambda cell: (
            rules.index(cell.group.rule),
            parts.index(cell.group.part),
            ranks[cell.name],
            cell.sparsity.mean,
        ),
    )


def by_part(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Returns the cells by the part of the model that they prune, since no two compare."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.group.part, []).append(cell)
    return found


def usual(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells pruned in one shot and fine-tuned, which figures show; else all."""
    plain = ("one_shot", "finetune")
    found = [cell for cell in cells if (cell.rows[0].schedule, cell.rows[0].recovery) == plain]
    return found or list(cells)


def order(cells: Iterable[Cell]) -> list[str]:
    """Returns the cells' names: the paper's criteria first, random, the reference, last."""
    ranks = {"swe": 0, "swe_spread": 1, "magnitude": 2, "random": 4}
    of = {cell.name: ranks.get(cell.criterion, 3) for cell in cells}
    return sorted(of, key=lambda name: (of[name], name))


def per_seed(rows: Iterable[Row], field: str) -> dict[int, float]:
    """Returns `dense_loss` or `control_loss` once per seed, seeds without a value left out.

    The control is that of plain fine-tuning where there is one: each recovery has its own.
    """
    found: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row.recovery != "finetune"):
        value = getattr(row, field)
        if value is not None:
            found.setdefault(row.seed, value)
    return dict(sorted(found.items()))


def moderate(cells: Iterable[Cell]) -> list[Cell]:
    """Returns, for each name, the cell whose achieved sparsity is nearest to 60 %."""
    found: dict[str, Cell] = {}
    for cell in cells:
        other = found.setdefault(cell.name, cell)
        if abs(cell.sparsity.mean - MODERATE) < abs(other.sparsity.mean - MODERATE):
            found[cell.name] = cell
    return list(found.values())
