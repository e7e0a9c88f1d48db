"""Criteria of the final weights alone: the baselines of every comparison."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("magnitude")
def magnitude(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """|w|: the final magnitude (Han, Pool, Tran, Dally, NeurIPS 2015)."""
    return jnp.abs(weight)


@register("random")
def random(key: Array, weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """U(0, 1): what pruning costs when nothing is known of a weight."""
    return jax.random.uniform(key, weight.shape)
