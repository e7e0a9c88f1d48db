"""Exact integer counts below 2^48 in traced programs, as pairs of uint32."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32


class Count(NamedTuple):
    """A non-negative integer below 2^48 as two uint32 limbs of base 2^16, on the device.

    JAX has no 64-bit integers by default and float32 is exact only up to 2^24, while models have
    more weights than that. Both limbs may be arrays, for example with one count per row.

    Attributes:
        high: Upper limb, count // 2^16.
        low: Lower limb, count % 2^16.
    """

    high: UInt32[Array, "..."]
    low: UInt32[Array, "..."]

    def __ge__(self, other: "Count") -> Any:  # type: ignore[override]  # elementwise, like arrays
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def equals(self, other: "Count") -> Any:
        """Returns elementwise equality; `==` would compare the tuples as objects."""
        return (self.high == other.high) & (self.low == other.low)

    def minus(self, other: "Count") -> "Count":
        """Returns the difference, which must not be negative."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        return Count(self.high - other.high - borrow, self.low + (borrow << 16) - other.low)

    def saturated(self) -> UInt32[Array, "..."]:
        """Returns the count as one uint32, or 2^32 − 1 where it is larger."""
        whole = (self.high << 16) | self.low
        return jnp.where(self.high > 0xFFFF, jnp.uint32(0xFFFFFFFF), whole)

    def __int__(self) -> int:
        return (int(self.high) << 16) + int(self.low)


def count(value: Any) -> Count:
    """Converts a Python int, or an integer array of counts below 2^32, to a Count."""
    if isinstance(value, int | np.integer):
        return Count(jnp.uint32(int(value) >> 16), jnp.uint32(int(value) & 0xFFFF))
    value = jnp.asarray(value).astype(jnp.uint32)
    return Count(value >> 16, value & 0xFFFF)


def share(size: int | Count, fraction: Float[Array, ""], *, up: bool = True) -> Count:
    """Returns size · fraction as an exactly rounded integer; both may be traced.

    A float32 product would be wrong above 2^24. Instead, the size and the fraction's 48 binary
    digits are multiplied in limbs of 16 bits.

    Args:
        size: Number of elements below 2^48; a `Count` if traced.
        fraction: Float32 fraction, clipped to [0, 1] and truncated to multiples of 2^-48.
        up: Whether to round to the nearest integer, halves up, instead of down.
    """
    # Split the fraction into three 16-bit digits, each exact in float32.
    clipped = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0) * 2**24
    above = jnp.floor(clipped)
    below = jnp.floor((clipped - above) * 2**24)  # both operations are exact
    above, below = above.astype(jnp.uint32), below.astype(jnp.uint32)
    digits = [below & 0xFFFF, (below >> 16) | ((above & 0xFF) << 8), above >> 8]
    whole = size if isinstance(size, Count) else count(size)
    limbs = [whole.low, whole.high & 0xFFFF, whole.high >> 16]
    # Long multiplication; each column sums at most 7 numbers below 2^16 and cannot overflow.
    columns = [jnp.uint32(0)] * 6
    for i, digit in enumerate(digits):
        for j, limb in enumerate(limbs):
            product = digit * limb
            columns[i + j] += product & 0xFFFF
            columns[i + j + 1] += product >> 16
    columns[2] += jnp.uint32(0x8000 if up else 0)  # a half, for rounding
    carry = jnp.uint32(0)
    for i, column in enumerate(columns):
        columns[i], carry = (column + carry) & 0xFFFF, (column + carry) >> 16
    return Count((columns[5] << 16) | columns[4], columns[3])


def total(counts: Sequence[Count]) -> Count:
    """Returns the sum of at most 2^16 counts."""
    if not counts:
        return count(0)
    # Each low limb is below 2^16, so 2^16 of them cannot overflow.
    high, low = jax.tree.map(lambda *limbs: sum(limbs[1:], limbs[0]), *counts)
    return Count(high + (low >> 16), low & 0xFFFF)


def count_true(masks: Sequence[Array], axes: tuple[int, ...] | None = None) -> Count:
    """Returns the exact number of True elements of all the bool arrays together.

    Args:
        masks: At most 2^16 bool arrays of fewer than 2^32 elements each.
        axes: Axes to count along, which remain with length 1. If None, all axes, to a scalar.
    """
    return total([count(count_each([mask], axes)[0]) for mask in masks])


def count_each(
    masks: Sequence[Array], axes: tuple[int, ...] | None = None
) -> list[UInt32[Array, "..."]]:
    """Returns the number of True elements of each of several masks, in one pass over them.

    Args:
        masks: Bool arrays of one shape, of fewer than 2^32 elements each.
        axes: Axes to count along, which remain with length 1. If None, all axes, to a scalar.
    """
    along = tuple(range(masks[0].ndim)) if axes is None else axes
    keep = axes is not None
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not along:
        return [jnp.sum(mask, axis=along, dtype=jnp.uint32, keepdims=keep) for mask in masks]
    # XLA for CPU writes the operand of a plain integer sum to memory first, which takes ten times
    # as long, but fuses a reduction of several operands with their producers. Not over several
    # devices: there the partitioner all-reduces plain sums, but gathers the operands of the others.
    if len(masks) == 1:
        true, false = _fused_counts([masks[0], ~masks[0]], along)
        whole = math.prod(masks[0].shape[axis] for axis in along)
        counts = [jnp.minimum(true, jnp.uint32(whole) - false)]  # the two are equal
    else:
        counts = _fused_counts(masks, along)
    return [jnp.expand_dims(n, along) for n in counts] if keep else counts


def _fused_counts(masks: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    operands = tuple(mask.astype(jnp.uint32) for mask in masks)
    zeros = (jnp.zeros((), jnp.uint32),) * len(masks)
    return list(jax.lax.reduce(operands, zeros, _add_each, axes))


def _add_each(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, ...]:
    # At module level, because JAX recompiles an eager reduction for every new function object.
    return tuple(a + b for a, b in zip(left, right, strict=True))
