"""The best criterion that statistics and an optimizer's state allow, tensor by tensor."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.choices import Scope
from swe_prune.errors import listed
from swe_prune.importance.informative import Moments, moments
from swe_prune.importance.second_moment import has_second_moment
from swe_prune.trajectory import TrajectoryStats

_NO_BETTER = "and without curvature nothing does reliably better"


@dataclasses.dataclass(frozen=True)
class Best:
    """A criterion for all tensors.

    Attributes:
        criterion: Name of the criterion.
        why: Reason for it, in words.
        scope: Scope that its scores need, or the one that was asked for.
        measured: What the criterion reads in place of what the optimizer lacks.
        options: Options of the criterion.
    """

    criterion: str
    why: str
    scope: Scope | None
    measured: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def best(
    params: PyTree,
    opt_state: PyTree | None,
    stats: TrajectoryStats | None,
    prunable: PyTree | None = None,
    *,
    scope: Scope | None = None,
    measured: Iterable[str] = (),
) -> Best:
    """Returns the criterion for what is given.

    Where an optimizer has a second moment of some tensors only, the others get a constant in its
    place: w² v^power then ranks them as `magnitude` or `forecast` does. Scores with a moment and
    with a constant are in different units, so they are never ranked together: the scope is
    "tensor", and if "global" was asked for, every tensor is ranked by its magnitude.

    Args:
        params: Pytree of weights.
        opt_state: State of the optimizer, or None.
        stats: Trajectory statistics, or None.
        prunable: Bool pytree. None: the weights that `stats` tracks, or `tree.prunable(params)`.
        scope: Scope that was asked for, or None.
        measured: Names of what was measured on calibration data. With "gradient_square" `fisher`
            takes the place of `magnitude` where no optimizer has the curvature.

    Raises:
        InputError: All second moments of the prunable weights are 0.
    """
    if opt_state is None:
        return _without_optimizer("no optimizer state", scope, measured)
    has_mean = stats is not None and "late_mean" in stats.measures
    if prunable is None:
        prunable = tree.prunable(params) if stats is None else tracked(params, stats)
    found = moments(opt_state, params, prunable)
    if not found.found:
        lacks = "an optimizer without a second moment"
        if has_second_moment(opt_state, params):
            lacks += f" of the prunable weights ({listed(found.lacking, form=tree.short)})"
        else:
            lacks += ", or with one still the same for every weight"
        return _without_optimizer(lacks, scope, measured)
    missing = _told(found)
    has = "it has the optimizer's second moment, but no late mean"
    if has_mean:
        has = "it has the late mean and the optimizer's second moment"
    if missing and scope == "global":
        why = f"{missing}, and only scores of one kind can be ranked together"
        return Best("magnitude", why, scope)
    criterion = "forecast_curvature" if has_mean else "magnitude_curvature"
    if not missing:
        return Best(criterion, has, scope)
    filled = tree.map_named(
        lambda name, weight, mark: (
            found.found.get(name, jnp.ones(weight.shape, jnp.float32)) if mark else None
        ),
        params,
        prunable,
    )
    why = (
        f"{has}; {missing}, so these rank by {'forecast' if has_mean else 'magnitude'!r}, and "
        "every tensor is ranked by itself"
    )
    return Best(criterion, why, scope or "tensor", {"second_moment": filled})


def _without_optimizer(lacks: str, scope: Scope | None, measured: Iterable[str]) -> Best:
    """Returns the criterion where no optimizer has the curvature."""
    if "gradient_square" not in measured:
        return Best("magnitude", f"it has {lacks}, {_NO_BETTER}", scope)
    why = f"it has {lacks}, and the gradients of the loss on the batches have the curvature"
    return Best("fisher", why, scope, options={"power": 0.5})


def tracked(params: PyTree, stats: TrajectoryStats) -> PyTree:
    """Returns a bool pytree like the parameters, True where the statistics track a weight."""
    buffer = next(iter(stats.buffers.values()))
    return tree.map_named(lambda _, weight, kept: kept is not None, params, buffer)


def _told(found: Moments) -> str:
    told = []
    if found.lacking:
        told.append(f"there is no second moment of {listed(found.lacking, form=tree.short)}")
    if found.frozen:
        frozen = listed(found.frozen, form=tree.short)
        told.append(f"that of {frozen} is all 0, as of frozen weights")
    return " and ".join(told)
