"""Restoring must not harm: what is restored is kept only where it holds on held-out batches.

Each kernel by itself comes nearer to its target on what calibrated it, and still a block may end
farther from the dense one: where a ranking over all tensors leaves a unit of a gated MLP a few
weights, they are restored towards the full variance of its outputs, while the pruned gate no longer
keeps the unit closed. So a kernel is judged by the outputs of its block, and in the end the model
by those of its last block.
Three streams of activations of the held-out batches go through the blocks for that: the dense
model's, those of the masks alone, and the result's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What held-out batches say of a block; distances are those of `mean_apart`.

    Attributes:
        kernels: Kernels to keep by name, each restored or with its mask alone.
        gave_up: By name of those with their masks alone, why: "kernel" or "block".
        alone: Distance with the masks alone.
        restored: Distance with every kernel restored.
        kept: Distance with `kernels`.
        all_alone: Distance with the masks alone in the blocks before it too.
    """

    kernels: Mapping[str, Any]
    gave_up: Mapping[str, str]
    alone: float
    restored: float
    kept: float
    all_alone: float = 0.0


def judged(
    apart: Callable[[Mapping[str, Any]], float], alone: Mapping[str, Any], new: Mapping[str, Any]
) -> Verdict:
    """Returns which kernels to keep: one after the other goes back where the block gains from it.

    Args:
        apart: Function from kernels by name to the distance of the block's outputs.
        alone: Kernels with their masks alone.
        new: The same restored.
    """
    kept, gave_up = dict(new), {}
    nearest = restored = apart(kept)
    for name, kernel in alone.items():
        without = apart({**kept, name: kernel})
        if worse(nearest, without):
            kept[name], gave_up[name], nearest = kernel, "kernel", without
    masks_alone = apart(alone)
    if worse(nearest, masks_alone):
        kept, nearest = dict(alone), masks_alone
        gave_up = {name: gave_up.get(name, "block") for name in alone}
    return Verdict(kept, gave_up, masks_alone, restored, nearest)


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
