"""When to prune and to what sparsity: pure functions of the step.

A schedule is a frozen dataclass with three methods:

    sparsity(step)   the share of weights that is gone after the update at `step`
    is_due(step)     whether masks are updated at `step`
    due_steps()      all the steps at which they are, in order

A Python or numpy integer gives an exact Python float or bool; an integer array of jax, traced or
not, gives float32 or bool of its shape, so that one compiled program serves a whole schedule.

Step t comes after t optimizer steps: an update at step 0 precedes all training, and the ramp of
`Cubic` starts at `begin` and ends at `end`. jaxpruner has the same ramp at a progress of
(t + 1 − begin) / (end − begin), one step ahead of ours.
"""

from typing import Any

from swe_prune.errors import InputError, did_you_mean
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
    """Returns the names of all the schedules, sorted."""
    return tuple(sorted(_SCHEDULES))


def get(name: str) -> Any:
    """Returns the class of a schedule.

    Raises:
        InputError: unknown name; the error lists the near ones.

    >>> get("cubic")(0.9, begin=0, end=100, every=10).sparsity(100)
    0.9
    """
    if name not in _SCHEDULES:
        raise InputError(f"unknown schedule {name!r}; {did_you_mean(name, _SCHEDULES)}")
    return _SCHEDULES[name]
