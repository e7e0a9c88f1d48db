"""Exact selection of the k largest elements by radix selection on the float bits.

The bits of an IEEE float, with the sign folded in, order like unsigned integers. The k-th largest
is therefore found from its highest bit down: a bit is set if at least k elements reach the
candidate. Each pass only compares and sums, so selecting from a sharded array all-reduces one
scalar per candidate: no sort, no gather, no histogram. Ties at the threshold are broken by a second
search of the same kind over the flat index, which is skipped if no tie is cut. A pass reads each
score once; the search stops as soon as the count is exact.

Threshold selection by bit-wise counting is standard on GPUs (radix select; Alabi, Blanchard,
Gordon, Steinbach, "Fast k-selection algorithms for graphics processing units", 2012).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from swe_prune import counting, radix, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.radix import sortable_bits as sortable_bits

TIES = ("first", "last")
"""Which of equal elements at the threshold are kept."""


@checked
def top_k_mask(
    x: Float[Array, "..."],
    k: int | Int[Array, ""] | counting.Count,
    *,
    axes: tuple[int, ...] | None = None,
    ties: str = "first",
    name: str = "scores",
) -> Bool[Array, "..."]:
    """Returns a mask of `x.shape` with exactly k True, at the k largest elements.

    Ties are broken by flat index. −0 and +0 tie; +inf and −inf are
    ordinary values.

    Args:
        x: Array of fewer than 2^32 floats.
        k: Number of elements to retain, 0 ≤ k ≤ number of elements. A traced k or a
            `counting.Count` is clipped to that range; with `axes` a `Count` may hold one number
            per slice.
        axes: Axes of the slices to select k elements from each. If None, selects from all of `x`.
        ties: Which of equal elements are retained at the threshold, "first" or "last" by flat
            index.
        name: Name of the array in error messages.

    Raises:
        InputError: If k is out of range, `ties` is unknown, or `x` contains NaN. Neither k nor NaN
            is detected while tracing, where NaN counts as the smallest value.

    >>> top_k_mask(jnp.array([1.0, 3.0, 3.0, 2.0]), 1).tolist()
    [False, True, False, False]
    """
    check_floats([x])
    if axes is not None:
        axes = tuple(sorted({axis % x.ndim for axis in axes}))
    slice_size = tree.size(x) if axes is None else math.prod(x.shape[a] for a in axes)
    check_k(k, slice_size)
    # Traced values cannot be checked; concrete ones are checked in the same program.
    check_choice(ties, TIES, "ties")
    if is_traced(x, k):
        return _select([x], _count_of(k), axes, ties)[0]
    shards = radix.shards_of([x]) if axes is None else None
    if shards is not None:
        return _over_shards(shards, [x], [k], (0,), ties, [name])[0]
    masks, nans = _checked_select([x], _count_of(k), axes, ties)
    reject_nan([name], nans)
    return masks[0]


@checked
def top_k_mask_each(
    xs: Sequence[Float[Array, "..."]],
    ks: Sequence[int | Int[Array, ""] | counting.Count],
    *,
    ties: str = "first",
    names: Sequence[str] | None = None,
) -> list[Bool[Array, "..."]]:
    """Returns `top_k_mask` of each array, with the collectives of all of them together.

    Args:
        xs: Arrays of fewer than 2^32 floats each.
        ks: Number of elements to retain of each.
        ties: Which of equal elements are retained at the threshold, "first" or "last".
        names: Names of the arrays in error messages.

    Raises:
        InputError: Errors of `top_k_mask`.

    >>> masks = top_k_mask_each([jnp.array([5.0, 4.0]), jnp.array([2.0, 3.0])], [1, 1])
    >>> [mask.tolist() for mask in masks]
    [[True, False], [False, True]]
    """
    called = names or [f"scores[{i}]" for i in range(len(xs))]
    shards = None if is_traced(xs, ks) else radix.shards_of(xs)
    if shards is None:
        return [
            top_k_mask(x, k, ties=ties, name=name)
            for x, k, name in zip(xs, ks, called, strict=True)
        ]
    check_floats(xs)
    check_choice(ties, TIES, "ties")
    for x, k in zip(xs, ks, strict=True):
        check_k(k, tree.size(x))
    return _over_shards(shards, _alike(xs), ks, tuple(range(len(xs))), ties, called)


@checked
def top_k_masks(
    xs: Sequence[Float[Array, "..."]],
    k: int | Int[Array, ""] | counting.Count,
    *,
    ties: str = "first",
    names: Sequence[str] | None = None,
) -> list[Bool[Array, "..."]]:
    """Returns one mask per array with exactly k True over all the masks together.

    Ties are broken by the order of the arrays, then by flat index; see `top_k_mask`.

    Args:
        xs: At most 2^16 float arrays of any shapes, each of fewer than 2^32 elements.
        k: Total number of elements to retain, below 2^48.
        ties: Which of equal elements are retained at the threshold, "first" or "last".
        names: Names of the arrays in error messages.

    Raises:
        InputError: If k is out of range, or an array contains NaN. Neither is detected while
            tracing, where NaN counts as the smallest value.
    """
    xs = list(xs)  # of a stacked array its rows
    check_k(k, tree.size(list(xs)))
    check_floats(xs)
    check_choice(ties, TIES, "ties")
    if not xs:
        return []
    xs = _alike(xs)
    if is_traced(xs, k):
        return _select(xs, _count_of(k), None, ties)
    called = names or [f"scores[{i}]" for i in range(len(xs))]
    shards = radix.shards_of(xs)
    if shards is not None:
        return _over_shards(shards, xs, [k], (0,) * len(xs), ties, called)
    masks, nans = _checked_select(xs, _count_of(k), None, ties)
    reject_nan(called, nans)
    return masks


def _alike(xs: Sequence[Array]) -> list[Array]:
    """Returns the arrays in their common dtype, since keys of different widths do not compare."""
    common = jnp.result_type(*xs)
    return [x if x.dtype == common else x.astype(common) for x in xs]


def _over_shards(
    shards: radix.Shards,
    xs: list[Array],
    counts: Sequence[Any],
    groups: tuple[int, ...],
    ties: str,
    names: Sequence[str],
) -> list[Array]:
    """Returns the masks of arrays on one mesh, of each group with its own count."""
    sizes = [0] * len(counts)
    for x, group in zip(xs, groups, strict=True):
        sizes[group] += tree.size(x)
    # In numpy, since each operation on a device costs more than the sums that it would save.
    whole = [min(int(k), size) for k, size in zip(counts, sizes, strict=True)]
    high: Any = np.array([k >> 16 for k in whole], np.uint32)
    low: Any = np.array([k & 0xFFFF for k in whole], np.uint32)
    stacked = counting.Count(high, low)
    masks, nans = radix.compiled(shards, groups, ties)(xs, stacked)
    reject_nan(names, nans)
    return masks


def top_k_masks_of_each(
    xs: Sequence[Float[Array, "..."]],
    k: int | counting.Count,
    least: Sequence[int],
    *,
    axes: Sequence[tuple[int, ...] | None] | None = None,
    ties: str = "first",
    names: Sequence[str] | None = None,
) -> list[Bool[Array, "..."]]:
    """Returns masks with exactly k True in all, and no fewer than a number in each array.

    The largest `least` elements of each array are retained whatever the others have; the rest of
    the k are the largest of what is left. Elements of −inf are never among the first.

    Args:
        xs: Float arrays, as in `top_k_masks`.
        k: Total number of elements to retain, at least the sum of `least`.
        least: Smallest number of elements to retain of each array, or of each of its slices.
        axes: Axes of the slices of each array; None: the whole array.
        ties: Which of equal elements are retained at the threshold, "first" or "last".
        names: Names of the arrays in error messages.

    Raises:
        InputError: Errors of `top_k_masks`.

    >>> masks = top_k_masks_of_each([jnp.array([5.0, 4.0, 3.0]), jnp.array([2.0, 1.0])], 3, [0, 1])
    >>> [mask.tolist() for mask in masks]
    [[True, True, False], [True, False]]
    """
    along = axes or [None] * len(xs)
    called = names or [f"scores[{i}]" for i in range(len(xs))]
    # Whole arrays share the collectives of one selection; slices have their own.
    whole = [at for at, of_one in enumerate(along) if of_one is None]
    found = top_k_mask_each(
        [xs[at] for at in whole], [least[at] for at in whole], ties=ties,
        names=[called[at] for at in whole],
    )  # fmt: skip
    best = dict(zip(whole, found, strict=True))
    for at, of_one in enumerate(along):
        if of_one is not None:
            best[at] = top_k_mask(xs[at], least[at], axes=of_one, ties=ties, name=called[at])
    first = [best[at] & (x != -jnp.inf) for at, x in enumerate(xs)]
    rest = [jnp.where(mask, -jnp.inf, x) for mask, x in zip(first, xs, strict=True)]
    taken, wanted = counting.count_true(first), _count_of(k)
    left = wanted.minus(_at_most(wanted, taken))
    more = top_k_masks(rest, left, ties=ties, names=names)
    return [one | other for one, other in zip(first, more, strict=True)]


def is_traced(*values: Any) -> bool:
    """Returns whether any leaf of the values is traced, so that its value is unknown."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def check_k(k: Any, size: int) -> None:
    """Raises InputError if k is not an integer or, unless it is traced, outside [0, size]."""
    if isinstance(k, counting.Count):
        return
    dtype = getattr(k, "dtype", type(k))
    whole = dtype is int or (hasattr(dtype, "kind") and jnp.issubdtype(dtype, jnp.integer))
    if not whole or getattr(k, "shape", ()) != ():
        raise InputError(f"k must be an integer number of elements to keep, got {shown(k)}")
    if not isinstance(k, Tracer) and not 0 <= int(k) <= size:
        raise InputError(f"k must be between 0 and the {size} elements of the scores, got {k}")


def check_floats(xs: Sequence[Any]) -> None:
    """Raises InputError for an array that is not floating-point."""
    for x in xs:
        if not tree.is_weight(x):
            raise InputError(
                "scores must be floating-point arrays, got "
                f"{getattr(x, 'dtype', type(x).__name__)}; convert them first"
            )


def _count_of(k: Any) -> counting.Count:
    if isinstance(k, counting.Count):
        return k
    return counting.count(jnp.maximum(k, 0) if isinstance(k, Tracer) else int(k))


def reject_nan(names: Sequence[str], nans: Sequence[Array]) -> None:
    """Raises InputError naming the first array that has NaN.

    Args:
        names: Names of the arrays.
        nans: Number of NaN in each array.
    """
    for name, found in zip(names, jax.device_get(list(nans)), strict=True):
        if found:
            raise InputError(
                f"the scores of {name!r} have {int(found)} NaN, which cannot be ranked; find out "
                "where the training or the criterion diverged"
            )


def _checked(xs: list[Array], k: counting.Count, axes: tuple[int, ...] | None, ties: str):
    return _select(xs, k, axes, ties), [counting.count_each([jnp.isnan(x)])[0] for x in xs]


_checked_select = jax.jit(_checked, static_argnums=(2, 3))


def _select(
    xs: list[Array], k: counting.Count, axes: tuple[int, ...] | None, ties: str = "first"
) -> list[Array]:
    """Returns the masks; everything about k may be traced."""
    if ties == "last":  # the first, seen from the other end
        flipped = _select([jnp.flip(x, axes) for x in reversed(xs)], k, axes)
        return [jnp.flip(mask, axes) for mask in reversed(flipped)]
    keys = [sortable_bits(x) for x in xs]
    threshold, reached = _threshold(keys, k, axes)
    surplus = reached.minus(_at_most(k, reached))
    # Drop the surplus ties from the last array backwards, so that the first ones are retained.
    masks = []
    for key in reversed(keys):
        here = surplus.saturated()
        if axes is None and len(keys) > 1:
            here = jnp.minimum(counting.count_true([key == threshold]).saturated(), here)
            surplus = surplus.minus(counting.count(here))
        masks.append(_without_last_ties(key, threshold, here, axes))
    return masks[::-1]


def _at_most(k: counting.Count, bound: counting.Count) -> counting.Count:
    """Returns the elementwise minimum of two counts, in the shape of `bound`."""
    enough = bound >= k
    return counting.Count(*(jnp.where(enough, a, b) for a, b in zip(k, bound, strict=True)))


def _threshold(
    keys: list[Array], k: counting.Count, axes: tuple[int, ...] | None
) -> tuple[Array, counting.Count]:
    """Returns the largest key that at least k elements reach, and the number that reach it."""
    shape = () if axes is None else _reduced_shape(keys[0].shape, axes)
    sizes = [tree.size(key) // math.prod(shape) if math.prod(shape) else 0 for key in keys]
    everything = counting.Count(*(jnp.broadcast_to(n, shape) for n in counting.count(sum(sizes))))

    def counts(candidates: list[Array]) -> list[counting.Count]:
        each = [counting.count_each([key >= bound for bound in candidates], axes) for key in keys]
        return [
            counting.total([counting.count(n) for n in of_one])
            for of_one in zip(*each, strict=True)
        ]

    dtype = keys[0].dtype
    return _largest(counts, _at_most(k, everything), everything, jnp.iinfo(dtype).bits, dtype)


def _largest(
    counts: Callable[[list[Array]], list[counting.Count]],
    k: counting.Count,
    everything: counting.Count,
    bits: int,
    dtype: Any,
) -> tuple[Array, counting.Count]:
    """Returns the largest bound below 2^bits with a count of at least k, and its count.

    Each pass resolves two bits by counting three candidates together, which halves the reads.
    """

    def unresolved(state):
        shift, _, reached = state
        return (shift >= 0) & ~jnp.all(reached.equals(k))

    def try_digit(state):
        shift, bound, reached = state
        candidates = [
            bound | (jnp.asarray(digit, dtype) << shift.astype(dtype)) for digit in (1, 2, 3)
        ]
        # Take the largest digit that at least k elements reach.
        for candidate, n in zip(candidates, counts(candidates), strict=True):
            enough = n >= k
            bound = jnp.where(enough, candidate, bound)
            reached = counting.Count(
                *(jnp.where(enough, a, b) for a, b in zip(n, reached, strict=True))
            )
        return shift - 2, bound, reached

    start = (jnp.int32((bits + 1) // 2 * 2 - 2), jnp.zeros(everything.low.shape, dtype), everything)
    _, bound, reached = jax.lax.while_loop(unresolved, try_digit, start)
    return bound, reached


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _without_last_ties(
    key: Array, threshold: Array, n: Array, axes: tuple[int, ...] | None
) -> Array:
    """Returns key ≥ threshold without the last n ties by flat index (along `axes`)."""
    along = tuple(range(key.ndim)) if axes is None else axes
    # Flat index of every element along the axes, from 1, so that 0 is before every element.
    position = jnp.ones(key.shape, jnp.uint32)
    stride = 1
    for axis in reversed(along):
        index = jax.lax.broadcasted_iota(jnp.uint32, key.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= key.shape[axis]

    def counts(candidates: list[Array]) -> list[counting.Count]:
        behind = [(key == threshold) & (position >= bound) for bound in candidates]
        return [counting.count(n) for n in counting.count_each(behind, axes)]

    # Find the position from which exactly n ties follow, and drop these.
    def cut(key: Array) -> Array:
        everything = counting.count(counting.count_each([key == threshold], axes)[0])
        bound, _ = _largest(counts, counting.count(n), everything, stride.bit_length(), jnp.uint32)
        return (key > threshold) | ((key == threshold) & ((position < bound) | (n == 0)))

    return jax.lax.cond(jnp.any(n > 0), cut, lambda key: key >= threshold, key)


def restrict(
    score: Float[Array, "..."], allowed: Bool[Array, "..."], name: str
) -> Float[Array, "..."]:
    """Returns float32 scores, −inf where selection is not allowed and finite or +inf elsewhere.

    An allowed −inf becomes the lowest finite float, so that a selection of at most as many weights
    as are allowed never reaches the others. In a traced call so does an allowed NaN.

    Args:
        score: Float array.
        allowed: Bool array of the same shape, True where a weight may be selected.
        name: Name of the array in error messages.

    Raises:
        InputError: A score is NaN, which is checked outside of a jit alone.

    >>> restrict(jnp.array([1.0, 2.0]), jnp.array([True, False]), "w").tolist()
    [1.0, -inf]
    """
    score = score.astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    # A NaN is not ≥ anything either.
    ranked = jnp.where(allowed, jnp.where(score >= lowest, score, lowest), -jnp.inf)
    if not isinstance(ranked, Tracer):  # constants of a program are traced by what is done to them
        reject_nan([name], counting.count_each([jnp.isnan(score)]))
    return ranked
