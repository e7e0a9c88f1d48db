"""Masks from scores: the paper's rule, and an exact sparsity by scope and pattern."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import allocation, counting, patterns, select, tree
from swe_prune.errors import InputError, did_you_mean
from swe_prune.masks.counts import kept_counts

_LARGEST = float(jnp.finfo(jnp.float32).max)
SCOPES = ("tensor", "global", "row")
ROUNDINGS = ("nearest", "down")
InputAxes = Callable[[str, tuple[int, ...]], tuple[int, ...]]


def by_std(scores: PyTree, rate: float | Array, *, spread: float | None = None) -> PyTree:
    """Returns the masks of the paper's rule, score > std(score) · rate in every tensor.

    The standard deviation is the unbiased one over the whole tensor. The rate is a multiplier: see
    `allocation.gaussian_sparsity` for the sparsity to expect.

    Args:
        scores: float32 pytree, None where dense.
        rate: multiple of the standard deviation, 0 or more.
        spread: compare with this instead of the tensor's std(score); 1.0 for `swe_spread`, whose
            scores come in units of their threshold (`importance.get(name).spread`).

    Raises:
        InputError: a negative or non-finite rate, NaN scores, infinite ones (which have no
            standard deviation), or a rate that keeps no weight.

    >>> by_std({"w": jnp.array([0.0, 1.0, 5.0])}, 1.0)["w"].tolist()
    [False, False, True]
    """
    if not _is_traced([rate]) and not 0 <= float(rate) <= _LARGEST:
        raise InputError(f"rate = {rate!r} is no multiple of a standard deviation; give 0 or more")
    named = _scored(scores)
    traced = _is_traced([*named.values(), rate])
    kept, nans, undefined = (_std_masks if traced else _std_masks_jit)(
        list(named.values()), jnp.asarray(rate, jnp.float32), spread
    )
    if not traced:
        select.reject_nan(list(named), nans)
        allocation.reject_no_spread(list(named), undefined)
        counts = kept_counts(dict(zip(named, kept, strict=True)))
        if not any(int(n) for n in counts.values()):
            raise InputError(f"rate = {rate!r} prunes every weight; lower it")
    return _like(scores, named, kept)


def _std_masks(
    scores: list[Array], rate: Array, spread: Any
) -> tuple[list[Array], list[Array], list[Array]]:
    spreads, nans, undefined = allocation.spreads(scores, spread)
    masks = [score > of_one * rate for score, of_one in zip(scores, spreads, strict=True)]
    return masks, nans, undefined


_std_masks_jit = jax.jit(_std_masks)


def by_sparsity(
    scores: PyTree,
    sparsity: float | Float[Array, ""] | allocation.Allocation,
    scope: str = "tensor",
    *,
    pattern: str | None = None,
    rounding: str = "nearest",
    reduce: str = "sum",
    across: str = "sum",
    couplings: Mapping[str, str] | None = None,
    input_axes: InputAxes = tree.input_axes,
) -> PyTree:
    """Returns masks that remove exactly the requested share of the lowest scores.

    With a pattern, units of weights stay or go together and the share is met in units. Sparsity
    counts what goes, n:m what stays. The count is exact: of equal scores at the threshold the
    first by flat index stay. References differ on ties: the magnitude baseline of Wanda's code
    removes everything up to the int(n · s)-th smallest, one more than asked and all its ties;
    Wanda's own stable sort removes the first of them (`blockwise.wanda_mask` does so too);
    jaxpruner's n:m ranks keep the last.

    Args:
        scores: float32 pytree, None where dense.
        sparsity: share to remove, in [0, 1); or an `allocation.Allocation`, which says how many
            weights go of each tensor. A traced share (float32, clipped to [0, 1]) does not
            recompile when it changes; with n:m it must be concrete.
        scope: where the share is met: "tensor", in each tensor; "global", over all together,
            which ranks tensors against each other; "row", in each output of a kernel, over its
            inputs (the rows of a PyTorch weight, the columns of a Flax kernel). An allocation's
            count that the rows do not divide takes one more from each of the first of them.
        pattern: None, single weights; "n:m" keeps n of every m consecutive inputs, and the
            sparsity must be 1 − n/m; "block:RxC", R inputs by C outputs; "row", all the inputs of
            an output; "column", all the outputs of an input; "neuron", a hidden unit in all its
            coupled tensors, while tensors that no coupling names stay dense.
        rounding: of the count: "nearest", halves up; "down", as Wanda and SparseGPT do.
        reduce: how a unit's scores in one tensor become one, of `patterns.REDUCTIONS`.
        across: how a neuron's become one over its tensors, of `patterns.ACROSS`.
        couplings: of neurons; None: `patterns.FEED_FORWARD`.
        input_axes: along which axes the inputs of a kernel run; the default knows Flax.

    Raises:
        InputError: sparsity outside [0, 1), an unknown name, a pattern that the shapes or the
            sparsity do not admit or that would empty a tensor, an allocation of other tensors,
            NaN scores, or no scores at all.

    >>> by_sparsity({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    for kind, name, names in (("scope", scope, SCOPES), ("rounding", rounding, ROUNDINGS)):
        if name not in names:
            raise InputError(
                f"{kind} {name!r} is none of {', '.join(names)}; {did_you_mean(name, names)}"
            )
    named = _scored(scores)
    if isinstance(sparsity, allocation.Allocation):
        _check_allocation(sparsity, named, scope)
    elif not isinstance(sparsity, Tracer):
        sparsity = _concrete(sparsity)
        allocation.check_sparsity(sparsity)
    if pattern is not None and patterns.is_n_of_m(pattern):
        return _like(scores, named, _n_of_m(named, sparsity, pattern, input_axes))
    if scope == "row":
        if pattern is not None:
            raise InputError(
                f"scope 'row' ranks the inputs of each output, which pattern {pattern!r} ties "
                "together; give scope 'tensor' or 'global'"
            )
        kept = {
            name: _by_row(name, score, sparsity, rounding, input_axes)
            for name, score in named.items()
        }
        return _like(scores, named, kept)

    def axes_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _normal_axes(name, shape, input_axes)

    units = patterns.units(
        pattern, named, axes_of, reduce=reduce, across=across, couplings=couplings
    )
    if scope == "global":
        kept_units = _global(units, sparsity, rounding)
    else:
        kept_units = [_of_units(one, sparsity, rounding) for one in units]
    kept = {}
    for one, mask in zip(units, kept_units, strict=True):
        kept |= one.spread(mask)
    return _like(scores, named, kept)


def _keep(size: int, sparsity: Any, rounding: str) -> Any:
    """Returns how many of `size` stay, as an int, or as a Count when the sparsity is traced."""
    if isinstance(sparsity, Tracer):
        gone = counting.share(size, sparsity, up=rounding == "nearest")
        return counting.count(size).minus(gone)
    return size - _gone(size, sparsity, rounding)


def _gone(size: int, sparsity: float, rounding: str) -> int:
    return int(size * sparsity) if rounding == "down" else allocation.removed_count(size, sparsity)


def _of_units(one: patterns.Units, sparsity: Any, rounding: str) -> Array:
    size = tree.size(one.score)
    if isinstance(sparsity, allocation.Allocation):
        gone = sum(sparsity.removed[name] for name in one.tensors)
        keep = size - allocation.removed_count(gone, 1 / one.weights)
    else:
        keep = _keep(size, sparsity, rounding)
    _check_some_stay(one, keep, size, sparsity)
    return select.top_k_mask(one.score, keep, name=one.name)


def _check_some_stay(one: patterns.Units, keep: Any, size: int, sparsity: Any) -> None:
    if one.weights > 1 and isinstance(keep, int) and keep <= 0 < size:
        raise InputError(
            f"{one.name!r} has {size} units of {one.weights} weights, all of which a sparsity of "
            f"{_shown(sparsity, one)} would remove; lower it or choose a finer pattern"
        )


def _shown(sparsity: Any, one: patterns.Units) -> str:
    if isinstance(sparsity, allocation.Allocation):
        return f"{sparsity.sparsities[one.tensors[0]]:g}"
    return f"{sparsity:g}"


def _global(units: list[patterns.Units], sparsity: Any, rounding: str) -> list[Array]:
    weights = {one.weights for one in units}
    if len(weights) > 1:
        told = ", ".join(f"{one.name!r} of {one.weights}" for one in units[:6])
        raise InputError(
            f"scope 'global' cannot rank units of different sizes ({told}): which share their "
            "weights make would be left to chance; give scope 'tensor' or an allocation"
        )
    size = sum(tree.size(one.score) for one in units)
    keep = _keep(size, sparsity, rounding)
    return select.top_k_masks([one.score for one in units], keep, names=[one.name for one in units])


def _by_row(name: str, score: Array, sparsity: Any, rounding: str, input_axes: InputAxes) -> Array:
    axes = _normal_axes(name, score.shape, input_axes)
    inputs = math.prod(score.shape[axis] for axis in axes)
    if isinstance(sparsity, allocation.Allocation):
        keep = _shared_out(sparsity.removed[name], score.shape, axes)
    else:
        keep = _keep(inputs, sparsity, rounding)
    return select.top_k_mask(score, keep, axes=axes, name=name)


def _shared_out(gone: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> counting.Count:
    """Returns how many stay in every row when a tensor loses so many, evenly to within one."""
    outputs = [1 if axis in axes else size for axis, size in enumerate(shape)]
    rows = math.prod(outputs)
    inputs = math.prod(shape) // max(rows, 1)
    each, more = divmod(gone, max(rows, 1))
    index = jnp.arange(rows).reshape(outputs)
    return counting.count(inputs - each - (index < more))


def _n_of_m(
    named: dict[str, Array], sparsity: Any, pattern: str, input_axes: InputAxes
) -> dict[str, Array]:
    n, m = patterns.parse_n_of_m(pattern)
    if isinstance(sparsity, Tracer | allocation.Allocation):
        what = "a traced share" if isinstance(sparsity, Tracer) else "an allocation"
        raise InputError(
            f"pattern {pattern!r} fixes the sparsity at {1 - n / m:g}, which {what} cannot change; "
            "give that number"
        )
    if abs(1 - n / m - sparsity) > 1e-6:  # a float32 share has no more digits
        raise InputError(
            f"pattern {pattern!r} keeps {n} of {m}, a sparsity of {1 - n / m:g}, not {sparsity!r}; "
            "make the two agree"
        )
    matrices, axes = {}, {}
    for name, score in named.items():
        axes[name] = _normal_axes(name, score.shape, input_axes)
        matrices[name] = patterns.as_matrix(score, axes[name])
        patterns.check_divides(name, matrices[name].shape[0], m)
    return {
        name: patterns.from_matrix(
            patterns.n_of_m_mask(matrix, n, m, name), named[name].shape, axes[name]
        )
        for name, matrix in matrices.items()
    }


def _check_allocation(given: allocation.Allocation, named: dict[str, Array], scope: str) -> None:
    if scope == "global":
        raise InputError(
            "an allocation says how much each tensor loses, which scope 'global' would overrule; "
            "give scope 'tensor' or 'row'"
        )
    sizes = {name: tree.size(score) for name, score in named.items()}
    for name in {**sizes, **given.sizes}:
        if sizes.get(name) != given.sizes.get(name):
            raise InputError(
                f"the allocation has {given.sizes.get(name)} weights for {name!r} and the scores "
                f"have {sizes.get(name)}; make it from these scores"
            )


def _concrete(sparsity: Any) -> Any:
    """Returns a number for what is one: a Python number, or a scalar array of numpy or jax."""
    return sparsity.item() if jnp.ndim(sparsity) == 0 and hasattr(sparsity, "item") else sparsity


def _normal_axes(
    name: str, shape: tuple[int, ...], input_axes: Callable[..., Any]
) -> tuple[int, ...]:
    axes = tuple(input_axes(name, shape))
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise InputError(
            f"input_axes gave {axes} for {name!r} of shape {shape}; give axes that it has"
        )
    return tuple(sorted({axis % len(shape) for axis in axes}))


def _is_traced(values: list[Any]) -> bool:
    return any(isinstance(value, Tracer) for value in values)


def _scored(scores: PyTree) -> dict[str, Array]:
    named = {name: leaf for name, leaf in tree.named_leaves(scores) if leaf is not None}
    if not named:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    return named


def _like(scores: PyTree, named: dict[str, Array], kept: Any) -> PyTree:
    by_name = kept if isinstance(kept, dict) else dict(zip(named, kept, strict=True))
    return tree.map_named(lambda name, _: by_name.get(name), scores)
