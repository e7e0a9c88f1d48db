"""Scores in which only some of the weights take part."""

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from swe_prune import counting, select


def among(
    score: Float[Array, "..."], allowed: Bool[Array, "..."], name: str
) -> Float[Array, "..."]:
    """Returns float32 scores with −inf where a weight may not be chosen and more where it may.

    An allowed −inf becomes the lowest finite float, so that no selection of as many weights as
    are allowed reaches beyond them. While tracing so does a NaN, which cannot be refused there.

    Raises:
        InputError: a NaN, outside of a jit.
    """
    score = score.astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    # A NaN is not ≥ anything either.
    ranked = jnp.where(allowed, jnp.where(score >= lowest, score, lowest), -jnp.inf)
    if not isinstance(ranked, Tracer):  # constants of a program are traced by what is done to them
        select.reject_nan([name], counting.count_each([jnp.isnan(score)]))
    return ranked
