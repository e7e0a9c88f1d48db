"""The shape of what goes. Unstructured needs nothing; n:m keeps n of every m inputs."""

import math
import re

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from swe_prune import select
from swe_prune.errors import InputError


def parse_n_of_m(pattern: str) -> tuple[int, int]:
    """Returns (n, m) of "n:m", which keeps n of every m.

    Raises:
        InputError: malformed, or n not between 1 and m.

    >>> parse_n_of_m("2:4")
    (2, 4)
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"pattern {pattern!r} is not 'n:m' with 1 ≤ n ≤ m; give e.g. '2:4'")
    return int(match[1]), int(match[2])


def n_of_m_mask(
    score_RxC: Float[Array, "R C"], n: int, m: int, name: str = "scores"
) -> Bool[Array, "R C"]:
    """Returns the mask that keeps the n largest of every m consecutive inputs of each output.

    Ties are broken by the lower input index.

    Args:
        score_RxC: scores of a kernel, inputs along the first axis.
        n: kept of each group, 1 ≤ n ≤ m.
        m: group size; must divide R.
        name: what an error calls the scores.
    """
    rows, columns = score_RxC.shape
    grouped = score_RxC.reshape(rows // m, m, columns)
    return select.top_k_mask(grouped, n, axes=(1,), name=name).reshape(rows, columns)


def check_divides(name: str, inputs: int, m: int) -> None:
    """Raises InputError when groups of m do not fill the inputs of a kernel."""
    if inputs % m:
        raise InputError(
            f"{name!r} has {inputs} inputs, which groups of {m} do not divide; "
            "exclude it or choose another m"
        )


def as_matrix(score: Float[Array, "..."], inputs: tuple[int, ...]) -> Float[Array, "R C"]:
    """Returns a kernel as (inputs, outputs), given the axes along which its inputs run."""
    return jnp.transpose(score, _inputs_first(score.ndim, inputs)).reshape(
        math.prod(score.shape[axis] for axis in inputs), -1
    )


def from_matrix(
    mask_RxC: Bool[Array, "R C"], shape: tuple[int, ...], inputs: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Returns what `as_matrix` made a matrix of, back in the kernel's shape."""
    order = _inputs_first(len(shape), inputs)
    back = [order.index(axis) for axis in range(len(shape))]
    return mask_RxC.reshape([shape[axis] for axis in order]).transpose(back)


def _inputs_first(ndim: int, inputs: tuple[int, ...]) -> list[int]:
    return [*inputs, *(axis for axis in range(ndim) if axis not in inputs)]
