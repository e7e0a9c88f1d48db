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
from swe_prune.masks import removed
from swe_prune.masks import ties as undecided
from swe_prune.masks.counts import kept_counts

_LARGEST = float(jnp.finfo(jnp.float32).max)
SCOPES = ("tensor", "global", "row")
ROUNDINGS = ("nearest", "down")
InputAxes = Callable[[str, tuple[int, ...]], tuple[int, ...]]


def by_std(scores: PyTree, rate: float | Array, *, spread: float | None = None) -> PyTree:
    """Returns masks by the paper's rule, score > std(score) · rate in every tensor.

    The standard deviation is the unbiased one over the whole tensor, in which a weight that is
    removed already (a score of −inf, as `importance.score` gives it to a weight that is 0) counts
    as 0. The rate is a multiplier: see
    `allocation.gaussian_sparsity` for the sparsity to expect.

    Args:
        scores: Float32 pytree, None where dense.
        rate: Multiple of the standard deviation, 0 or more.
        spread: Value to use in place of the tensor's std(score); 1.0 for `swe_spread`, whose
            scores are in units of their threshold (`importance.get(name).spread`).

    Raises:
        InputError: The rate is negative, not finite or removes every weight, or a score is NaN or
            +inf, which leaves no standard deviation.

    >>> by_std({"w": jnp.array([0.0, 1.0, 5.0])}, 1.0)["w"].tolist()
    [False, False, True]
    """
    if not select.is_traced(rate) and not 0 <= float(rate) <= _LARGEST:
        raise InputError(f"rate = {rate!r} is no multiple of a standard deviation; give 0 or more")
    named = _scored(scores)
    traced = select.is_traced(list(named.values()), rate)
    kept, nans, undefined = (_std_masks if traced else _std_masks_jit)(
        list(named.values()), jnp.asarray(rate, jnp.float32), spread
    )
    if not traced:
        select.reject_nan(list(named), nans)
        allocation.reject_no_spread(list(named), undefined)
        counts = kept_counts(dict(zip(named, kept, strict=True)))
        if not any(int(n) for n in counts.values()):
            raise InputError(f"rate = {rate!r} prunes every weight; lower it")
        undecided.warn(named, dict(zip(named, kept, strict=True)), ranked=False)
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
    ties: str = "first",
    reduce: str = "sum",
    across: str = "sum",
    couplings: Mapping[str, str] | None = None,
    input_axes: InputAxes = tree.input_axes,
) -> PyTree:
    """Returns masks that remove exactly the requested share of the lowest scores.

    A score of −inf says that a weight is removed already, as `importance.score` says of one that
    is 0. Such weights go whatever the sparsity, and count in it first; a sparsity below theirs
    removes them alone. A unit of a pattern counts as removed when all its weights are; else they
    add nothing to its score.

    With a pattern, weights are removed in units and the sparsity is met in units. Sparsity is the
    share removed, while n:m names the number kept. The count is exact, also when scores tie.

    The reference implementations count differently. Wanda and SparseGPT remove int(n · s) weights
    of each output, and Wanda's stable sort removes the first of equal scores: `rounding="down"`
    and `ties="last"` repeat that. The magnitude baseline in Wanda's code removes everything up to
    the int(n · s)-th smallest, one more than requested and all its ties. jaxpruner's n:m keeps the
    last of equal scores.

    Args:
        scores: Float32 pytree, None where dense.
        sparsity: Share to remove, in [0, 1), or an `allocation.Allocation` with the number to
            remove from each tensor. A traced share (float32, clipped to [0, 1]) does not
            recompile when it changes; with n:m it must be concrete.
        scope: Set of weights that meets the sparsity and is ranked together: "tensor", each
            tensor; "global", all tensors; "row", the inputs of each output of a kernel (the rows
            of a PyTorch weight, the columns of a Flax kernel). If an allocation's count is not
            divisible by the number of rows, each of the first rows loses one weight more.
        pattern: Units in which weights are removed. None, single weights; "n:m" keeps n of every
            m consecutive inputs, and the sparsity must be 1 − n/m; "block:RxC", R inputs by C
            outputs; "row", all the inputs of an output; "column", all the outputs of an input;
            "neuron", a hidden unit in all its coupled tensors, where tensors without a coupling
            stay dense.
        rounding: Rounding of the number of weights to remove: "nearest", halves up, or "down".
        ties: Which of equal scores at the threshold are kept, "first" or "last" by flat index.
        reduce: Reduction of a unit's scores within one tensor, one of `patterns.REDUCTIONS`.
        across: Reduction of a neuron's scores over its tensors, one of `patterns.ACROSS`.
        couplings: Couplings of neurons; None means `patterns.FEED_FORWARD`.
        input_axes: Function from a name and a shape to the axes of a kernel's inputs; the default
            knows Flax.

    Raises:
        InputError: The sparsity is outside [0, 1), a name is unknown, the pattern does not fit
            the shapes or the sparsity or would empty a tensor, the allocation is for other
            tensors, a score is NaN, or there are no scores.

    >>> by_sparsity({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    for kind, name, names in (("scope", scope, SCOPES), ("rounding", rounding, ROUNDINGS)):
        if name not in names:
            raise InputError(
                f"{kind} {name!r} is none of {', '.join(names)}; {did_you_mean(name, names)}"
            )
    select.check_ties(ties)
    named = _scored(scores)
    if isinstance(sparsity, allocation.Allocation):
        _check_allocation(sparsity, named, scope)
    elif not isinstance(sparsity, Tracer):
        sparsity = _concrete(sparsity)
        allocation.check_sparsity(sparsity)

    def axes_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _normal_axes(name, shape, input_axes)

    # n:m and rows rank the inputs of each output, so they need the axes, not units.
    if pattern is not None and patterns.is_n_of_m(pattern):
        return _like(scores, named, _n_of_m(named, sparsity, pattern, ties, input_axes), "n:m")
    if scope == "row":
        if pattern is not None:
            raise InputError(
                f"scope 'row' ranks the inputs of each output, which pattern {pattern!r} ties "
                "together; give scope 'tensor' or 'global'"
            )
        kept = {
            name: _by_row(name, score, sparsity, rounding, ties, input_axes)
            for name, score in named.items()
        }
        return _like(scores, named, kept, "row", lambda name: axes_of(name, named[name].shape))

    # Everything else is ranked in units, of one weight each without a pattern.
    units = removed.units_with_removed_last(
        pattern, named, axes_of, reduce=reduce, across=across, couplings=couplings
    )
    if scope == "global":
        kept_units = _global(units, sparsity, rounding, ties)
    else:
        kept_units = [_of_units(one, sparsity, rounding, ties) for one in units]
    # Each weight gets the fate of its unit.
    kept = {}
    for one, mask in zip(units, kept_units, strict=True):
        kept |= one.spread(mask)
    return _like(scores, named, kept, "units" if pattern else scope)


def _keep(size: int, sparsity: Any, rounding: str) -> Any:
    """Returns how many of `size` stay, as an int, or as a Count when the sparsity is traced."""
    if isinstance(sparsity, Tracer):
        gone = counting.share(size, sparsity, up=rounding == "nearest")
        return counting.count(size).minus(gone)
    return size - _gone(size, sparsity, rounding)


def _gone(size: int, sparsity: float, rounding: str) -> int:
    return int(size * sparsity) if rounding == "down" else allocation.removed_count(size, sparsity)


def _of_units(one: patterns.Units, sparsity: Any, rounding: str, ties: str) -> Array:
    size = tree.size(one.score)
    if isinstance(sparsity, allocation.Allocation):
        gone = sum(sparsity.removed[name] for name in one.tensors)
        keep = size - allocation.removed_count(gone, 1 / one.weights)
    else:
        keep = _keep(size, sparsity, rounding)
    _check_some_stay(one, keep, size, sparsity)
    return select.top_k_mask(one.score, keep, ties=ties, name=one.name)


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


def _global(units: list[patterns.Units], sparsity: Any, rounding: str, ties: str) -> list[Array]:
    weights = {one.weights for one in units}
    if len(weights) > 1:
        told = ", ".join(f"{one.name!r} of {one.weights}" for one in units[:6])
        raise InputError(
            f"scope 'global' cannot rank units of different sizes ({told}): which share their "
            "weights make would be left to chance; give scope 'tensor' or an allocation"
        )
    size = sum(tree.size(one.score) for one in units)
    keep = _keep(size, sparsity, rounding)
    names = [one.name for one in units]
    return select.top_k_masks([one.score for one in units], keep, ties=ties, names=names)


def _by_row(
    name: str, score: Array, sparsity: Any, rounding: str, ties: str, input_axes: InputAxes
) -> Array:
    axes = _normal_axes(name, score.shape, input_axes)
    inputs = math.prod(score.shape[axis] for axis in axes)
    if isinstance(sparsity, allocation.Allocation):
        keep = _shared_out(sparsity.removed[name], score.shape, axes)
    else:
        keep = _keep(inputs, sparsity, rounding)
    return select.top_k_mask(score, keep, axes=axes, ties=ties, name=name)


def _shared_out(gone: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> counting.Count:
    """Returns how many stay in every row when a tensor loses so many, evenly to within one."""
    outputs = [1 if axis in axes else size for axis, size in enumerate(shape)]
    rows = math.prod(outputs)
    inputs = math.prod(shape) // max(rows, 1)
    each, more = divmod(gone, max(rows, 1))
    index = jnp.arange(rows).reshape(outputs)
    return counting.count(inputs - each - (index < more))


def _n_of_m(
    named: dict[str, Array], sparsity: Any, pattern: str, ties: str, input_axes: InputAxes
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
        matrices[name] = _flipped(patterns.as_matrix(score, axes[name]), ties)
        patterns.check_divides(name, matrices[name].shape[0], m)
    return {
        name: patterns.from_matrix(
            _flipped(patterns.n_of_m_mask(matrix, n, m, name), ties), named[name].shape, axes[name]
        )
        for name, matrix in matrices.items()
    }


def _flipped(matrix_RxC: Array, ties: str) -> Array:
    """Returns the matrix with its inputs in reverse if the last of ties are to be kept."""
    return matrix_RxC[::-1] if ties == "last" else matrix_RxC


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


def _scored(scores: PyTree) -> dict[str, Array]:
    named = {name: leaf for name, leaf in tree.named_leaves(scores) if leaf is not None}
    if not named:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    return named


def _like(
    scores: PyTree,
    named: dict[str, Array],
    kept: Any,
    ranked: str = "",
    axes: Callable[[str], tuple[int, ...] | None] = lambda name: None,
) -> PyTree:
    """Returns masks like the scores, and warns where the scores have not decided them.

    Args:
        scores: Pytree of scores, None where dense.
        named: Scores by name.
        kept: Masks by name, or in the order of the names.
        ranked: Scope of the ranks of single weights, or another word. Empty: nothing to check.
        axes: Function from a name to the axes of a rank, for "row".
    """
    by_name = kept if isinstance(kept, dict) else dict(zip(named, kept, strict=True))
    by_name = removed.without_removed(named, by_name)
    if ranked and not select.is_traced(named, by_name):
        undecided.warn(
            named, by_name, axes=axes, together=ranked == "global", ranked=ranked in SCOPES
        )
    return tree.map_named(lambda name, _: by_name.get(name), scores)
