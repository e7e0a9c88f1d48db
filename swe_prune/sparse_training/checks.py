"""What all of sparse training asks of masks."""

from typing import Any

import jax.numpy as jnp

from swe_prune.errors import InputError


def check_fits(name: str, mask: Any, weight: Any, what: str = "weight") -> None:
    """Raises InputError for a mask that is not bool, or of another shape than what it belongs to.

    Args:
        name: of the tensor.
        mask: its mask.
        weight: an array, or None where one is missing.
        what: what an error calls the array.
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
