"""Rotary position embeddings, and their scalings for texts longer than those trained on.

Pair i of a head's R rotated numbers is rotated by position * f_i, f_i = theta^(-2i/R). The pairs
are (x_i, x_{i + R/2}), as in GPT-NeoX and Hugging Face's models. A scaling changes f_i:

    none      f_i
    linear    f_i / factor                                   (Chen et al., 2306.15595)
    dynamic   a larger theta once the text exceeds the original context, by its length
              ("NTK-aware")
    yarn      between f_i / factor and f_i by a ramp over i  (Peng et al., 2309.00071)
    llama3    between f_i / factor and f_i, smoothly by wavelength  (Llama 3.1's release)
    longrope  f_i / short_i, or / long_i once the text exceeds the original context
              (Ding et al., 2402.13753; Phi-3's checkpoints)

Source for the meaning of the settings: https://github.com/huggingface/transformers,
modeling_rope_utils.py.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError


def check(config: ModelConfig, head_width: int) -> None:
    """Raises InputError if the settings of `config.rope` are invalid."""
    rope = config.rope
    rotated = rotated_width(rope, head_width)
    if rotated < 2 or rotated % 2 or rotated > head_width:
        raise InputError(
            f"config.model.rope.share = {rope.share} rotates {rotated} of a head's {head_width} "
            "numbers; the number of rotated ones must be even"
        )
    for name in ("short_factors", "long_factors"):
        given = len(getattr(rope, name))
        if rope.scaling == "longrope" and given != rotated // 2:
            raise InputError(
                f"config.model.rope.{name} must have {rotated // 2} numbers, one per rotated pair, "
                f"got {given}"
            )
    if rope.scaling in ("linear", "dynamic", "llama3") and rope.factor is None:
        raise InputError(
            f"config.model.rope.factor is missing, which scaling {rope.scaling!r} needs; set it"
        )
    if rope.scaling == "llama3" and rope.low_frequency >= rope.high_frequency:
        raise InputError(
            f"config.model.rope.low_frequency must be below high_frequency = {rope.high_frequency}"
            f", got {rope.low_frequency}"
        )
    if rope.scaling == "yarn" and rope.beta_slow > rope.beta_fast:
        raise InputError(
            f"config.model.rope.beta_slow must be at most beta_fast = {rope.beta_fast}, got "
            f"{rope.beta_slow}"
        )


def rotated_width(rope: RopeConfig, head_width: int) -> int:
    """Returns R, the number of rotated numbers of a head."""
    return int(head_width * rope.share)


def rotation(
    config: ModelConfig, head_width: int, positions_BxL: Int[Array, "B L"]
) -> tuple[Float[Array, "B L 1 R/2"], Float[Array, "B L 1 R/2"]]:
    """Returns the cosine and sine of the rotation of each pair at each position, float32.

    Args:
        config: Config of the model with the settings in `rope`.
        head_width: Width K of a head.
        positions_BxL: Int32 positions. "dynamic" and "longrope" scale by the largest position in
            the batch, as in Hugging Face's implementation.
    """
    frequencies_R, factor = frequencies(config, head_width, positions_BxL.max() + 1)
    angles_BxLx1xR = positions_BxL.astype(jnp.float32)[..., None, None] * frequencies_R
    return jnp.cos(angles_BxLx1xR) * factor, jnp.sin(angles_BxLx1xR) * factor


def rotate(
    x_BxLxHxK: Float[Array, "B L H K"],
    turn: tuple[Float[Array, "B L 1 R/2"], Float[Array, "B L 1 R/2"]],
) -> Float[Array, "B L H K"]:
    """Rotates the first R numbers of each head in pairs (i, i + R/2); preserves the dtype."""
    cos, sin = turn
    half = cos.shape[-1]
    x = x_BxLxHxK.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x_BxLxHxK.dtype)


def frequencies(
    config: ModelConfig, head_width: int, length: Int[Array, ""] | int
) -> tuple[Float[Array, " R/2"], float]:
    """Returns the frequencies for a text, and the scale of cosine and sine.

    Args:
        config: Config of the model.
        head_width: Width K of a head.
        length: Number of tokens of the longest text, which may be traced.

    >>> values, factor = frequencies(ModelConfig(positions="rope"), 4, 10)
    >>> [round(float(f), 4) for f in values], factor
    ([1.0, 0.01], 1.0)
    """
    rope, context = config.rope, config.context
    rotated = rotated_width(rope, head_width)
    exponents_R = np.arange(0, rotated, 2) / rotated
    plain_R = rope.theta**-exponents_R
    original = rope.original_context or context
    factor = rope.factor if rope.factor is not None else context / original
    # Scale the frequencies; see the module docstring for the formulas.
    if rope.scaling == "linear":
        return jnp.asarray(plain_R / factor, jnp.float32), 1.0
    if rope.scaling == "dynamic":
        stretched = factor * jnp.maximum(length, original) / original - (factor - 1)
        theta = rope.theta * stretched ** (rotated / (rotated - 2))
        return theta ** -jnp.asarray(exponents_R, jnp.float32), 1.0
    if rope.scaling == "yarn":
        ramp_R = _yarn_ramp(rope, rotated, original)
        mixed_R = plain_R / factor * ramp_R + plain_R * (1 - ramp_R)
        return jnp.asarray(mixed_R, jnp.float32), _yarn_attention(rope, factor)
    if rope.scaling == "llama3":
        # Interpolation weight: 1 where high_frequency wavelengths fit into the original context.
        fits_R = original * plain_R / (2 * math.pi)
        smooth_R = (fits_R - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        smooth_R = np.clip(smooth_R, 0, 1)
        mixed_R = (1 - smooth_R) * plain_R / factor + smooth_R * plain_R
        return jnp.asarray(mixed_R, jnp.float32), 1.0
    if rope.scaling == "longrope":
        short_R = jnp.asarray(plain_R / np.array(rope.short_factors), jnp.float32)
        long_R = jnp.asarray(plain_R / np.array(rope.long_factors), jnp.float32)
        chosen_R = jnp.where(jnp.asarray(length) > original, long_R, short_R)
        return chosen_R, _longrope_attention(rope, factor, original)
    return jnp.asarray(plain_R, jnp.float32), 1.0


def _yarn_ramp(rope: RopeConfig, rotated: int, original: int) -> np.ndarray:
    """Returns the fraction of each pair's frequency to divide: 0 for fast pairs, 1 for slow."""

    def pair(turns: float) -> float:  # the pair that makes so many turns over the original context
        of_base = 2 * math.log(rope.theta)
        return rotated * math.log(original / (turns * 2 * math.pi)) / of_base

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high += 0.001 * (low == high)
    return np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def by(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all:
        return by(rope.mscale) / by(rope.mscale_all)
    return by(1.0)


def _longrope_attention(rope: RopeConfig, factor: float, original: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
