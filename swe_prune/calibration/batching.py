"""What calibration asks of a batch: arrays whose first axis runs over the sequences."""

from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune.errors import InputError


def sequences(batch: PyTree, number: int) -> int:
    """Returns the length of the leading axis that all arrays of a batch share.

    Args:
        batch: pytree; leaves without axes are passed over.
        number: of the batch, from 0, for errors.

    Raises:
        InputError: no array, an empty one, or two that differ.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}
    if len(lengths) != 1 or lengths == {0}:
        raise InputError(
            f"calibration batch {number} is {described(batch)}; give arrays that share a leading "
            "axis over one sequence or more"
        )
    return lengths.pop()


def nothing_given() -> InputError:
    """Returns the error for an empty calibration set."""
    return InputError(
        "the calibration set is empty; give one batch or more (a generator that was used up "
        "gives none: make it anew)"
    )


def described(batch: PyTree) -> str:
    """Returns the dtypes and shapes of a batch, for errors.

    >>> import numpy as np
    >>> described({"inputs": np.zeros((2, 3), np.int32)})
    "{'inputs': 'int32[2, 3]'}"
    """

    def one(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)

    return str(jax.tree.map(one, batch))


def shapes(tree: PyTree) -> PyTree:
    """Returns the abstract arrays of a pytree; what is no array stays."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf
        ),
        tree,
    )
