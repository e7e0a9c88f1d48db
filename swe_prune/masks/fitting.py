"""The check that a mask is one, and that it fits its weight."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.errors import InputError


def check_fits(name: str, mask: Any, weight: Any, what: str = "weight") -> None:
    """Raises InputError for a mask that is not bool or has another shape than its array.

    Args:
        name: Name of the tensor.
        mask: Mask of the tensor.
        weight: Array that the mask belongs to, or None where one is missing.
        what: Word for the array in error messages.
    """
    check_bool(name, mask)
    if weight is None or jnp.shape(weight) != jnp.shape(mask):
        found = "none" if weight is None else f"of shape {jnp.shape(weight)}"
        raise InputError(
            f"the mask of {tree.short(name)!r} must have the {what}'s shape, but is of shape "
            f"{jnp.shape(mask)} and the {what} is {found}; make both from the same parameters"
        )


def check_bool(name: str, mask: Any) -> None:
    """Raises InputError for a mask that is not a bool array, such as a score or a 0/1 float."""
    if isinstance(mask, bool):
        raise InputError(
            f"the mask of {tree.short(name)!r} is a single {mask}, not an array; give an element "
            "for each weight, or None where the tensor is dense"
        )
    dtype = getattr(mask, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.bool_):
        raise InputError(
            f"the mask of {tree.short(name)!r} is of "
            f"{type(mask).__name__ if dtype is None else dtype}, not bool; give True where a "
            "weight stays, as masks.by_sparsity makes of scores"
        )


def check_mask(mask: PyTree, params: PyTree | None = None) -> None:
    """Raises InputError for a mask that is none, or that is not one of these parameters.

    Args:
        mask: Bool pytree, None where dense.
        params: Pytree that the mask must fit, in whatever containers. None: any.
    """
    for name, leaf in tree.named_leaves(mask):
        if leaf is not None:
            check_bool(name, leaf)
    if params is not None:
        map_masked(lambda value, _: value, params, mask)


def map_masked(f: Callable[[Any, Any], Any], values: PyTree, mask: PyTree) -> PyTree:
    """Returns the tree of `f(value, mask)` where there is a mask; the other values as they are.

    Args:
        f: Function of an array and the mask of the same shape.
        values: Pytree of weights, gradients or scores; the result has its containers.
        mask: Bool pytree with the names of `values`, None where dense.

    Raises:
        InputError: If the names differ, a mask is not bool, or one has another shape.
    """

    def leaf(name: str, value: Any, keep: Any) -> Any:
        # A part that an outer optax.masked or multi_transform takes away has no value.
        if keep is None or tree.is_absent(value):
            return value
        check_fits(name, keep, value)
        return f(value, keep)

    return tree.map_leaves(leaf, values, mask)
