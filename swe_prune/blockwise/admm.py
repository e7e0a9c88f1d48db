"""ADMM: the weights that stay make up for those that go, by matrix products alone.

Source: Boža, "Fast and effective weight update for pruned large language models", TMLR 2024,
arXiv 2401.02938; https://github.com/fmfi-compbio/admm-pruning. Their weight is (out, in); here the
kernel is (in, out).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from swe_prune import allocation, importance, patterns, select
from swe_prune.arguments import checked
from swe_prune.blockwise.sparsegpt import SolverReport, check_kernel, check_mask_alone
from swe_prune.errors import InputError, check_choice
from swe_prune.importance import hessian
from swe_prune.masks.fitting import check_fits

ITERATIONS = 20
CHOOSING = 15
"""Iterations in all, and those of them that choose the mask, as in the reference."""


@checked
def admm(
    weight_RxC: Float[Array, "R C"],
    hessian_RxR: Float[Array, "R R"],
    sparsity: float | None = None,
    pattern: str | None = None,
    mask: Bool[Array, "R C"] | None = None,
    iterations: int = ITERATIONS,
    damping: float = 0.1,
    zeros: str = "keep",
    cross_RxR: Float[Array, "R R"] | None = None,
) -> tuple[Float[Array, "R C"], Bool[Array, "R C"], SolverReport]:
    """Returns a kernel pruned and updated to keep its outputs, its mask, and a report.

    With d = √diag(H), A = H / (d dᵀ) + damping · mean(diag) · I, V = d ∘ W and B = A V, the
    alternating direction method of multipliers (ρ = 1) solves min ‖X (W − W')‖² over the weights
    that the mask M keeps:

        Z ← M ∘ (V + U);   U ← U + V − Z;   V ← (A + I)⁻¹ (B + Z − U)

    and the result is M ∘ (V + U) / d. Without a mask, the first `CHOOSING` of the iterations choose
    it again among |V + U|, at a sparsity that rises with a cube to the one asked for; with n:m
    the weights that an n:m mask would keep are safe meanwhile. The count is exact, ties are broken
    by flat index.

    One inverse a kernel and matrix products, no loop over inputs.

    Args:
        weight_RxC: Kernel of R inputs and C outputs; the result has its dtype, computed in float32.
        hessian_RxR: (2/n) Σ x xᵀ, as `calibration.inputs` measures it.
        sparsity: Share to remove, in [0, 1); with a pattern 1 − n/m or None. Not with a mask.
        pattern: None or "n:m", n kept of every m consecutive inputs. Not with a mask.
        mask: Mask to restore the weights of; None to choose one.
        iterations: Number of iterations.
        damping: Share of the mean of the diagonal that is added to it.
        zeros: "keep": weights that are 0 already are removed first and stay so, whatever the
            sparsity. "free": they are ranked like the others.
        cross_RxR: (2/n) Σ x x'ᵀ of each input x and the input x' that the dense model has in its
            place: the outputs aimed at are then X' W, in place of X W, and B = C W / d + damping ·
            mean(diag) · V. The report's error lacks the constant (2/n) ‖X' W‖². None: X' = X.

    Raises:
        InputError: Shapes, sparsity, pattern or numbers that do not fit, both a mask and a
            sparsity, or NaN in what is given.

    >>> H = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> kernel, mask, _ = admm(jnp.array([[1.0], [2.0]]), H, 0.5, damping=0.0)
    >>> mask.tolist(), round(float(kernel[1, 0]), 1)
    ([[False], [True]], 2.9)
    """
    share, n_of_m = _checked(weight_RxC, hessian_RxR, sparsity, pattern, mask, damping)
    check_choice(zeros, importance.ZEROS, "zeros")
    if cross_RxR is not None and cross_RxR.shape != hessian_RxR.shape:
        raise InputError(
            f"cross_RxR must have the shape of the Hessian, {hessian_RxR.shape}, got "
            f"{cross_RxR.shape}"
        )
    size = weight_RxC.size
    if mask is not None:
        keep, gone = mask, None
    else:
        keep, gone = jnp.ones(weight_RxC.shape, bool), _removed(size, share, n_of_m)
    solved_RxC, keep_RxC, error = _solve(
        weight_RxC, hessian_RxR.astype(jnp.float32), keep, damping, gone, n_of_m, iterations,
        zeros == "keep", cross_RxR,
    )  # fmt: skip
    removed = size - keep_RxC.sum()
    dead = hessian.dead(hessian_RxR).sum()
    report = SolverReport(damping, dead, removed, error)
    if not isinstance(error, Tracer):
        report = SolverReport(damping, int(dead), int(removed), float(error))
    return solved_RxC.astype(weight_RxC.dtype), keep_RxC, report


def _removed(size: int, share: float, n_of_m: tuple[int, int] | None) -> int:
    if n_of_m is not None:
        return size * (n_of_m[1] - n_of_m[0]) // n_of_m[1]
    return allocation.removed_count(size, share)


def _checked(
    weight_RxC: Any,
    hessian_RxR: Any,
    sparsity: float | None,
    pattern: str | None,
    mask: Any,
    damping: float,
) -> tuple[float, tuple[int, int] | None]:
    if not damping >= 0:
        raise InputError(f"damping must be 0 or more, got {damping}")
    if mask is None:
        return check_kernel(weight_RxC, hessian_RxR, sparsity, pattern)
    check_mask_alone(sparsity, pattern)
    check_fits("kernel", mask, weight_RxC)
    check_kernel(weight_RxC, hessian_RxR, 0.0, None)
    return 0.0, None


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _solve(
    weight_RxC: Array,
    hessian_RxR: Array,
    mask_RxC: Array,
    damping: Array,
    gone: int | None,
    n_of_m: tuple[int, int] | None,
    iterations: int,
    keep_zeros: bool,
    cross_RxR: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Returns the weights, the mask and the error, with the mask given (gone=None) or chosen."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    weight_RxC = weight_RxC.astype(jnp.float32)
    scale_Rx1 = jnp.sqrt(jnp.diag(hessian_RxR))[:, None] + 1e-8
    eye_RxR = jnp.eye(len(hessian_RxR))
    plain_RxR = hessian_RxR / (scale_Rx1 * scale_Rx1.T)
    ridge = damping * jnp.mean(jnp.diag(plain_RxR))
    gram_RxR = plain_RxR + ridge * eye_RxR
    dense_RxC = weight_RxC * scale_Rx1
    wanted_RxC = dot(gram_RxR, dense_RxC)
    if cross_RxR is not None:
        wanted_RxC = dot(cross_RxR / scale_Rx1, weight_RxC) + ridge * dense_RxC
    factor = jax.scipy.linalg.cho_factor(gram_RxR + eye_RxR)
    inverse_RxR = jax.scipy.linalg.cho_solve(factor, eye_RxR)
    held_RxC = (weight_RxC == 0) & keep_zeros
    choosing = min(CHOOSING, iterations) if gone is not None else 0

    def chosen(step: Array, mask_RxC: Array, values_RxC: Array) -> Array:
        if gone is None:
            return mask_RxC
        score_RxC = jnp.where(held_RxC, -1.0, jnp.abs(values_RxC))
        if n_of_m is not None:
            safe_RxC = patterns.n_of_m_mask(score_RxC, *n_of_m)
            score_RxC = jnp.where(safe_RxC, jnp.inf, score_RxC)
        ramp = 1 - (1 - (step + 1) / choosing) ** 3
        # Exact at the end, where the ramp is 1.
        now = jnp.where(step + 1 >= choosing, gone, jnp.floor(gone * ramp).astype(jnp.int32))
        renewed_RxC = select.top_k_mask(score_RxC, weight_RxC.size - now)
        return jnp.where(step < choosing, renewed_RxC & ~held_RxC, mask_RxC)

    def iteration(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values_RxC, dual_RxC, mask_RxC = state
        mask_RxC = chosen(step, mask_RxC, values_RxC + dual_RxC)
        pruned_RxC = jnp.where(mask_RxC, values_RxC + dual_RxC, 0)
        dual_RxC = dual_RxC + values_RxC - pruned_RxC
        values_RxC = dot(inverse_RxR, wanted_RxC + pruned_RxC - dual_RxC)
        return values_RxC, dual_RxC, mask_RxC

    start = (dense_RxC, jnp.zeros_like(dense_RxC), mask_RxC)
    values_RxC, dual_RxC, mask_RxC = jax.lax.fori_loop(0, iterations, iteration, start)
    solved_RxC = jnp.where(mask_RxC, (values_RxC + dual_RxC) / scale_Rx1, 0)

    return solved_RxC, mask_RxC, squared_error(solved_RxC, weight_RxC, hessian_RxR, cross_RxR)


@jax.jit
def squared_error(
    kernel_RxC: Float[Array, "R C"],
    weight_RxC: Float[Array, "R C"],
    hessian_RxR: Float[Array, "R R"],
    cross_RxR: Float[Array, "R R"] | None = None,
) -> Float[Array, ""]:
    """Returns (2/n) ‖X (W' − W)‖², what replacing W by W' costs on the Hessian's inputs.

    With `cross_RxR` it is (2/n) (‖X W' − X' W‖² − ‖X' W‖²), as in `admm`.
    """
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    kernel_RxC, weight_RxC = kernel_RxC.astype(jnp.float32), weight_RxC.astype(jnp.float32)
    if cross_RxR is not None:
        left_RxC = dot(hessian_RxR, kernel_RxC) - 2 * dot(cross_RxR, weight_RxC)
        return jnp.sum(kernel_RxC * left_RxC)
    apart_RxC = kernel_RxC - weight_RxC
    return jnp.sum(apart_RxC * dot(hessian_RxR, apart_RxC))
