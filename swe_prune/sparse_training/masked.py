"""A masked weight with a gradient of its own, and the check that a mask fits its weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from swe_prune.errors import InputError


def check_fits(name: str, mask: Any, weight: Any, what: str = "weight") -> None:
    """Raises InputError for a mask that is not bool or has another shape than its array.

    Args:
        name: Name of the tensor.
        mask: Mask of the tensor.
        weight: Array that the mask belongs to, or None where one is missing.
        what: Word for the array in error messages.
    """
    if not jnp.issubdtype(getattr(mask, "dtype", None) or object, jnp.bool_):
        raise InputError(
            f"the mask of {name!r} is of {getattr(mask, 'dtype', type(mask).__name__)}, not bool; "
            "give True where a weight stays"
        )
    if weight is None or jnp.shape(weight) != mask.shape:
        found = "none" if weight is None else f"of shape {jnp.shape(weight)}"
        raise InputError(
            f"the mask of {name!r} has shape {mask.shape} and the {what} is {found}; make both "
            "from the same parameters"
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
