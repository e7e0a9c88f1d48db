"""A score per weight: the larger, the more it is worth keeping.

One module per family; importing them here fills the registry.
"""

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.choices import Zeros
from swe_prune.errors import InputError, check_choice
from swe_prune.importance import (
    activation,
    bezier,
    curvature,
    from_trajectory,
    gradient,
    hessian,
    magnitude,
)
from swe_prune.importance.choice import Best, best, tracked
from swe_prune.importance.informative import check_informative, check_snapshots
from swe_prune.importance.registry import MEASURED, Criterion, get, names, register
from swe_prune.importance.second_moment import check_state, has_second_moment, second_moment
from swe_prune.layout import AxesOf, InputAxes, axes_of, copies_of
from swe_prune.trajectory import BUFFERS, TrajectoryStats, read, restored

__all__ = [
    "MEASURED",
    "ZEROS",
    "Best",
    "Criterion",
    "activation",
    "best",
    "bezier",
    "check_informative",
    "check_snapshots",
    "check_state",
    "curvature",
    "from_trajectory",
    "get",
    "gradient",
    "has_second_moment",
    "hessian",
    "magnitude",
    "names",
    "register",
    "score",
    "second_moment",
    "tracked",
]


ZEROS = typing.get_args(Zeros)
"""What becomes of weights that are 0 before pruning; see `score`."""


@checked
def score(
    name: str,
    params: PyTree,
    *,
    stats: TrajectoryStats | Mapping[str, Any] | None = None,
    opt_state: PyTree | None = None,
    measured: Mapping[str, PyTree] | None = None,
    prunable: PyTree | None = None,
    seed: int = 0,
    zeros: str = "keep",
    layout: PyTree | None = None,
    input_axes: InputAxes | None = None,
    **options: Any,
) -> PyTree:
    """Returns the scores of a criterion: a float32 pytree like the parameters, None where dense.

    A pure function of its arrays; call it eagerly or inside your own jit.

    Args:
        name: Name of a criterion, one of `names()`.
        params: Pytree of weights, floating, any dtype.
        stats: Trajectory statistics, for a criterion that reads them; or the dict that a checkpoint
            library restores them to.
        opt_state: State of any optax chain, for a criterion that reads Adam's second moment.
        measured: Pytrees by need, like the parameters with None where there is nothing: what
            `calibration.inputs` and `calibration.gradients` return, or both in one mapping.
        prunable: Bool pytree; None: the weights that `stats` tracks, or without statistics
            `tree.prunable(params)`.
        seed: Seed of random draws; each tensor draws from its own stream, named by its path.
        zeros: What becomes of weights that are exactly 0 already. "keep": their score is −inf, so
            they are removed before every other weight and count in the sparsity, whatever the
            criterion; a criterion's own −inf becomes the lowest finite float. "free": they are
            scored like the others and may return while training goes on.
        layout: Pytree of `layout.Axes` like the parameters, as `layout.layout` traces it. Each
            copy of a stacked tensor is scored by itself.
        input_axes: Function from a name and a shape to the axes of a kernel's inputs, where there
            is no layout. None: Flax's convention for tensors named "…/kernel".
        **options: Options of the criterion, such as `power`.

    Raises:
        InputError: Unknown name or option, a need that was not given, or one of another shape, or
            that says nothing: statistics without a snapshot, second moments that are all 0.

    >>> score("magnitude", {"up": {"kernel": jnp.array([[1.0, -2.0]])}})["up"]["kernel"].tolist()
    [[1.0, 2.0]]
    """
    criterion = get(name)
    criterion.check_options(options)
    check_choice(zeros, ZEROS, "zeros")
    stats = None if stats is None else restored(stats)
    needed = _gather(criterion, params, stats, opt_state, measured or {})
    if prunable is not None:
        tree.check_marks(prunable, "score")
    else:
        prunable = (
            tracked(params, stats) if stats is not None else tree.prunable(params, layout=layout)
        )
    axes, copies = axes_of(layout, input_axes), copies_of(layout)

    def leaf(path: str, weight: Any, chosen: bool, *values: Any) -> Any:
        if not chosen:
            return None
        given: dict[str, Any] = dict(zip(needed, values, strict=True))
        stacked = copies(path, weight.shape)
        static: dict[str, Any] = dict(options)
        if "inputs" in criterion.needs:
            own = axes(path, weight.shape)
            static["inputs"] = own.one_copy.inputs
        for need, value in given.items():
            _check_given(name, path, weight, need, value, axes)
        if "weight" in criterion.needs:
            given["weight"] = weight.astype(jnp.float32)
        if "key" in criterion.needs:
            given["key"] = tree.named_key(jax.random.key(seed), path)
        if stacked:
            scored = _of_copies(criterion.function, weight, stacked, given, static)
        else:
            scored = criterion.function(**given, **static)
        scored = scored.astype(jnp.float32)
        return scored if zeros == "free" else _zeros_last(scored, weight)

    scores = tree.map_named(leaf, params, prunable, *needed.values())
    check_informative(criterion, stats, _of_prunable(needed.get("second_moment"), prunable))
    return scores


def _zeros_last(scores: Array, weight: Any) -> Array:
    """Returns scores that are −inf where the weight is 0, and nowhere else."""
    above = jnp.maximum(scores, jnp.finfo(jnp.float32).min)  # NaN stays NaN, to be refused
    return jnp.where((jnp.asarray(weight) == 0) & ~jnp.isnan(scores), -jnp.inf, above)


def _of_prunable(values: PyTree | None, prunable: PyTree) -> PyTree | None:
    if values is None:
        return None
    return tree.map_leaves(lambda _, chosen, value: value if chosen else None, prunable, values)


def _of_copies(
    function: Callable[..., Any],
    weight: Any,
    copies: tuple[int, ...],
    given: dict[str, Any],
    static: dict[str, Any],
) -> Any:
    """Returns the scores of a stacked tensor, of which each copy is scored by itself."""
    sizes = tuple(weight.shape[axis] for axis in copies)
    first = range(len(copies))

    def copies_first(need: str, value: Any) -> Any:
        if need == "key":
            return jax.random.split(value, sizes)
        if need != "hessian":  # which has the copies first already
            value = jnp.moveaxis(jnp.broadcast_to(value, weight.shape), copies, first)
        return value

    def mapped(given: dict[str, Any]) -> Any:
        return function(**given, **static)

    for _ in copies:
        mapped = jax.vmap(mapped)
    scored = mapped({need: copies_first(need, value) for need, value in given.items()})
    return jnp.moveaxis(scored, first, copies)


def _gather(
    criterion: Criterion,
    params: PyTree,
    stats: TrajectoryStats | None,
    opt_state: PyTree | None,
    measured: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    """Returns the pytree of every need that comes from outside the weights."""
    if criterion.measures and stats is None:
        raise InputError(
            f"criterion {criterion.name!r} needs trajectory statistics; pass stats= from "
            f"trajectory.init(params, measures={criterion.measures!r}) updated while training"
        )
    found = {m: read(stats, m) for m in criterion.measures if stats is not None}
    for need in criterion.measured:
        if need in measured:
            found[need] = measured[need]
        elif need == "second_moment" and opt_state is not None:
            found[need] = second_moment(opt_state, params)
        else:
            raise InputError(f"criterion {criterion.name!r} needs {need!r}; {MEASURED[need]}")
    return found


def _check_given(
    name: str,
    path: str,
    weight: Any,
    need: str,
    value: Any,
    axes_of: AxesOf,
) -> None:
    if value is None and need in BUFFERS:
        raise InputError(
            f"{path!r} is prunable but {need!r} was not tracked for it; pass the same "
            "prunable= to trajectory.init and importance.score"
        )
    if value is None:
        raise InputError(
            f"criterion {name!r} needs {need!r}, which was not measured for {path!r}; "
            f"{MEASURED[need]}, with the same prunable="
        )
    if need == "hessian":
        axes = axes_of(path, weight.shape)
        inputs = math.prod(weight.shape[axis] for axis in axes.inputs)
        copies = tuple(weight.shape[axis] for axis in axes.copies)
        fits, wanted = value.shape == (*copies, inputs, inputs), f"{inputs} inputs"
    else:
        # An input norm spreads over the outputs; a statistic belongs to one weight each.
        same = value.shape == weight.shape
        fits = same or (need not in BUFFERS and _spreads(value.shape, weight.shape))
        wanted = f"the shape {weight.shape}"
    if not fits:
        raise InputError(
            f"{need!r} of {path!r} has shape {value.shape} and the weight {wanted}; measure it on "
            "these parameters, and pass the same layout="
        )


def _spreads(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    """Returns whether an array can be multiplied with one of another shape and leave it so."""
    try:
        return jnp.broadcast_shapes(shape, onto) == onto
    except ValueError:
        return False
