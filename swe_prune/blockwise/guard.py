"""Restoring must not harm: what is restored is kept only where it holds on held-out batches.

A kernel whose outputs on the held-out batches are farther from their target than with the mask
alone keeps the weights that the mask leaves; so does a block whose own outputs are farther from the
dense model's, and the whole model if the last block's are. Three streams of activations of the
held-out batches go through the blocks for that: the dense model's, those of the masks alone, and
the result's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def share_held_out(batches: int) -> int:
    """Returns how many of the last batches judge a restoration: one of eight, 0 of a single one.

    >>> share_held_out(1), share_held_out(4), share_held_out(20)
    (0, 1, 2)
    """
    return 0 if batches < 2 else max(1, batches // 8)


@jax.jit
def apart(made: Sequence[Any], dense: Sequence[Any]) -> tuple[Array, Array]:
    """Returns the sum over tokens of ‖y − y'‖² / ‖y'‖², y' of the dense model, and their number.

    Per token, since a norm follows the residual stream: the few tokens with massive activations, as
    Llama's models have them, would outweigh all the others.
    """
    total, count = jnp.float32(0), jnp.float32(0)
    for own, other in zip(made, dense, strict=True):
        if own is None or not jnp.issubdtype(own.dtype, jnp.floating) or not own.ndim:
            continue
        own, other = own.astype(jnp.float32), other.astype(jnp.float32)
        size = jnp.sum(other**2, axis=-1)
        distance = jnp.sum((own - other) ** 2, axis=-1)
        total += jnp.sum(jnp.where(size > 0, distance / jnp.where(size > 0, size, 1), distance))
        count += size.size
    return total, count


def mean_apart(some: Sequence[Sequence[Any]], dense: Sequence[Sequence[Any]]) -> float:
    """Returns the mean relative squared distance of two models' outputs over all tokens."""
    sums = [apart(own, other) for own, other in zip(some, dense, strict=True)]
    total, count = (float(sum(parts)) for parts in zip(*jax.device_get(sums), strict=True))
    return total / max(count, 1.0)


def worse(restored: float, alone: float) -> bool:
    """Returns whether restoring harms, beyond what rounding explains; NaN is harm."""
    return not restored - alone <= 1e-6 * abs(alone)
