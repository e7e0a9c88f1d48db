"""Criteria of the final weights alone: the baselines of every comparison."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("magnitude")
def magnitude(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """|w|: the final magnitude.

    When: the baseline of every comparison, and the choice when there is nothing but weights.
    Source: Han, Pool, Tran and Dally, NeurIPS 2015.
    """
    return jnp.abs(weight)


@register("random")
def random(key: Array, weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """U(0, 1): what pruning costs when nothing is known of a weight.

    When: the floor of every comparison.
    Source: this project.
    """
    return jax.random.uniform(key, weight.shape)


@register("lamp", sorts=True)
def lamp(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """w² / Σ of the squares that are not smaller: layer-adaptive magnitude for global selection.

    Within a tensor it ranks as `magnitude`; between tensors it evens out their scales. Among equal
    weights the later ones by flat index count as larger.

    When: for global selection when there is nothing but weights.
    Source: Lee, Park, Mo, Ahn and Shin, ICLR 2021.
    """
    square = jnp.ravel(weight) ** 2
    order = jnp.argsort(square, stable=True)
    ascending = square[order]
    not_smaller = jax.lax.cumsum(ascending, reverse=True)
    ascending = jnp.where(ascending > 0, ascending / not_smaller, 0.0)
    return jnp.zeros_like(square).at[order].set(ascending).reshape(weight.shape)
