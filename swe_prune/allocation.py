"""How much to take where: the paper's std rule, and rates against sparsities.

The std rule thresholds each tensor at a multiple of the standard deviation of its own scores
(arXiv 2502.17071: σ(|W|) · PruneRate; unbiased, as torch.std). The rate is no sparsity: what is
removed follows from the distribution. The helpers go from one to the other.
"""

import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.errors import InputError

_HALF_NORMAL_STD = math.sqrt(1 - 2 / math.pi)  # std of |x| for x ~ N(0, 1): 0.6028


def gaussian_sparsity(rate: float) -> float:
    """Returns the share that `by_std(rate)` removes of a zero-mean Gaussian tensor.

    P(|x| ≤ rate · std(|x|)) = erf(rate · 0.6028 / √2).

    >>> round(gaussian_sparsity(1.0), 4), round(gaussian_sparsity(2.0), 3)
    (0.4534, 0.772)
    """
    return 2 * NormalDist().cdf(rate * _HALF_NORMAL_STD) - 1


def gaussian_rate(sparsity: float) -> float:
    """Returns the rate at which `by_std` removes a share of a zero-mean Gaussian tensor.

    Raises:
        InputError: sparsity outside [0, 1).

    >>> round(gaussian_rate(0.6), 3)
    1.396
    """
    check_sparsity(sparsity)
    return NormalDist().inv_cdf((1 + sparsity) / 2) / _HALF_NORMAL_STD


def check_sparsity(sparsity: Any) -> None:
    """Raises InputError for a sparsity outside [0, 1)."""
    if isinstance(sparsity, jax.Array) or not 0 <= sparsity < 1:
        raise InputError(
            f"sparsity = {sparsity!r} is no share in [0, 1); give the share of weights to remove"
        )


def removed_count(size: int, sparsity: float) -> int:
    """Returns how many of `size` elements a sparsity removes: the nearest integer, halves up.

    (Wanda and SparseGPT round down, which differs only where size · sparsity is no integer.)

    >>> removed_count(10, 0.25), removed_count(100, 0.29)
    (3, 29)
    """
    return int(size * sparsity + 0.5)


def std_threshold(score: Float[Array, "..."], rate: float | Array, spread: Any = None) -> Array:
    """Returns the threshold of one tensor, spread · rate; spread None: std(score, ddof=1)."""
    if spread is None:
        # Of one element there is no spread: 0, as for any constant tensor.
        spread = jnp.std(score, ddof=min(1, score.size - 1))
    return spread * jnp.asarray(rate, jnp.float32)


@jax.jit
def _kept(scores: list[Array], rate: Array, spread: Any) -> tree.Count:
    return tree.count_true([score > std_threshold(score, rate, spread) for score in scores])


def rate_for_sparsity(
    scores: PyTree, sparsity: float, *, spread: float | None = None
) -> tuple[float, float]:
    """Returns (rate, achieved): the std rule's rate nearest to a sparsity of all the tensors.

    Sparsity grows with the rate in steps, so bisection ends at the float32 rate beside the wanted
    count; ties or coarse scores may keep it from being met, and `achieved` says what is.

    Args:
        scores: float32 pytree, None where dense.
        sparsity: share to remove of all the scored weights, in [0, 1).
        spread: as in `masks.by_std`.

    Raises:
        InputError: sparsity outside [0, 1) or no scores.
    """
    check_sparsity(sparsity)
    leaves = jax.tree.leaves(scores)
    total = sum(map(tree.size, leaves))
    if not total:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")

    def removed(rate: float) -> int:
        return total - int(_kept(leaves, jnp.float32(rate), spread))

    wanted = removed_count(total, sparsity)
    low, high = 0.0, 1.0
    while removed(high) < wanted:
        low, high = high, 2 * high
    while low < (middle := float(jnp.float32((low + high) / 2))) < high:
        low, high = (middle, high) if removed(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda rate: abs(removed(rate) - wanted))
    return best, removed(best) / total
