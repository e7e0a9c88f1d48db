"""Exact selection of the k largest by radix on the float bits.

The bits of an IEEE float, with the sign folded in, order like unsigned integers. The k-th largest
is therefore found from its highest bit down: a bit is set when at least k elements reach the
candidate. Each bit costs one pass that compares and sums, nothing else, so a sharded array is
selected from with one all-reduced scalar a pass: no sort, no gather, no histogram. Ties at the
threshold are broken by a second search of the same kind over the flat index, skipped when no tie
is cut. A pass reads each score once; the search stops as soon as the count is exact.

Threshold selection by bit-wise counting is standard on GPUs (radix select; Alabi, Blanchard,
Gordon, Steinbach, "Fast k-selection algorithms for graphics processing units", 2012).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt

from swe_prune import tree
from swe_prune.errors import InputError


def sortable_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Returns unsigned integers that order as the floats do, with −0 = +0 and NaN below −inf.

    Args:
        x: floats of any width; the result has the same width (16 bits for bfloat16).
    """
    width = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    sign = jnp.asarray(1 << (width - 1), unsigned)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), unsigned)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    # On the bits, not on the floats: a backend that flushes denormals would call them zero.
    bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where((bits & ~sign) > infinity, jnp.zeros_like(bits), ordered)


def top_k_mask(
    x: Float[Array, "..."],
    k: int | Int[Array, ""],
    *,
    axes: tuple[int, ...] | None = None,
) -> Bool[Array, "..."]:
    """Returns a mask of `x.shape` with exactly k True, at the k largest elements.

    Ties are broken by flat index: the first ones stay. ±0 tie; +inf and −inf are ordinary values.

    Args:
        x: floats, fewer than 2^32 of them.
        k: how many to keep, 0 ≤ k ≤ elements; may be traced, then it is clipped to that range.
        axes: select within every slice along these axes, k in each; None: over all of `x`.

    Raises:
        InputError: k out of range, or a NaN in `x`. Neither can be seen while tracing: there NaN
            counts as the smallest value.

    >>> top_k_mask(jnp.array([1.0, 3.0, 3.0, 2.0]), 1).tolist()
    [False, True, False, False]
    """
    slice_size = tree.size(x) if axes is None else math.prod(x.shape[a] for a in axes)
    check_k(k, slice_size)
    if isinstance(x, Tracer):
        return _select([x], tree.count(k), axes)[0]
    masks, nans = _checked_select([x], tree.count(k), axes)
    reject_nan(["scores"], nans)
    return masks[0]


def top_k_masks(
    xs: Sequence[Float[Array, "..."]],
    k: int | Int[Array, ""],
    *,
    names: Sequence[str] | None = None,
) -> list[Bool[Array, "..."]]:
    """Returns one mask per array with exactly k True over all of them together.

    Ties are broken by the order of the arrays, then by flat index. See `top_k_mask`.

    Args:
        xs: floats of one dtype and any shapes, at most 2^16 arrays of fewer than 2^32 elements.
        k: how many to keep in all, below 2^48.
        names: what an error calls the arrays.

    Raises:
        InputError: as `top_k_mask`.
    """
    check_k(k, sum(map(tree.size, xs)))
    if any(isinstance(x, Tracer) for x in xs):
        return _select(list(xs), tree.count(k), None)
    masks, nans = _checked_select(list(xs), tree.count(k), None)
    reject_nan(names or [f"scores[{i}]" for i in range(len(xs))], nans)
    return masks


def check_k(k: Any, size: int) -> None:
    """Raises InputError for a Python k outside [0, size]."""
    if isinstance(k, int) and not 0 <= k <= size:
        raise InputError(f"k = {k} cannot be kept of {size} elements; give 0 ≤ k ≤ {size}")


def reject_nan(names: Sequence[str], nans: Sequence[Array]) -> None:
    """Raises InputError that names the first array with a NaN, given how many each has."""
    for name, found in zip(names, jax.device_get(list(nans)), strict=True):
        if found:
            raise InputError(
                f"the scores of {name!r} have {int(found)} NaN, which no ranking can place; "
                "find out where the training or the criterion diverged"
            )


def _checked(xs: list[Array], k: tree.Count, axes: tuple[int, ...] | None):
    return _select(xs, k, axes), [jnp.sum(jnp.isnan(x), dtype=jnp.uint32) for x in xs]


_checked_select = jax.jit(_checked, static_argnums=2)


def _select(xs: list[Array], k: tree.Count, axes: tuple[int, ...] | None) -> list[Array]:
    """Returns the masks; everything about k may be traced."""
    keys = [sortable_bits(x) for x in xs]
    threshold, reached = _threshold(keys, k, axes)
    masks = [key >= threshold for key in keys]
    if axes is not None:
        (key,) = keys
        surplus = reached.minus(k).saturated()
        return [masks[0] & ~_last_true(key == threshold, surplus, axes)]
    surplus, kept = reached.minus(k), []
    for key, mask in zip(reversed(keys), reversed(masks), strict=True):
        # The last ties go first, so that what stays is the first by order and flat index.
        ties = key == threshold
        here = jnp.minimum(tree.count_true([ties]).saturated(), surplus.saturated())
        kept.append(mask & ~_last_true(ties, here, None))
        surplus = surplus.minus(tree.count(here))
    return kept[::-1]


def _threshold(
    keys: list[Array], k: tree.Count, axes: tuple[int, ...] | None
) -> tuple[Array, tree.Count]:
    """Returns the largest key that at least k elements reach, and how many reach it."""
    dtype = keys[0].dtype
    everything = tree.count_true([jnp.ones_like(key, bool) for key in keys], axes)
    k = tree.Count(*(jnp.broadcast_to(limb, everything.low.shape) for limb in k))
    k = tree.Count(*(jnp.where(k >= everything, n, m) for n, m in zip(everything, k, strict=True)))

    def unresolved(state):
        bit, _, reached = state
        return (bit > 0) & ~jnp.all(reached.equals(k))

    def try_bit(state):
        bit, threshold, reached = state
        candidate = threshold | bit
        n = tree.count_true([key >= candidate for key in keys], axes)
        enough = n >= k
        reached = tree.Count(*(jnp.where(enough, a, b) for a, b in zip(n, reached, strict=True)))
        return bit >> 1, jnp.where(enough, candidate, threshold), reached

    highest = jnp.asarray(1 << (jnp.iinfo(dtype).bits - 1), dtype)
    start = (highest, jnp.zeros(everything.low.shape, dtype), everything)
    _, threshold, reached = jax.lax.while_loop(unresolved, try_bit, start)
    return threshold, reached


def _last_true(mask: Array, n: Array, axes: tuple[int, ...] | None) -> Array:
    """Returns the last n True of a mask by flat index (along `axes`), by the same bit search."""
    shape = mask.shape
    along = tuple(range(mask.ndim)) if axes is None else axes
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(along):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]

    def search(mask):
        # The largest bound that still leaves n or more True at or after it.
        bound = jnp.zeros(n.shape, jnp.uint32)
        for bit in reversed(range(max(stride - 1, 1).bit_length())):
            candidate = bound | jnp.uint32(1 << bit)
            behind = tree.count_true([mask & (index >= candidate)], axes).saturated()
            bound = jnp.where(behind >= n, candidate, bound)
        return mask & (index >= bound) & (n > 0)

    return jax.lax.cond(jnp.any(n > 0), search, jnp.zeros_like, mask)
