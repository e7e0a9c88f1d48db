"""SparseGPT: which weights of a kernel go, and how the others make up for them.

Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in
one-shot", ICML 2023; https://github.com/IST-DASLab/sparsegpt. Their weight is (out, in) and its
columns are inputs; here the kernel is (in, out) and the inputs are rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from swe_prune import allocation, counting, importance, patterns, select, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.importance import hessian

BLOCK = 128
"""How many inputs share a mask and an update of what comes after them, in the paper's runs."""


class SolverReport(NamedTuple):
    """What the solver did to a kernel: Python numbers, or arrays inside a jit.

    Attributes:
        damping: Share of the Hessian's mean diagonal that was added to factor it.
        dead: Number of inputs that were always 0, whose weights are now 0 whatever the mask says.
        removed: Number of weights that the mask removes.
        error: Σ e², what the removed weights cost: (2/n) ‖X (W − W')‖², and the damping's share.
    """

    damping: Any
    dead: Any
    removed: Any
    error: Any


@checked
def sparsegpt(
    weight_RxC: Float[Array, "R C"],
    hessian_RxR: Float[Array, "R R"],
    sparsity: float | None = None,
    pattern: str | None = None,
    block: int = BLOCK,
    damping: float = 0.01,
    zeros: str = "keep",
) -> tuple[Float[Array, "R C"], Bool[Array, "R C"], SolverReport]:
    """Returns a kernel pruned and updated to keep its outputs, its mask, and a report.

    In blocks of `block` inputs, with U of `hessian.inverse_factor`:

        mask     the lowest w² / U_jj² of the whole block go, floor(block · C · sparsity) of them
        input j  q = w_j where the mask keeps it, else 0;  e = (w_j − q) / U_jj
                 w_i ← w_i − U_ji e for the inputs i > j, of later blocks at the end of this one

    With a pattern n:m the n largest of each m inputs stay, of the weights as they are updated when
    their turn comes. The reference removes one weight more in every block, and all that tie with
    it; here the count is exact, and of ties the first by flat index of (input, output) stay.
    Sparsity 0 changes no weight but those of dead inputs.

    Args:
        weight_RxC: R inputs, C outputs; the result has its dtype, computed in float32.
        hessian_RxR: (2/n) Σ x xᵀ, as `calibration.inputs` measures it.
        sparsity: Share to remove, in [0, 1); with a pattern 1 − n/m or None.
        pattern: None or "n:m", n kept of every m consecutive inputs.
        block: Number of inputs at a time, at least 1; the last block may be smaller.
        damping: Share of the Hessian's mean diagonal to add to it first; see
            `hessian.inverse_factor`.
        zeros: What becomes of weights that are 0 already: "keep", removed first and counted in the
            sparsity; or "free".

    Raises:
        InputError: Shapes, sparsity, pattern or block that do not fit, or NaN in what is given.
        RunError: No damping makes the Hessian positive definite.

    >>> kernel, mask, report = sparsegpt(jnp.array([[1.0], [2.0]]), jnp.eye(2), 0.5)
    >>> kernel.tolist(), mask.tolist(), report.removed
    ([[0.0], [2.0]], [[False], [True]], 1)
    """
    sparsity, n_of_m = _checked(weight_RxC, hessian_RxR, sparsity, pattern, block)
    rows, columns = weight_RxC.shape
    block = min(block, rows)
    removed = [
        int((min(start + block, rows) - start) * columns * sparsity)
        for start in range(0, rows, block)
    ]
    factor_RxR, used = hessian.inverse_factor(hessian_RxR.astype(jnp.float32), damping)
    dead_R = hessian.dead(hessian_RxR)
    check_choice(zeros, importance.ZEROS, "zeros")
    solved_RxC, keep_RxC, error = _solve(
        weight_RxC,
        factor_RxR,
        dead_R,
        jnp.asarray(removed, jnp.int32),
        n_of_m,
        block,
        zeros == "keep",
    )
    gone = counting.count(tree.size(keep_RxC)).minus(counting.count_true([keep_RxC]))
    report = SolverReport(used, dead_R.sum(), gone.saturated(), error)
    if not isinstance(error, Tracer):
        report = SolverReport(float(used), int(report.dead), int(gone), float(error))
    return solved_RxC.astype(weight_RxC.dtype), keep_RxC, report


def check_sparsity(
    sparsity: float | None, pattern: str | None
) -> tuple[float, tuple[int, int] | None]:
    """Returns the sparsity as a number, and (n, m) when the pattern is one.

    Raises:
        InputError: No sparsity in [0, 1), a pattern other than n:m, or two that disagree.
    """
    if pattern is None:
        if sparsity is None:
            raise InputError("neither a sparsity nor a pattern was given; give e.g. sparsity=0.5")
        allocation.check_sparsity(sparsity)
        return float(sparsity), None
    if not patterns.is_n_of_m(pattern):
        raise InputError(
            f"pattern {pattern!r} cannot be pruned by calibration; give None or n:m, as '2:4'"
        )
    n, m = patterns.parse_n_of_m(pattern)
    if sparsity is not None:
        patterns.check_agrees(pattern, sparsity)
    return 1 - n / m, (n, m)


def check_mask_alone(sparsity: Any, pattern: str | None) -> None:
    """Raises InputError if a sparsity or a pattern is given with a mask, which decides both."""
    if sparsity is not None or pattern is not None:
        raise InputError(
            f"sparsity and pattern must be None with mask=, got {shown(sparsity)} and "
            f"{shown(pattern)}; leave them out"
        )


def check_kernel(
    weight_RxC: Any, hessian_RxR: Any, sparsity: float | None, pattern: str | None
) -> tuple[float, tuple[int, int] | None]:
    """Returns what `check_sparsity` returns, for a kernel and a Hessian that fit.

    Raises:
        InputError: Errors of `check_sparsity`, shapes that do not belong together, inputs that n:m
            does not divide, or a weight that is not finite.
    """
    share, n_of_m = check_sparsity(sparsity, pattern)
    if weight_RxC.ndim != 2 or hessian_RxR.shape != (len(weight_RxC),) * 2:
        raise InputError(
            f"a weight of shape {weight_RxC.shape} and a hessian of {hessian_RxR.shape} do not "
            "belong together; give (inputs, outputs) and (inputs, inputs)"
        )
    if n_of_m is not None:
        patterns.check_divides("weight", len(weight_RxC), n_of_m[1])
    tree.check_finite("the weight", weight_RxC, "find out where the training diverged")
    return share, n_of_m


def _checked(
    weight_RxC: Any, hessian_RxR: Any, sparsity: float | None, pattern: str | None, block: int
) -> tuple[float, tuple[int, int] | None]:
    share, n_of_m = check_kernel(weight_RxC, hessian_RxR, sparsity, pattern)
    if n_of_m is not None and block < len(weight_RxC) and block % n_of_m[1]:
        raise InputError(
            f"block = {block} would cut groups of {n_of_m[1]} inputs; give a multiple of it"
        )
    return share, n_of_m


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _solve(
    weight_RxC: Array,
    factor_RxR: Array,
    dead_R: Array,
    removed_K: Array,
    n_of_m: tuple[int, int] | None,
    block: int,
    keep_zeros: bool,
) -> tuple[Array, Array, Array]:
    """Returns the weights, the mask and the error, given how many of each of K blocks go.

    What was 0 before goes first if zeros are kept, whatever the updates make of it.
    """
    rows, columns = weight_RxC.shape
    padded = len(removed_K) * block
    more = ((0, padded - rows), (0, 0))
    start_PxC = jnp.pad(jnp.where(dead_R[:, None], 0, weight_RxC.astype(jnp.float32)), more)
    before_PxC = jnp.pad((weight_RxC == 0) & keep_zeros, more)
    factor_PxP = jnp.eye(padded).at[:rows, :rows].set(factor_RxR)  # the rest is never removed

    def one_block(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight_PxC, keep_PxC, error = state
        first = k * block
        weight_BxC = jax.lax.dynamic_slice_in_dim(weight_PxC, first, block)
        before_BxC = jax.lax.dynamic_slice_in_dim(before_PxC, first, block)
        factor_BxP = jax.lax.dynamic_slice_in_dim(factor_PxP, first, block)
        factor_BxB = jax.lax.dynamic_slice_in_dim(factor_BxP, first, block, axis=1)
        if n_of_m is None:
            real_Bx1 = (first + jnp.arange(block) < rows)[:, None]
            cost_BxC = jnp.where(real_Bx1, _cost(weight_BxC, factor_BxB), jnp.inf)
            cost_BxC = jnp.where(before_BxC, -jnp.inf, cost_BxC)
            keep_BxC = select.top_k_mask(cost_BxC, block * columns - removed_K[k]) & ~before_BxC
        else:
            keep_BxC = jnp.ones(weight_BxC.shape, bool)  # chosen group by group
        weight_BxC, keep_BxC, missing_BxC = _one_by_one(
            weight_BxC, keep_BxC, before_BxC, factor_BxB, n_of_m
        )
        later_P = jnp.arange(padded) >= first + block
        weight_PxC -= jnp.matmul(
            jnp.where(later_P, factor_BxP, 0).T, missing_BxC, precision=jax.lax.Precision.HIGHEST
        )
        return (
            jax.lax.dynamic_update_slice_in_dim(weight_PxC, weight_BxC, first, 0),
            jax.lax.dynamic_update_slice_in_dim(keep_PxC, keep_BxC, first, 0),
            error + jnp.sum(missing_BxC**2),
        )

    start = (start_PxC, jnp.ones(start_PxC.shape, bool), jnp.float32(0))
    weight_PxC, keep_PxC, error = jax.lax.fori_loop(0, len(removed_K), one_block, start)
    return weight_PxC[:rows], keep_PxC[:rows], error


def _cost(weight_BxC: Array, factor_BxB: Array) -> Array:
    return weight_BxC**2 / jnp.diag(factor_BxB)[:, None] ** 2


def _one_by_one(
    weight_BxC: Array,
    keep_BxC: Array,
    before_BxC: Array,
    factor_BxB: Array,
    n_of_m: tuple[int, int] | None,
) -> tuple[Array, Array, Array]:
    """Returns a block's weights after its own updates, its mask, and e of every input."""
    cost_diag_B = jnp.diag(factor_BxB)

    def choose(j: Array, weight_BxC: Array, keep_BxC: Array) -> Array:
        n, m = n_of_m or (1, 1)
        group_MxC = jax.lax.dynamic_slice_in_dim(weight_BxC, j, m)
        diag_M = jax.lax.dynamic_slice_in_dim(cost_diag_B, j, m)
        before_MxC = jax.lax.dynamic_slice_in_dim(before_BxC, j, m)
        cost_MxC = jnp.where(before_MxC, -jnp.inf, group_MxC**2 / diag_M[:, None] ** 2)
        keep_MxC = patterns.n_of_m_mask(cost_MxC, n, m) & ~before_MxC
        return jax.lax.dynamic_update_slice_in_dim(keep_BxC, keep_MxC, j, 0)

    def one_input(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight_BxC, keep_BxC, missing_BxC = state
        if n_of_m is not None:
            keep_BxC = jax.lax.cond(
                j % n_of_m[1] == 0, choose, lambda j, weight, keep: keep, j, weight_BxC, keep_BxC
            )
        kept_C = jnp.where(keep_BxC[j], weight_BxC[j], 0)
        missing_C = (weight_BxC[j] - kept_C) / factor_BxB[j, j]
        # U is upper triangular, so the inputs before j do not move.
        weight_BxC = (weight_BxC - factor_BxB[j][:, None] * missing_C).at[j].set(kept_C)
        return weight_BxC, keep_BxC, missing_BxC.at[j].set(missing_C)

    start = (weight_BxC, keep_BxC, jnp.zeros_like(weight_BxC))
    return jax.lax.fori_loop(0, len(weight_BxC), one_input, start)
