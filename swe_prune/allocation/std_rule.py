"""The paper's std rule, and conversions between its rates and sparsities.

The std rule thresholds each tensor at a multiple, the rate, of the standard deviation of its scores
(arXiv 2502.17071: σ(|W|) · PruneRate; unbiased, like torch.std). The rate is not a sparsity: the
fraction removed depends on the distribution of the scores. The functions here convert between them.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from swe_prune import counting, select, tree
from swe_prune.allocation.groups import scored
from swe_prune.allocation.rounding import Allocation, check_sparsity, removed_count, round_to_total
from swe_prune.arguments import checked
from swe_prune.errors import InputError

_HALF_NORMAL_STD = math.sqrt(1 - 2 / math.pi)  # std of |x| for x ~ N(0, 1): 0.6028


@checked
def gaussian_sparsity(rate: float) -> float:
    """Returns the sparsity of `by_std(rate)` on a zero-mean Gaussian tensor.

    P(|x| ≤ rate · std(|x|)) = erf(rate · 0.6028 / √2).

    >>> round(gaussian_sparsity(1.0), 4), round(gaussian_sparsity(2.0), 3)
    (0.4534, 0.772)
    """
    return 2 * NormalDist().cdf(rate * _HALF_NORMAL_STD) - 1


@checked
def gaussian_rate(sparsity: float) -> float:
    """Returns the rate at which `by_std` reaches a sparsity on a zero-mean Gaussian tensor.

    Raises:
        InputError: If the sparsity is outside [0, 1).

    >>> round(gaussian_rate(0.6), 3)
    1.396
    """
    check_sparsity(sparsity)
    return NormalDist().inv_cdf((1 + sparsity) / 2) / _HALF_NORMAL_STD


def std_threshold(
    score: Float[Array, "..."],
    rate: float | Array,
    spread: Any = None,
    copies: tuple[int, ...] = (),
) -> Array:
    """Returns the threshold spread · rate of one tensor, by default with std(score, ddof=1).

    A score of −inf, of a weight that was removed before, counts as 0. With copies, a threshold for
    each, which broadcasts against the scores.
    """
    if spread is None:
        score = jnp.where(score == -jnp.inf, 0, score)
    if spread is None and copies:
        axes = tuple(axis for axis in range(score.ndim) if axis not in copies)
        size = math.prod(score.shape[axis] for axis in axes)
        spread = jnp.std(score, axis=axes, ddof=min(1, size - 1), keepdims=True)
    elif spread is None:
        # A single element has spread 0, like any constant tensor.
        spread = jnp.std(score, ddof=min(1, score.size - 1))
    return spread * jnp.asarray(rate, jnp.float32)


def reject_no_spread(names: Sequence[str], undefined: Sequence[Array]) -> None:
    """Raises InputError naming the first tensor without a finite spread.

    Args:
        names: Names of the tensors.
        undefined: Whether the spread is undefined, for each tensor.
    """
    for name, without in zip(names, jax.device_get(list(undefined)), strict=True):
        if without:
            raise InputError(
                f"the scores of {name!r} have no standard deviation, because some are +inf or "
                "their squares overflow; find out where the weights diverged, or prune by sparsity"
            )


def spreads(
    scores: Sequence[Array], spread: Any = None, copies: Sequence[tuple[int, ...]] | None = None
) -> tuple[list[Array], list[Array], list[Array]]:
    """Returns per tensor: spread, NaN count, and whether the spread is undefined.

    Args:
        scores: Float32 arrays.
        spread: Spread to use for all tensors. If None, the standard deviation of each.
        copies: Axes over copies of each tensor, each copy with a spread of its own.
    """
    stacked = [()] * len(scores) if copies is None else copies
    of_each = [
        std_threshold(score, 1.0, spread, axes) for score, axes in zip(scores, stacked, strict=True)
    ]
    nans = [counting.count_each([jnp.isnan(score)])[0] for score in scores]
    return of_each, nans, [jnp.any(~jnp.isfinite(of_one)) for of_one in of_each]


_spreads = jax.jit(spreads)


@jax.jit
def _kept_each(scores: list[Array], rate: Array, of_each: list[Array]) -> list[counting.Count]:
    return [
        counting.count_true([score > s * rate]) for score, s in zip(scores, of_each, strict=True)
    ]


@jax.jit
def _kept(scores: list[Array], rate: Array, of_each: list[Array]) -> counting.Count:
    return counting.total(_kept_each(scores, rate, of_each))


@checked
def rate_for_sparsity(
    scores: PyTree, sparsity: float, *, spread: float | None = None
) -> tuple[float, float]:
    """Returns (rate, achieved): the std rule's rate nearest to a sparsity, and its sparsity.

    Sparsity is a step function of the rate, so a bisection over the float32 rates finds the one
    nearest to the wanted count. Ties or coarse scores may keep it from being met exactly. If no
    finite rate removes more (a tensor of equal scores has spread 0), the rate is the smallest of
    the nearest ones.

    Args:
        scores: Float32 pytree, None where dense.
        sparsity: Fraction of all the scored weights to remove, in [0, 1).
        spread: Spread to use for all tensors. If None, the standard deviation of each tensor.

    Raises:
        InputError: If the sparsity is outside [0, 1), there are no scores, or scores have NaN or no
            standard deviation.
    """
    search = _Search(scores, sparsity, spread)
    above = search.smallest_removing(search.wanted)
    below = search.smallest_removing(search.removed(max(above - 1, 0)))
    best = min((below, above), key=lambda bits: (abs(search.removed(bits) - search.wanted), bits))
    return float(_float_of(best)), search.removed(best) / search.total


@checked
def std(scores: PyTree, sparsity: float, *, spread: float | None = None) -> Allocation:
    """Returns the allocation of the std rule at the rate that meets a sparsity.

    Tensor l loses the number of scores ≤ rate · std(scores_l), as with `masks.by_std`. If ties keep
    every rate from the exact total, each count is interpolated linearly between the last rate below
    the total and the first rate above it.

    Args:
        scores: Float32 pytree, None where dense.
        sparsity: Fraction of all the scored weights to remove, in [0, 1).
        spread: Spread to use for all tensors. If None, the standard deviation of each tensor.

    Raises:
        InputError: If the sparsity is outside [0, 1) or no rate reaches it (a tensor of equal
            scores has spread 0), there are no scores, or scores have NaN or no standard deviation.

    >>> std({"a": jnp.arange(8.0), "b": jnp.array([3.0, 4.0])}, 0.5).removed
    {'a': 5, 'b': 0}
    """
    search = _Search(scores, sparsity, spread)
    above = search.smallest_removing(search.wanted)
    most = search.removed_each(above)
    least = search.removed_each(above - 1) if above else [0] * len(most)
    if sum(most) < search.wanted:
        raise InputError(
            f"sparsity {sparsity} is out of reach of the std rule, which removes at most "
            f"{sum(most)} of {search.total} weights here, because tensors of equal scores have "
            "spread 0; use another rule for them"
        )
    # Interpolate between the counts at the two neighbouring rates.
    way = (search.wanted - sum(least)) / max(sum(most) - sum(least), 1)
    targets = {
        name: low + way * (high - low)
        for name, low, high in zip(search.sizes, least, most, strict=True)
    }
    return round_to_total(targets, search.sizes, sparsity)


class _Search:
    """Bisection over the rate, on checked scores.

    A rate is given as the bits of a float32, which order like positive floats.
    """

    def __init__(self, scores: PyTree, sparsity: float, spread: float | None):
        check_sparsity(sparsity)
        named = scored(scores)
        self.leaves = list(named.values())
        self.of_each, nans, undefined = _spreads(self.leaves, spread)
        select.reject_nan(list(named), nans)
        reject_no_spread(list(named), undefined)
        self.sizes = {name: tree.size(leaf) for name, leaf in named.items()}
        self.total = sum(self.sizes.values())
        self.wanted = removed_count(self.total, sparsity)

    def removed(self, bits: int) -> int:
        return self.total - int(_kept(self.leaves, _float_of(bits), self.of_each))

    def removed_each(self, bits: int) -> list[int]:
        kept = jax.device_get(_kept_each(self.leaves, _float_of(bits), self.of_each))
        return [size - int(n) for size, n in zip(self.sizes.values(), kept, strict=True)]

    def smallest_removing(self, least: int) -> int:
        # The number removed grows with the rate, so bisect the bits of the rate.
        low, high = -1, _LARGEST_BITS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.removed(middle) < least else (low, middle)
        return high


_LARGEST_BITS = 0x7F7FFFFF  # of the largest finite float32


def _float_of(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)
