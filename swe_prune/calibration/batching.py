"""Checks of calibration batches, whose arrays share a first axis over the sequences."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.errors import InputError, shown


def each(batches: Any) -> Iterator[PyTree]:
    """Returns the iterator over calibration batches.

    Raises:
        InputError: If it is one batch, whose rows or keys would be taken for batches, or nothing
            to iterate over.
    """
    is_array = hasattr(batches, "shape")
    # A loader may have __getitem__ alone.
    iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if is_array or isinstance(batches, Mapping | str) or not iterable:
        raise InputError(
            "calibration takes batches, such as a list of them, got "
            f"{tree.described(batches) if is_array else f'a {type(batches).__name__}'}; give "
            "[batch], or list(batches) of an array that stacks them"
        )
    return iter(batches)


def sequences(batch: PyTree, number: int) -> int:
    """Returns the length of the leading axis that all arrays of a batch share.

    Args:
        batch: Pytree of arrays; leaves without axes are ignored.
        number: Index of the batch, from 0, for error messages.

    Raises:
        InputError: If there is no array, an array is empty, or the leading axes differ.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}
    if len(lengths) != 1 or lengths == {0}:
        raise InputError(
            f"calibration batch {number} must hold arrays that share a leading axis over one or "
            f"more sequences, got {tree.described(batch)}"
        )
    return lengths.pop()


def check_arrays(what: str, values: PyTree) -> None:
    """Raises InputError if a leaf is not an array, which a compiled program cannot take."""
    for name, leaf in tree.named_leaves(values):
        dtype = getattr(leaf, "dtype", None)
        if leaf is not None and (dtype is None or str(dtype).startswith(("<U", "|S", "object"))):
            where = f" at {tree.short(name)!r}" if name else ""
            raise InputError(f"{what} must hold arrays alone, got {shown(leaf)}{where}")


def nothing_given() -> InputError:
    """Returns the error for an empty calibration set."""
    return InputError(
        "the calibration set is empty; give one or more batches (an exhausted generator yields "
        "none: create it again)"
    )


def shapes(tree: PyTree) -> PyTree:
    """Replaces the arrays of a pytree by abstract arrays; other leaves stay."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, _dtype(leaf)) if hasattr(leaf, "shape") else leaf
        ),
        tree,
    )


def _dtype(leaf: Any) -> Any:
    """Returns the dtype that JAX gives an array, such as int32 for NumPy's int64."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf.dtype
    return jax.dtypes.canonicalize_dtype(leaf.dtype)


def counted_rows(batch: PyTree, rows: int) -> Array | None:
    """Returns which rows of an activation count, bool, or None if all do.

    Padding is where batch["weights"] is 0, of a batch that has a weight for each row.

    Args:
        batch: Batch that the activation was computed from.
        rows: Number of rows of the activation, its sequences one after the other.
    """
    weights = batch.get("weights") if isinstance(batch, Mapping) else None
    if weights is None or jnp.size(weights) != rows:
        return None
    return jnp.reshape(weights, -1) > 0
