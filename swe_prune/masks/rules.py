"""Masks from scores: the paper's rule, and an exact sparsity by scope and pattern."""

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import allocation, counting, patterns, select, tree
from swe_prune.arguments import checked
from swe_prune.bounds import NOT_NEGATIVE
from swe_prune.choices import Scope
from swe_prune.errors import InputError, check_choice, listed
from swe_prune.layout import Axes, AxesOf, InputAxes, axes_of, copies_of, copy_labels
from swe_prune.masks import removed
from swe_prune.masks import ties as undecided
from swe_prune.masks.counts import kept_counts

CopiesOf = Callable[[str, tuple[int, ...]], tuple[int, ...]]
SCOPES = typing.get_args(Scope)
ROUNDINGS = ("nearest", "down")


@checked
def by_std(
    scores: PyTree,
    rate: float | Array,
    *,
    spread: float | None = None,
    layout: PyTree | None = None,
) -> PyTree:
    """Returns masks by the paper's rule, score > std(score) · rate in every tensor.

    The standard deviation is the unbiased one over the whole tensor, or over each copy of a tensor
    that is stacked; a weight that is removed already (a score of −inf, as `importance.score` gives
    it to a weight that is 0) counts as 0. The rate is a multiplier: see
    `allocation.gaussian_sparsity` for the sparsity to expect.

    Args:
        scores: Float32 pytree, None where dense.
        rate: Multiple of the standard deviation, 0 or more.
        spread: Value to use in place of the tensor's std(score); 1.0 for `swe_spread`, whose
            scores are in units of their threshold (`importance.get(name).spread`).
        layout: Pytree of `layout.Axes` like the scores, for tensors that are stacked.

    Raises:
        InputError: The rate is negative, not finite or removes every weight, or a score is NaN or
            +inf, which leaves no standard deviation.

    >>> by_std({"w": jnp.array([0.0, 1.0, 5.0])}, 1.0)["w"].tolist()
    [False, False, True]
    """
    if not select.is_traced(rate):
        NOT_NEGATIVE.check(rate, "rate")
    named = _scored(scores)
    traced = select.is_traced(list(named.values()), rate)
    copies = copies_of(layout)
    stacked = tuple(copies(name, score.shape) for name, score in named.items())
    kept, nans, undefined = (_std_masks if traced else _std_masks_jit)(
        list(named.values()), jnp.asarray(rate, jnp.float32), spread, stacked
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
    scores: list[Array], rate: Array, spread: Any, copies: tuple[tuple[int, ...], ...]
) -> tuple[list[Array], list[Array], list[Array]]:
    spreads, nans, undefined = allocation.spreads(scores, spread, copies)
    masks = [score > of_one * rate for score, of_one in zip(scores, spreads, strict=True)]
    return masks, nans, undefined


_std_masks_jit = jax.jit(_std_masks, static_argnums=3)


@checked
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
    max_sparsity: float | None = None,
    layout: PyTree | None = None,
    input_axes: InputAxes | None = None,
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
        max_sparsity: With scope "global", the largest share that any tensor loses, in (0, 1]: its
            best weights stay whatever the others score. None: a tensor may lose everything.
        layout: Pytree of `layout.Axes` like the scores, as `layout.layout` traces it: which axes
            of each tensor are inputs, outputs, and copies. Each copy (a layer of a scan, an
            expert) is a tensor of its own in every scope but "global".
        input_axes: Function from a name and a shape to the axes of a kernel's inputs, where there
            is no layout. None: Flax's convention for tensors named "…/kernel", and an error for
            others where inputs matter: scope "row" and all patterns.

    Raises:
        InputError: The sparsity is outside [0, 1), a name is unknown, the pattern does not fit
            the shapes or the sparsity or would empty a tensor, the inputs of a tensor are needed
            and not known, the allocation is for other tensors, a score is NaN, or there are no
            scores.

    >>> by_sparsity({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    check_choice(scope, SCOPES, "scope")
    check_choice(rounding, ROUNDINGS, "rounding")
    check_choice(ties, select.TIES, "ties")
    if max_sparsity is not None and scope != "global":
        raise InputError(
            f"max_sparsity is for scope 'global', where tensors lose different shares, got scope "
            f"{scope!r}; leave it out"
        )
    named = _scored(scores)
    axes, copies = axes_of(layout, input_axes), copies_of(layout)
    if isinstance(sparsity, allocation.Allocation):
        _check_allocation(sparsity, named, scope, copies)
    elif not isinstance(sparsity, Tracer):
        sparsity = _concrete(sparsity)
        allocation.check_sparsity(sparsity)
    # n:m and rows rank the inputs of each output, so they need the axes, not units.
    if pattern is not None and patterns.is_n_of_m(pattern):
        return _like(scores, named, _n_of_m(named, sparsity, pattern, ties, axes), "n:m")
    if scope == "row":
        if pattern is not None:
            raise InputError(
                f"scope 'row' ranks the inputs of each output, which pattern {pattern!r} ties "
                "together; give scope 'tensor' or 'global'"
            )
        kept = {
            name: _by_row(name, score, sparsity, rounding, ties, axes)
            for name, score in named.items()
        }
        return _like(scores, named, kept, "row", lambda name: axes(name, named[name].shape).inputs)
    # Everything else is ranked in units, of one weight each without a pattern.
    units = removed.units_with_removed_last(
        pattern,
        named,
        axes,
        copies_of=copies,
        reduce=reduce,
        across=across,
        couplings=couplings,
    )
    if scope == "global":
        kept_units = _global(units, sparsity, rounding, ties, max_sparsity)
    else:
        kept_units = _each(units, sparsity, rounding, ties, copies, named)
    # Each weight gets the fate of its unit.
    kept = {}
    for one, mask in zip(units, kept_units, strict=True):
        kept |= one.spread(mask)

    def ranked_axes(name: str) -> tuple[int, ...] | None:
        stacked = copies(name, named[name].shape)
        if not stacked or scope == "global":
            return None
        return tuple(axis for axis in range(named[name].ndim) if axis not in stacked)

    return _like(scores, named, kept, "units" if pattern else scope, ranked_axes)


def _keep(size: int, sparsity: Any, rounding: str) -> Any:
    """Returns how many of `size` stay, as an int, or as a Count when the sparsity is traced."""
    if isinstance(sparsity, Tracer):
        gone = counting.share(size, sparsity, up=rounding == "nearest")
        return counting.count(size).minus(gone)
    return size - _gone(size, sparsity, rounding)


def _gone(size: int, sparsity: float, rounding: str) -> int:
    return int(size * sparsity) if rounding == "down" else allocation.removed_count(size, sparsity)


def _each(
    units: list[patterns.Units],
    sparsity: Any,
    rounding: str,
    ties: str,
    copies: CopiesOf,
    named: Mapping[str, Array],
) -> list[Array]:
    """Returns the unit masks of each tensor or group of tensors, ranked within each copy."""
    keep = [_kept_units(one, sparsity, rounding, copies, named) for one in units]
    whole = [at for at, one in enumerate(units) if not one.copies]
    found = dict(
        zip(
            whole,
            select.top_k_mask_each(
                [units[at].score for at in whole],
                [keep[at] for at in whole],
                ties=ties,
                names=[units[at].name for at in whole],
            ),
            strict=True,
        )
    )
    for at, one in enumerate(units):
        if one.copies:
            axes = tuple(axis for axis in range(one.score.ndim) if axis not in one.copies)
            found[at] = select.top_k_mask(one.score, keep[at], axes=axes, ties=ties, name=one.name)
    return [found[at] for at in range(len(units))]


def _kept_units(
    one: patterns.Units,
    sparsity: Any,
    rounding: str,
    copies: CopiesOf,
    named: Mapping[str, Array],
) -> Any:
    """Returns how many units of a tensor, or of each of its copies, stay."""
    ranked = tuple(axis for axis in range(one.score.ndim) if axis not in one.copies)
    size = math.prod(one.score.shape[axis] for axis in ranked)
    if isinstance(sparsity, allocation.Allocation):
        gone = _removed_units(one, sparsity, copies, named)
        keep: Any = [size - n for n in gone]
        for n in keep:
            _check_some_stay(one, n, size, sparsity)
        if one.copies:
            along = [n if a in one.copies else 1 for a, n in enumerate(one.score.shape)]
            keep = counting.count(jnp.asarray(keep, jnp.int32).reshape(along))
        else:
            keep = keep[0]
    else:
        keep = _keep(size, sparsity, rounding)
        _check_some_stay(one, keep, size, sparsity)
    return keep


def _removed_units(
    one: patterns.Units,
    given: allocation.Allocation,
    copies: CopiesOf,
    named: Mapping[str, Array],
) -> list[int]:
    """Returns the number of units that each copy loses, in the order of the copies."""
    labels = [_labels(name, named[name].shape, copies) for name in one.tensors]
    return [
        allocation.removed_count(sum(given.removed[label] for label in of_copy), 1 / one.weights)
        for of_copy in zip(*labels, strict=True)
    ]


def _labels(name: str, shape: tuple[int, ...], copies: CopiesOf) -> list[str]:
    """Returns the names of a tensor's copies in an allocation, or its own name."""
    axes = copies(name, shape)
    return [label for _, label in copy_labels(name, shape, axes)] if axes else [name]


def _check_some_stay(one: patterns.Units, keep: Any, size: int, sparsity: Any) -> None:
    if one.weights > 1 and isinstance(keep, int) and keep <= 0 < size:
        raise InputError(
            f"{one.name!r} has {size} units of {one.weights} weights, all of which a sparsity of "
            f"{_shown(sparsity, one)} would remove; lower it or choose a finer pattern"
        )


def _shown(sparsity: Any, one: patterns.Units) -> str:
    if isinstance(sparsity, allocation.Allocation):
        return f"{sparsity.sparsity:g} in all"
    return f"{sparsity:g}"


def _global(
    units: list[patterns.Units],
    sparsity: Any,
    rounding: str,
    ties: str,
    max_sparsity: float | None,
) -> list[Array]:
    weights = {one.weights for one in units}
    if len(weights) > 1:
        told = listed((f"{one.name!r} of {one.weights}" for one in units), 6, str)
        raise InputError(
            f"scope 'global' cannot rank units of different sizes ({told}): which share their "
            "weights make would be left to chance; give scope 'tensor' or an allocation"
        )
    size = sum(tree.size(one.score) for one in units)
    keep = _keep(size, sparsity, rounding)
    names, scores = [one.name for one in units], [one.score for one in units]
    if max_sparsity is None:
        return select.top_k_masks(scores, keep, ties=ties, names=names)
    # Each copy of a stacked tensor has its own smallest number.
    axes = [
        tuple(a for a in range(one.score.ndim) if a not in one.copies) if one.copies else None
        for one in units
    ]
    sizes = [
        tree.size(score) if along is None else math.prod(score.shape[a] for a in along)
        for score, along in zip(scores, axes, strict=True)
    ]
    least = [allocation.least_kept(size, max_sparsity) for size in sizes]
    copies = [tree.size(score) // n for score, n in zip(scores, sizes, strict=True)]
    total = sum(n * times for n, times in zip(least, copies, strict=True))
    allocation.check_room(size, keep, total, max_sparsity)
    return select.top_k_masks_of_each(scores, keep, least, axes=axes, ties=ties, names=names)


def _by_row(
    name: str, score: Array, sparsity: Any, rounding: str, ties: str, axes_of: AxesOf
) -> Array:
    axes = axes_of(name, score.shape)
    inputs = math.prod(score.shape[axis] for axis in axes.inputs)
    if isinstance(sparsity, allocation.Allocation):
        labels = _labels(name, score.shape, lambda name, shape: axes.copies)
        keep = _shared_out([sparsity.removed[label] for label in labels], score.shape, axes)
    else:
        keep = _keep(inputs, sparsity, rounding)
    return select.top_k_mask(score, keep, axes=axes.inputs, ties=ties, name=name)


def _shared_out(gone: list[int], shape: tuple[int, ...], axes: Axes) -> counting.Count:
    """Returns how many stay in every row when each copy loses so many, evenly to within one."""
    outputs = [shape[axis] if axis in axes.outputs else 1 for axis in range(len(shape))]
    stacked = [shape[axis] if axis in axes.copies else 1 for axis in range(len(shape))]
    rows = max(math.prod(outputs), 1)
    inputs = math.prod(shape[axis] for axis in axes.inputs)
    each = jnp.asarray([n // rows for n in gone], jnp.int32).reshape(stacked)
    more = jnp.asarray([n % rows for n in gone], jnp.int32).reshape(stacked)
    index = jnp.arange(math.prod(outputs)).reshape(outputs)
    return counting.count(inputs - each - (index < more))


def _n_of_m(
    named: dict[str, Array], sparsity: Any, pattern: str, ties: str, axes_of: AxesOf
) -> dict[str, Array]:
    n, m = patterns.parse_n_of_m(pattern)
    if isinstance(sparsity, Tracer | allocation.Allocation):
        what = "a traced share" if isinstance(sparsity, Tracer) else "an allocation"
        raise InputError(
            f"pattern {pattern!r} fixes the sparsity at {1 - n / m:g}, which {what} cannot change; "
            "give that number"
        )
    patterns.check_agrees(pattern, sparsity)
    matrices, axes = {}, {}
    for name, score in named.items():
        axes[name] = axes_of(name, score.shape)
        matrices[name] = _flipped(patterns.as_matrix(score, axes[name]), ties)
        patterns.check_divides(name, matrices[name].shape[-2], m)
    return {
        name: patterns.from_matrix(
            _flipped(patterns.n_of_m_mask(matrix, n, m, name), ties), named[name].shape, axes[name]
        )
        for name, matrix in matrices.items()
    }


def _flipped(matrix_RxC: Array, ties: str) -> Array:
    """Returns the matrix with its inputs in reverse if the last of ties are to be kept."""
    return matrix_RxC[..., ::-1, :] if ties == "last" else matrix_RxC


def _check_allocation(
    given: allocation.Allocation, named: dict[str, Array], scope: str, copies: CopiesOf
) -> None:
    if scope == "global":
        raise InputError(
            "an allocation says how much each tensor loses, which scope 'global' would overrule; "
            "give scope 'tensor' or 'row'"
        )
    sizes = {}
    for name, score in named.items():
        labels = _labels(name, score.shape, copies)
        sizes |= dict.fromkeys(labels, tree.size(score) // max(len(labels), 1))
    for name in {**sizes, **given.sizes}:
        if sizes.get(name) != given.sizes.get(name):
            raise InputError(
                f"the allocation has {given.sizes.get(name)} weights for {name!r} and the scores "
                f"have {sizes.get(name)}; make it from these scores, with the same layout="
            )


def _concrete(sparsity: Any) -> Any:
    """Returns a number for what is one: a Python number, or a scalar array of numpy or jax."""
    scalar = getattr(sparsity, "ndim", None) == 0 and hasattr(sparsity, "item")
    return sparsity.item() if scalar else sparsity


def _scored(scores: PyTree) -> dict[str, Array]:
    named = tree.present(scores)
    if not named:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    select.check_floats(list(named.values()))
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
