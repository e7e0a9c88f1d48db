"""Pruning by a Bezier curve over the histogram of the weights, "smart pruning"."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.errors import InputError, check_choice
from swe_prune.importance.registry import register


@register("bezier", spread=1.0, sorts=True)
def bezier(
    key: Array,
    weight: Float[Array, "..."],
    inputs: tuple[int, ...],
    control: tuple[float, float, float, float] = (1.0, 0.14, 0.14, 0.1),
    method: str = "*",
    symmetric: bool = False,
) -> Float[Array, "..."]:
    """At which upscale u a weight goes: (r + 1) / (n p) with "*", (r + 1) / n − p with "+".

    The weights of an output are binned by value; of the n in a bin, a random share of min(1, u p)
    goes, or of min(1, u + p). p is a cubic Bezier curve of the control values (a, b, c, d) that
    falls from the middle bin to both ends, scaled to [0, 1]; r is the random rank within the bin.
    So `masks.by_std(scores, u, spread=1.0)` is the mask at upscale u exactly, floor(n · share)
    removed in every bin, and `masks.by_sparsity` finds the u that removes as much as was asked for.

    The middle is that of the output's range, not zero, as in the authors' code; `symmetric=True`
    bins over [−max |w|, max |w|] instead, which is ours. There are floor(√(weights of the output))
    bins, one more if that is odd. A curve without any slope has p = 0: nothing goes with "*".

    The authors' code sorts the current weights, or those of the running mean ("weighted clone",
    here `bezier_swe`).

    When: to repeat its paper.
    Source: Islam and Belhaouari, LOD 2022, repository SmartPruningDeepNN.
    """
    check_choice(method, ("*", "+"), "method of 'bezier'")
    if len(control) != 4 or not all(map(math.isfinite, control)):
        raise InputError(
            f"control = {control!r} of 'bezier' is not four numbers; give (a, b, c, d)"
        )
    if not weight.size:
        return jnp.zeros(weight.shape, jnp.float32)
    outputs_last = jnp.moveaxis(weight, inputs, range(len(inputs)))
    size = math.prod(weight.shape[axis] for axis in inputs)
    score_NxU = _scores(key, outputs_last.reshape(size, -1), control, method, symmetric)
    return jnp.moveaxis(score_NxU.reshape(outputs_last.shape), range(len(inputs)), inputs)


@register("bezier_swe", spread=1.0, sorts=True)
def bezier_swe(
    key: Array,
    late_mean: Float[Array, "..."],
    inputs: tuple[int, ...],
    control: tuple[float, float, float, float] = (1.0, 0.14, 0.14, 0.1),
    method: str = "*",
    symmetric: bool = False,
) -> Float[Array, "..."]:
    """`bezier` over the histogram of the late mean, Σ wₜ θ(t) / Σ wₜ, instead of the weights.

    When: to repeat its paper with the running mean.
    Source: as `bezier`.
    """
    return bezier(key, late_mean, inputs, control, method, symmetric)


def profile(control: tuple[float, float, float, float], bins: int) -> Float[Array, " B"]:
    """Returns the share p of each bin: φ(x) = a(1−x)³ + 3b x(1−x)² + 3c x²(1−x) + d x³, scaled.

    φ runs from its end to its start over the left half of the bins and back over the right.
    """
    a, b, c, d = control
    x = jnp.linspace(0.0, 1.0, bins // 2)
    right = a * (1 - x) ** 3 + 3 * b * x * (1 - x) ** 2 + 3 * c * x**2 * (1 - x) + d * x**3
    curve = jnp.concatenate([right[::-1], right])
    height = jnp.max(curve) - jnp.min(curve)
    return jnp.where(height > 0, (curve - jnp.min(curve)) / jnp.where(height > 0, height, 1), 0.0)


def bin_count(size: int) -> int:
    """Returns the bins for an output of so many weights: √size rounded down, then up to even."""
    root = math.isqrt(size)
    return root + root % 2


def _scores(
    key: Array,
    weight_NxU: Float[Array, "N U"],
    control: tuple[float, float, float, float],
    method: str,
    symmetric: bool,
) -> Float[Array, "N U"]:
    bins = bin_count(weight_NxU.shape[0])
    share_B = profile(control, bins)
    high_U = jnp.max(jnp.abs(weight_NxU) if symmetric else weight_NxU, axis=0)
    low_U = -high_U if symmetric else jnp.min(weight_NxU, axis=0)
    width_U = jnp.where(high_U > low_U, high_U - low_U, 1.0)
    place_NxU = jnp.floor((weight_NxU - low_U) / width_U * bins).astype(jnp.int32)
    bin_NxU = jnp.clip(place_NxU, 0, bins - 1)
    rank_NxU, size_NxU = _random_ranks(key, bin_NxU)
    p_NxU = share_B[bin_NxU]
    reached_NxU = (rank_NxU + 1) / size_NxU
    if method == "+":
        return reached_NxU - p_NxU
    return jnp.where(p_NxU > 0, reached_NxU / jnp.where(p_NxU > 0, p_NxU, 1.0), jnp.inf)


def _random_ranks(key: Array, bin_NxU: Array) -> tuple[Array, Array]:
    """Returns each weight's random rank within its bin, and the bin size."""
    number = jnp.broadcast_to(jnp.arange(bin_NxU.shape[0])[:, None], bin_NxU.shape)
    draw = jax.random.uniform(key, bin_NxU.shape)
    bins, _, origin = jax.lax.sort((bin_NxU, draw, number), dimension=0, num_keys=2)
    first = jax.vmap(jnp.searchsorted, (1, 1), 1)(bins, bins)
    after = jax.vmap(lambda b: jnp.searchsorted(b, b, side="right"), 1, 1)(bins)
    _, rank, size = jax.lax.sort((origin, number - first, after - first), dimension=0, num_keys=1)
    return rank.astype(jnp.float32), size.astype(jnp.float32)
