"""A masked weight with a gradient of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from swe_prune import tree


def stopped(values: PyTree) -> PyTree:
    """Returns a pytree through whose arrays no gradient goes."""
    return tree.map_named(
        lambda _, leaf: jax.lax.stop_gradient(leaf) if tree.is_weight(leaf) else leaf, values
    )


# A derivative rule: w + stop_gradient(w · m − w) would make NaN of an infinity, and custom_vjp has
# no forward mode, which Hessian-vector products need.
@jax.custom_jvp
def masked(
    weight: Float[Array, "..."], keep: Bool[Array, "..."], score: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """Returns W' = W ⊙ M, whose gradient goes straight through the mask.

    Without a score ∂W' = ∂W, as if there was no mask. With one ∂W' = M ⊙ ∂W + W ⊙ ∂S: the weight
    has the gradient of a masked one, and the score receives what the mask takes away.

    Args:
        weight: Weight W.
        keep: Mask M, True where the weight stays.
        score: Score S that the mask was made from, or None.
    """
    return jnp.where(keep, weight, 0)


@masked.defjvp
def _(primals: Any, tangents: Any) -> Any:
    weight, keep, score = primals
    moved, _, rescored = tangents
    if score is not None:
        moved = jnp.where(keep, moved, 0) + weight * rescored.astype(weight.dtype)
    return masked(weight, keep, score), moved
