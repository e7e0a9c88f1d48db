"""Choice of the next token from the logits: greedy or sampled."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings, applied in the order temperature, top_k, top_p.

    Attributes:
        greedy: Whether to take the likeliest token, of equal ones the first in the vocabulary.
        temperature: Divisor of the logits.
        top_k: Number of likeliest tokens to sample from. If None, all.
        top_p: Probability mass of the smallest set of likeliest tokens to sample from (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751). If None, all.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, None, None):
            raise InputError(
                "greedy decoding does not sample, so temperature, top_k and top_p have no effect; "
                "leave them out, or greedy"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(
                f"temperature must be a finite number above 0, got {self.temperature}; for the "
                "likeliest token give greedy=True"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be 1 or more, or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], or None, got {self.top_p}")


GREEDY = Sampling(greedy=True)


def draw(
    logits_BxV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Returns the next token of each row, int32; of equal logits the first counts as likelier.

    Args:
        logits_BxV: Float32 logits.
        keys_B: Random key for each row.
        sampling: Sampling settings.
    """
    if sampling.greedy:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    scaled_BxV = logits_BxV / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(keys_B, scaled_BxV).astype(jnp.int32)
    # Sort the likeliest tokens; without top_k, all of them.
    kept = min(sampling.top_k or logits_BxV.shape[-1], logits_BxV.shape[-1])
    likeliest_BxK, ids_BxK = jax.lax.top_k(scaled_BxV, kept)
    if sampling.top_p is not None and sampling.top_p < 1:
        # Retain a token if those before it have less than top_p, and always the first.
        p_BxK = jax.nn.softmax(likeliest_BxK, axis=-1)
        before_BxK = jnp.cumsum(p_BxK, axis=-1) - p_BxK
        inside_BxK = (before_BxK < sampling.top_p).at[:, 0].set(True)
        likeliest_BxK = jnp.where(inside_BxK, likeliest_BxK, -jnp.inf)
    at_B = jax.vmap(jax.random.categorical)(keys_B, likeliest_BxK)
    return jnp.take_along_axis(ids_BxK, at_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
