"""Pruning schedules: when to prune and to what sparsity, as pure functions of the step.

A schedule is a frozen dataclass with three methods:

    sparsity(step)   the sparsity after the update at `step`
    is_due(step)     whether masks are updated at `step`
    due_steps()      all the steps at which masks are updated, in order

For a Python or numpy integer the result is an exact Python float or bool. For a JAX integer array,
traced or not, it is float32 or bool of the same shape, so one compiled program serves a whole
schedule.

Step t is after t optimizer steps: an update at step 0 precedes all training, and the ramp of
`Cubic` starts at `begin` and ends at `end`. jaxpruner uses the same ramp with a progress of
(t + 1 − begin) / (end − begin), one step ahead.
"""

from typing import Any

from swe_prune.errors import check_choice
from swe_prune.schedules.exchange import cosine_drop_fraction
from swe_prune.schedules.ramps import Constant, Cubic, Iterative, OneShot, Schedule
from swe_prune.schedules.steps import Step
from swe_prune.schedules.warmup_ramp import MovementSchedule

__all__ = [
    "Constant",
    "Cubic",
    "Iterative",
    "MovementSchedule",
    "OneShot",
    "Schedule",
    "Step",
    "cosine_drop_fraction",
    "get",
    "names",
]

_SCHEDULES: dict[str, Any] = {
    "constant": Constant,
    "cubic": Cubic,
    "iterative": Iterative,
    "movement": MovementSchedule,
    "one_shot": OneShot,
}


def names() -> tuple[str, ...]:
    """Returns the sorted names of all schedules."""
    return tuple(sorted(_SCHEDULES))


def get(name: str) -> Any:
    """Returns the class of a schedule.

    Raises:
        InputError: If the name is unknown; the error suggests similar names.

    >>> get("cubic")(0.9, begin=0, end=100, every=10).sparsity(100)
    0.9
    """
    check_choice(name, sorted(_SCHEDULES), "schedule")
    return _SCHEDULES[name]
