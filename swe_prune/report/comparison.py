"""The comparison of criteria at equal sparsity: who is best, who is as good, and one sentence.

The best of a column has the lowest fine-tuned loss minus the control's, as a mean over seeds. An
entry is within the margin of the best if the difference of the two, paired by seed, is no larger
than its own standard deviation over seeds.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from swe_prune.report.formats import NBSP, mean_sd, percent, plural
from swe_prune.report.records import CellGroup
from swe_prune.report.stats import MODERATE, Cell, Spread, by_part, moderate, order, spread

PAPER = "swe"
"""The criterion of the paper."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All cells of one group that can be compared, as rows by name and columns by level.

    Attributes:
        group: What they have in common.
        recovered: Whether the losses are those after fine-tuning, or straight after pruning.
        names: Rows in their order.
        levels: Sparsities, or rates of the paper's rule.
        cells: The cell of each name and level.
        best: Names that are best, by level.
        near: Names that are within the margin of the best, by level.
    """

    group: CellGroup
    recovered: bool
    names: list[str]
    levels: list[float]
    cells: dict[tuple[str, float], Cell]
    best: dict[float, str]
    near: dict[float, set[str]]

    @property
    def seeds(self) -> int:
        """The most seeds that any of the cells has."""
        return max(len(cell.changes(self.recovered)) for cell in self.cells.values())


def compare(cells: Iterable[Cell], group: CellGroup, recovered: bool) -> Comparison | None:
    """Returns the comparison of one group; None where it has no cell with these losses."""
    own = [cell for cell in cells if cell.group == group and cell.changes(recovered)]
    if not own:
        return None
    best, near = {}, {}
    levels = sorted({cell.level for cell in own})
    for level in levels:
        # One rate leaves a different sparsity with every criterion, so none of them is best there.
        column = [cell for cell in own if cell.level == level and not group.by_rate]
        winner = lowest(column, recovered)
        if winner is not None:
            best[level] = winner.name
            near[level] = {
                cell.name
                for cell in column
                if cell is not winner and within_margin(cell, winner, recovered)
            }
    entries = {(cell.name, cell.level): cell for cell in own}
    return Comparison(group, recovered, order(own), levels, entries, best, near)


def lowest(cells: Iterable[Cell], recovered: bool) -> Cell | None:
    """Returns the cell of the lowest mean difference, among those with the most seeds."""
    found = [(cell, cell.change(recovered)) for cell in cells]
    known = [(cell, value) for cell, value in found if value is not None]
    most = max((value.n for _, value in known), default=0)
    finite = [(c, v.mean) for c, v in known if v.n == most and math.isfinite(v.mean)]
    return min(finite, key=lambda pair: pair[1])[0] if finite else None


def paired(cell: Cell, other: Cell, recovered: bool) -> Spread | None:
    """Returns the loss of a cell minus that of another over the seeds that both have."""
    mine, theirs = cell.changes(recovered), other.changes(recovered)
    return spread(mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys()))


def within_margin(cell: Cell, best: Cell, recovered: bool) -> bool:
    """Whether the paired difference to the best is no larger than its spread over seeds.

    One seed has no spread, so nothing is within the margin there.
    """
    change = paired(cell, best, recovered)
    return change is not None and change.sd is not None and change.mean <= change.sd


def headline(cells: Sequence[Cell]) -> str:
    """Returns the winner at moderate sparsity and the paper's criterion.

    It is one sentence for each part of the model that is pruned alone.
    """
    parts = by_part(cells)
    whole = "all prunable weights" if len(parts) > 1 else ""
    return " ".join(_sentence(own, part or whole) for part, own in parts.items())


def _sentence(cells: Sequence[Cell], part: str) -> str:
    recovered = any(cell.changes(True) for cell in cells)
    field, start = _field(cells, part, recovered)
    winner = lowest(field, recovered)
    what = "fine-tuned loss" if recovered else "loss before fine-tuning"
    base = "the control" if recovered else "the dense model"
    if winner is None:
        return f"{start} every model diverged."
    # 1. The winner, wherever its sparsity is met.
    seeds = len(winner.changes(recovered))
    text = f"{start} {_called(winner)} has the lowest {what}, {_number(winner, recovered)} "
    text += f"nats per token against {base}"
    if seeds > 1:
        text += f" (mean ± standard deviation of {plural(seeds, 'seed')})"
    # 2. The paper's criterion, or the runner-up where the paper's is the winner.
    if winner.criterion == PAPER:
        rivals, title = [c for c in field if c.criterion != PAPER], "the best other criterion"
    else:
        rivals, title = [c for c in field if c.criterion == PAPER], "the paper's criterion"
    rival = lowest(rivals, recovered)
    if rival is not None:
        text += f"; {title}, {_called(rival)}, is at {_number(rival, recovered)}"
        change = paired(rival, winner, recovered)
        if change is not None and change.sd is not None:
            text += f", a paired difference of {mean_sd(change, sign=True)} to the winner"
            if within_margin(rival, winner, recovered):
                text += ", which is within the margin"
    elif rivals:
        text += f"; {title} diverged"
    # 3. What the number of seeds allows to conclude.
    if seeds == 1:
        text += "; one seed cannot tell a difference from chance"
    return f"{text}."


def _field(cells: Sequence[Cell], part: str, recovered: bool) -> tuple[list[Cell], str]:
    """Returns the cells that compete at moderate sparsity, and how the sentence starts."""
    known = [cell for cell in cells if cell.changes(recovered)]
    equal = [cell for cell in known if not cell.group.by_rate]
    if equal:
        level = min(sorted({cell.level for cell in equal}), key=lambda at: abs(at - MODERATE))
        start = f"At {percent(level)} sparsity" + (f" of {part}" if part else "")
        return [cell for cell in equal if cell.level == level], start
    start = f"With the paper's rule{f' on {part}' if part else ''}, at the rates nearest to "
    start += f"60{NBSP}% sparsity,"
    return moderate(known), start


def _called(cell: Cell) -> str:
    if cell.group.by_rate:
        return f"{cell.name} (rate {cell.level:g}, {percent(cell.sparsity.mean)} sparsity)"
    return f"{cell.name} ({CellGroup(cell.group.rule).phrase})"


def _number(cell: Cell, recovered: bool) -> str:
    return mean_sd(cell.change(recovered), sign=True)
