"""Least squares: the inputs that stay make up for whole inputs that go.

Source: "FASP: fast and accurate structured pruning of large language models", arXiv 2501.09412, who
refit the down and output projections. Here the ridge pulls to the weights that are there, not to 0,
so a fit on few tokens stays near them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from swe_prune.blockwise.admm import squared_error
from swe_prune.blockwise.sparsegpt import SolverReport, check_kernel
from swe_prune.errors import InputError
from swe_prune.importance import hessian

DAMPING = 0.3
"""Best on held-out text for SmolLM2-135M and 7,680 tokens; less fits the calibration text alone."""


def least_squares(
    weight_RxC: Float[Array, "R C"],
    hessian_RxR: Float[Array, "R R"],
    keep_R: Bool[Any, " R"],
    damping: float = DAMPING,
) -> tuple[Float[Array, "R C"], SolverReport]:
    """Returns a kernel of whose inputs some are removed, the others refitted, and a report.

    With H = X Xᵀ up to a factor, K the inputs that stay and G those that go, the result minimizes
    ‖X (W' − W)‖² + λ ‖W'_K − W_K‖² over W' with W'_G = 0:

        W'_K = W_K + (H_KK + λ I)⁻¹ H_KG W_G,   λ = damping · mean(diag H_KK)

    If that is no better on H itself, by rounding, the weights stay as they are. With nothing
    removed they are the same to the bit.

    Args:
        weight_RxC: Kernel of R inputs and C outputs; the result has its dtype, computed in float32.
        hessian_RxR: Σ x xᵀ over the inputs, in any scale.
        keep_R: Whether each input stays.
        damping: Share of the mean of the diagonal that is added to it.

    Raises:
        InputError: Shapes or numbers that do not fit, NaN, or no input that stays.
        RunError: No damping makes the Hessian positive definite.

    >>> H = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> kernel, _ = least_squares(jnp.array([[1.0], [2.0]]), H, np.array([False, True]), 0.0)
    >>> kernel.ravel().round(3).tolist()
    [0.0, 2.9000000953674316]
    """
    check_kernel(weight_RxC, hessian_RxR, 0.0, None)
    keep_R = np.asarray(keep_R)
    if keep_R.shape != (len(weight_RxC),) or keep_R.dtype != bool or not keep_R.any():
        raise InputError(
            f"keep_R must be a bool for each of the {len(weight_RxC)} inputs of which one or more "
            f"stay, got {keep_R.dtype}{list(keep_R.shape)}"
        )
    kept, gone = np.flatnonzero(keep_R), np.flatnonzero(~keep_R)
    hessian_RxR = hessian_RxR.astype(jnp.float32)
    if not len(gone):
        return weight_RxC, SolverReport(damping, int(hessian.dead(hessian_RxR).sum()), 0, 0.0)
    # Other numbers of kept inputs are other programs; uniform widths share one.
    kept_KxK, shared_KxC = _split(weight_RxC, hessian_RxR, kept, gone)
    factor_KxK, used = hessian.inverse_factor(kept_KxK, damping)
    solved_RxC, errors = _solved(weight_RxC, hessian_RxR, factor_KxK, shared_KxC, kept, keep_R)
    restored, alone = (float(error) for error in errors)
    dead = int(hessian.dead(kept_KxK).sum())
    report = SolverReport(float(used), dead, len(gone) * weight_RxC.shape[1], min(restored, alone))
    if not restored < alone:
        return jnp.where(keep_R[:, None], weight_RxC, 0), report
    return solved_RxC, report


@jax.jit
def _split(weight_RxC: Array, hessian_RxR: Array, kept: Array, gone: Array) -> tuple[Array, Array]:
    """Returns H_KK and H_KG W_G."""
    rows_KxR = hessian_RxR[kept]
    gone_GxC = weight_RxC[gone].astype(jnp.float32)
    return rows_KxR[:, kept], _dot(rows_KxR[:, gone], gone_GxC)


@jax.jit
def _solved(
    weight_RxC: Array,
    hessian_RxR: Array,
    factor_KxK: Array,
    shared_KxC: Array,
    kept: Array,
    keep_R: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the refitted kernel, and the errors with it and with the weights as they were."""
    alone_RxC = jnp.where(keep_R[:, None], weight_RxC, 0)
    change_KxC = _dot(factor_KxK.T, _dot(factor_KxK, shared_KxC))
    solved_RxC = alone_RxC.astype(jnp.float32).at[kept].add(change_KxC).astype(weight_RxC.dtype)
    errors = [squared_error(one, weight_RxC, hessian_RxR) for one in (solved_RxC, alone_RxC)]
    return solved_RxC, (errors[0], errors[1])


def _dot(a: Any, b: Any) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
