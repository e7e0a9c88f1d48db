"""The paper's std rule, and its rates against sparsities.

The std rule thresholds each tensor at a multiple of the standard deviation of its own scores
(arXiv 2502.17071: σ(|W|) · PruneRate; unbiased, as torch.std). The rate is no sparsity: what is
removed follows from the distribution. The helpers go from one to the other.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from swe_prune import select, tree
from swe_prune.allocation.count import check_sparsity, removed_count
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


def std_threshold(score: Float[Array, "..."], rate: float | Array, spread: Any = None) -> Array:
    """Returns the threshold of one tensor, spread · rate; spread None: std(score, ddof=1)."""
    if spread is None:
        # Of one element there is no spread: 0, as for any constant tensor.
        spread = jnp.std(score, ddof=min(1, score.size - 1))
    return spread * jnp.asarray(rate, jnp.float32)


def reject_no_spread(names: Sequence[str], undefined: Sequence[Array]) -> None:
    """Raises InputError that names the first tensor without a finite spread."""
    for name, without in zip(names, jax.device_get(list(undefined)), strict=True):
        if without:
            raise InputError(
                f"the scores of {name!r} have no standard deviation, as some are infinite or their "
                "squares overflow; find out where the weights diverged, or prune by sparsity"
            )


def spreads(
    scores: Sequence[Array], spread: Any = None
) -> tuple[list[Array], list[Array], list[Array]]:
    """Returns of each tensor its spread, how many NaN it has, and whether it has no spread."""
    of_each = [std_threshold(score, 1.0, spread) for score in scores]
    nans = [tree.count_each([jnp.isnan(score)])[0] for score in scores]
    return of_each, nans, [~jnp.isfinite(of_one) for of_one in of_each]


_spreads = jax.jit(spreads)


@jax.jit
def _kept(scores: list[Array], rate: Array, of_each: list[Array]) -> tree.Count:
    return tree.count_true([score > s * rate for score, s in zip(scores, of_each, strict=True)])


def rate_for_sparsity(
    scores: PyTree, sparsity: float, *, spread: float | None = None
) -> tuple[float, float]:
    """Returns (rate, achieved): the std rule's rate nearest to a sparsity of all the tensors.

    Sparsity grows with the rate in steps, so a search over the float32 rates ends at the one beside
    the wanted count; ties or coarse scores may keep it from being met, and `achieved` says what
    is. Where no finite rate removes more (a tensor of equal scores has no spread to multiply), the
    rate is the smallest that comes nearest.

    Args:
        scores: float32 pytree, None where dense.
        sparsity: share to remove of all the scored weights, in [0, 1).
        spread: as in `masks.by_std`.

    Raises:
        InputError: sparsity outside [0, 1), no scores, NaN among them, or scores without a
            standard deviation.
    """
    check_sparsity(sparsity)
    named = {name: leaf for name, leaf in tree.named_leaves(scores) if leaf is not None}
    leaves = list(named.values())
    total = sum(map(tree.size, leaves))
    if not total:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    of_each, nans, undefined = _spreads(leaves, spread)
    select.reject_nan(list(named), nans)
    reject_no_spread(list(named), undefined)

    def removed(bits: int) -> int:
        return total - int(_kept(leaves, _float_of(bits), of_each))

    def smallest_removing(least: int) -> int:
        """The float32 rate, as its bits, which order as positive floats do."""
        low, high = -1, _LARGEST_BITS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if removed(middle) < least else (low, middle)
        return high

    wanted = removed_count(total, sparsity)
    above = smallest_removing(wanted)
    below = smallest_removing(removed(max(above - 1, 0)))
    best = min((below, above), key=lambda bits: (abs(removed(bits) - wanted), bits))
    return float(_float_of(best)), removed(best) / total


_LARGEST_BITS = 0x7F7FFFFF  # of the largest finite float32


def _float_of(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)
