"""Exact integer counts in traced programs, as two uint32 words, at any size."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32


class Count(NamedTuple):
    """A non-negative integer below 2^48 in two uint32 limbs of base 2^16, on the device.

    jax has no 64-bit integers by default and a float32 is exact only to 2^24, but a model has more
    weights than either can count. Both limbs may be arrays, for a count per row.
    """

    high: UInt32[Array, "..."]
    low: UInt32[Array, "..."]

    def __ge__(self, other: "Count") -> Any:  # type: ignore[override]  # elementwise, as arrays do
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def equals(self, other: "Count") -> Any:
        """Returns elementwise equality; `==` of a tuple would compare as one object."""
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
    """Returns a Python int, or an integer array of counts below 2^32, as a Count."""
    if isinstance(value, int | np.integer):
        return Count(jnp.uint32(int(value) >> 16), jnp.uint32(int(value) & 0xFFFF))
    value = jnp.asarray(value).astype(jnp.uint32)
    return Count(value >> 16, value & 0xFFFF)


def share(size: int | Count, fraction: Float[Array, ""], *, up: bool = True) -> Count:
    """Returns size · fraction as an integer, exactly; both may be traced.

    A float32 product would be wrong from 2^24 on; here the size and the fraction's 48 binary
    digits are multiplied in limbs of 16.

    Args:
        size: below 2^48; traced, as a Count.
        fraction: float32, clipped to [0, 1]; what it has below 2^-48 is cut off.
        up: round to the nearest integer, halves up; False: down.
    """
    clipped = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0) * 2**24
    above = jnp.floor(clipped)
    below = jnp.floor((clipped - above) * 2**24)  # a difference and a power of 2, both exact
    above, below = above.astype(jnp.uint32), below.astype(jnp.uint32)
    digits = [below & 0xFFFF, (below >> 16) | ((above & 0xFF) << 8), above >> 8]
    whole = size if isinstance(size, Count) else count(size)
    limbs = [whole.low, whole.high & 0xFFFF, whole.high >> 16]
    columns = [jnp.uint32(0)] * 6  # each a sum of at most 7 numbers below 2^16
    for i, digit in enumerate(digits):
        for j, limb in enumerate(limbs):
            product = digit * limb
            columns[i + j] += product & 0xFFFF
            columns[i + j + 1] += product >> 16
    columns[2] += jnp.uint32(0x8000 if up else 0)  # a half
    carry = jnp.uint32(0)
    for i, column in enumerate(columns):
        columns[i], carry = (column + carry) & 0xFFFF, (column + carry) >> 16
    return Count((columns[5] << 16) | columns[4], columns[3])


def total(counts: Sequence[Count]) -> Count:
    """Returns the sum of at most 2^16 counts."""
    # Each low limb is below 2^16, so 2^16 of them cannot overflow.
    high, low = jax.tree.map(lambda *limbs: sum(limbs[1:], limbs[0]), *counts)
    return Count(high + (low >> 16), low & 0xFFFF)


def count_true(masks: Sequence[Array], axes: tuple[int, ...] | None = None) -> Count:
    """Returns how many elements of all the bool arrays together are True, exactly.

    Args:
        masks: bool arrays of fewer than 2^32 elements each and at most 2^16 of them.
        axes: count along these axes, which are kept with length 1; None: all, to a scalar.
    """
    return total([count(count_each([mask], axes)[0]) for mask in masks])


def count_each(
    masks: Sequence[Array], axes: tuple[int, ...] | None = None
) -> list[UInt32[Array, "..."]]:
    """Returns the number of True of each of several masks of one shape, in one pass over them.

    Args:
        masks: bool arrays of one shape, of fewer than 2^32 elements each.
        axes: as in `count_true`.
    """
    along = tuple(range(masks[0].ndim)) if axes is None else axes
    keep = axes is not None
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not along:
        return [jnp.sum(mask, axis=along, dtype=jnp.uint32, keepdims=keep) for mask in masks]
    # XLA for CPU first writes the operand of a plain integer sum to memory, which takes ten times
    # as long; a reduction of several operands at once it fuses with what they are made of. Not over
    # several devices: the partitioner all-reduces plain sums, and gathers the others' parts.
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
    # Of the module, as jax compiles an eager reduction anew for every new function.
    return tuple(a + b for a, b in zip(left, right, strict=True))
