"""Wanda's masks: the lowest scores of each output are removed, by |w| ‖X‖ or any other score.

Source: Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language
models", ICLR 2024; https://github.com/locuslab/wanda. Their weight is (out, in) and a row is an
output; here scores are (in, out) and an output is a column.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from swe_prune import allocation, masks, select
from swe_prune.arguments import checked

TOLERANCE = 1e-3
"""Largest distance of the variant from the sparsity, and smallest width of its bracket."""


@checked
def wanda_mask(
    score_RxC: Float[Array, "R C"],
    sparsity: float,
    *,
    rounding: str = "nearest",
    ties: str = "first",
) -> Bool[Array, "R C"]:
    """Returns the mask that removes the same number of lowest scores from each output.

    The same as `masks.by_sparsity` with scope "row", with the same defaults, so that pruning block
    after block and pruning at once can be compared. The reference rounds down and keeps the last
    of equal scores, as `rounding="down", ties="last"` does and `prune_blocks` passes.

    Args:
        score_RxC: Scores of a kernel, inputs by outputs.
        sparsity: Share of each output's inputs to remove, in [0, 1).
        rounding: Rounding of the number to remove, one of `masks.ROUNDINGS`.
        ties: Which of equal scores are kept, "first" or "last".

    Raises:
        InputError: The sparsity is outside [0, 1), a name is unknown, or a score is NaN.

    >>> wanda_mask(jnp.array([[1.0], [1.0], [3.0]]), 0.5).ravel().tolist()
    [False, False, True]
    >>> reference = {"rounding": "down", "ties": "last"}
    >>> wanda_mask(jnp.array([[1.0], [1.0], [3.0]]), 0.5, **reference).ravel().tolist()
    [False, True, True]
    """
    return masks.by_sparsity(
        {"scores": score_RxC},
        sparsity,
        "row",
        rounding=rounding,
        ties=ties,
        input_axes=lambda name, shape: (0,),
    )["scores"]


@checked
def wanda_variant_mask(score_RxC: Float[Array, "R C"], sparsity: float) -> Bool[Array, "R C"]:
    """Returns the mask that removes the lowest scores of each output up to a share α of their sum.

        Σ of the removed scores ≤ α · Σ_j score_j

    All outputs share one α, bisected in [0, 0.8] from 0.4 until the sparsity of the matrix is
    within 0.001 of the request, or the bracket is narrower than that. So the count is not exact,
    outputs differ in it, and a sparsity above that of α = 0.8 is not reached. Of equal scores the
    first inputs are removed; the reference removes all that tie with the last one removed.

    Args:
        score_RxC: Scores of a kernel, inputs by outputs.
        sparsity: Share of the matrix to remove, in [0, 1).

    Raises:
        InputError: The sparsity is outside [0, 1), or a score is NaN.

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
