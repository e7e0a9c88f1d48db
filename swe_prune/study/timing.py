"""When a cell is pruned that is pruned during its recovery."""

from swe_prune import schedules
from swe_prune.errors import InputError
from swe_prune.study.grid import Cell

RAMP = 0.6  # the share of the recovery in which pruning goes on; the rest heals with masks fixed
UPDATES = 10  # of the masks on a cubic ramp, at most
ROUNDS = 5  # of iterative pruning, at most


def schedule(cell: Cell, steps: int) -> schedules.Schedule:
    """Returns the schedule of a gradual cell within the steps of its recovery.

    Cubic: from nothing at step 0 to the sparsity at 60 % of the recovery, in ten updates.
    Iterative: five rounds in the same time, the first at step 0, each removing the same share of
    what is left. Shorter recoveries have fewer updates.

    Raises:
        InputError: the recovery has one step.
    """
    if steps < 2:
        raise InputError(
            f"schedule {cell.schedule!r} prunes during a recovery, of which {steps} step is too "
            "short; give 2 or more"
        )
    end = max(1, min(steps - 1, round(RAMP * steps)))
    if cell.schedule == "cubic":
        return schedules.Cubic(cell.requested, begin=0, end=end, every=-(-end // UPDATES))
    every = max(1, end // (ROUNDS - 1))
    return schedules.Iterative(cell.requested, rounds=min(ROUNDS, 1 + end // every), every=every)
