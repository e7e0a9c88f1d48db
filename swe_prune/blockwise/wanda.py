"""Wanda's masks: what goes of each output, by scores |w| ‖X‖ or any others.

Source: Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language
models", ICLR 2024; https://github.com/locuslab/wanda. Their weight is (out, in) and a row is an
output; here scores are (in, out) and an output is a column.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from swe_prune import allocation, counting, select

TOLERANCE = 1e-3
"""How near the variant comes to the sparsity, and how narrow its bracket becomes."""


def wanda_mask(score_RxC: Float[Array, "R C"], sparsity: float) -> Bool[Array, "R C"]:
    """Returns the mask that removes the floor(R · sparsity) lowest scores of each output.

    Of ties the first inputs go, as in the reference's stable sort; `masks.by_sparsity` with scope
    "row" lets the first ones stay.

    Raises:
        InputError: a sparsity outside [0, 1), or NaN scores.

    >>> wanda_mask(jnp.array([[1.0], [1.0], [3.0]]), 0.5).ravel().tolist()
    [False, True, True]
    """
    allocation.check_sparsity(sparsity)
    keep = len(score_RxC) - int(len(score_RxC) * sparsity)
    mask_RxC, nans = _highest(score_RxC, keep)
    if not isinstance(nans, Tracer):
        select.reject_nan(["scores"], [nans])
    return mask_RxC


@jax.jit  # as one program, which takes less time to compile than each of its operations alone
def _highest(score_RxC: Array, keep: Array) -> tuple[Array, Array]:
    mask_RxC = select.top_k_mask(score_RxC[::-1], keep, axes=(0,))[::-1]
    return mask_RxC, counting.count_each([jnp.isnan(score_RxC)])[0]


def wanda_variant_mask(score_RxC: Float[Array, "R C"], sparsity: float) -> Bool[Array, "R C"]:
    """Returns the mask that removes of each output what makes up a share α of its scores.

        α · Σ_j score_j ≥ Σ of the lowest, as many as fit

    One α for all outputs, bisected in [0, 0.8] from 0.4 until the sparsity of the whole is within
    0.001 of what is asked, or the bracket is narrower than that: the count is not exact, outputs
    differ in it, and a sparsity beyond what α = 0.8 gives is not reached. Of ties the first inputs
    go; the reference removes all that tie with the last to go.

    Raises:
        InputError: a sparsity outside [0, 1), or NaN scores.

    >>> wanda_variant_mask(jnp.array([[1.0], [2.0], [3.0], [9.0]]), 0.5).ravel().tolist()
    [False, False, True, True]
    """
    allocation.check_sparsity(sparsity)
    select.top_k_mask(score_RxC, 0)  # refuses NaN
    return _variant(score_RxC, jnp.float32(sparsity))


@jax.jit
def _variant(score_RxC: Array, sparsity: Array) -> Array:
    order_RxC = jnp.argsort(score_RxC, axis=0, stable=True)
    rank_RxC = jnp.argsort(order_RxC, axis=0)
    cumulative_RxC = jnp.cumsum(jnp.take_along_axis(score_RxC, order_RxC, axis=0), axis=0)
    total_C = score_RxC.sum(axis=0)

    def gone(alpha: Array) -> Array:
        return jnp.sum(cumulative_RxC <= alpha * total_C, axis=0)

    def share(alpha: Array) -> Array:
        return jnp.sum(gone(alpha)) / score_RxC.size

    def far(state: tuple[Array, Array, Array]) -> Array:
        alpha, low, high = state
        return (jnp.abs(share(alpha) - sparsity) > TOLERANCE) & (high - low >= TOLERANCE)

    def halve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        alpha, low, high = state
        above = share(alpha) > sparsity
        low, high = jnp.where(above, low, alpha), jnp.where(above, alpha, high)
        return (low + high) / 2, low, high

    start = (jnp.float32(0.4), jnp.float32(0.0), jnp.float32(0.8))
    alpha, _, _ = jax.lax.while_loop(far, halve, start)
    return rank_RxC >= gone(alpha)
