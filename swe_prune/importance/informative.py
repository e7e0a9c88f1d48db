"""Whether what a criterion reads says anything, and what an optimizer says of every tensor."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from swe_prune import select, tree
from swe_prune.errors import InputError
from swe_prune.importance.registry import Criterion
from swe_prune.importance.second_moment import moments_by_name
from swe_prune.trajectory import TrajectoryStats

_LATE = ("late_mean", "late_mean_abs")
_NEVER_UPDATED = (
    "the second moment of every prunable weight is 0, as after opt.init(params); give the state "
    "that the optimizer's updates have returned, or a criterion without 'second_moment'"
)


def check_informative(
    criterion: Criterion, stats: TrajectoryStats | None, second_moment: PyTree | None
) -> None:
    """Refuses statistics and second moments from which every weight looks the same.

    Traced values cannot be checked.

    Args:
        criterion: What is to be scored by them.
        stats: Trajectory statistics, or None.
        second_moment: Second moments of the prunable weights, None where there is none.

    Raises:
        InputError: The statistics have no snapshot, or none since their window has started, or all
            second moments are 0.
    """
    if stats is not None and criterion.measures:
        check_snapshots(stats, criterion.measures)
    if second_moment is not None and "second_moment" in criterion.needs:
        found = [leaf for _, leaf in tree.named_leaves(second_moment) if leaf is not None]
        if not select.is_traced(found) and not any(map(says, found)):
            raise InputError(_NEVER_UPDATED)


def check_snapshots(stats: TrajectoryStats, measures: tuple[str, ...]) -> None:
    """Refuses statistics that have no snapshot, or none in the window of a late mean.

    Raises:
        InputError: There is no snapshot to score by.
    """
    if not isinstance(stats.count, Tracer) and int(stats.count) == 0:
        raise InputError(
            "the statistics have no snapshot yet; call trajectory.update(stats, params) while "
            "training, or give no stats"
        )
    late = any(measure in _LATE for measure in measures)
    if late and not isinstance(stats.weight_sum, Tracer) and float(stats.weight_sum[0]) == 0:
        raise InputError(
            f"the late means start at snapshot {stats.window_start}, and the statistics end "
            f"before it; train longer, or give a smaller window_start at trajectory.init"
        )


@dataclasses.dataclass(frozen=True)
class Moments:
    """What an optimizer's state says of the prunable tensors.

    Attributes:
        found: Second moments by name, of the tensors whose moments are not all 0.
        lacking: Names of the prunable tensors that have none.
        frozen: Names of the prunable tensors whose moments are all 0.
    """

    found: dict[str, Array]
    lacking: tuple[str, ...]
    frozen: tuple[str, ...]


def moments(opt_state: PyTree, params: PyTree, prunable: PyTree) -> Moments:
    """Returns what an optimizer's state says of every prunable tensor.

    Args:
        opt_state: State of an optax chain.
        params: Pytree of weights.
        prunable: Bool pytree like `params`.

    Raises:
        InputError: The state has second moments of prunable weights, and all of them are 0.
    """
    by_name = moments_by_name(opt_state, params)
    marks = dict(tree.named_leaves(prunable))
    names = [name for name, _ in tree.named_leaves(params) if marks.get(name)]
    has = [name for name in names if name in by_name]
    found = {name: by_name[name] for name in has if says(by_name[name])}
    if has and not found:
        raise InputError(_NEVER_UPDATED)
    return Moments(
        found,
        tuple(name for name in names if name not in by_name),
        tuple(name for name in has if name not in found),
    )


def says(moment: Any) -> bool:
    """Returns whether an array has an element that is not 0."""
    return bool(_any(moment))


@jax.jit
def _any(moment: Array) -> Array:
    return jnp.any(moment != 0)
