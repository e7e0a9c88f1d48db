"""Criteria that weigh a weight by what a layer's outputs lose with it, on calibration data."""

import math
import warnings

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from swe_prune import tree
from swe_prune.errors import InputError, RunError
from swe_prune.importance.registry import register

TRIES = 5
"""How often a Hessian is damped, ten times more each time, before it is given up."""


@register("sparsegpt")
def sparsegpt(
    weight: Float[Array, "..."],
    hessian: Float[Array, "R R"],
    inputs: tuple[int, ...],
    damping: float = 0.01,
) -> Float[Array, "..."]:
    """w² / U_jj², U the upper Cholesky factor of the inverse Hessian of input j's layer.

    What removing the weight costs when the weights of later inputs make up for it as well as they
    can (optimal brain surgeon, in one order of inputs for all outputs). An input that is always 0
    scores 0. One pass over calibration data and R² numbers for a kernel of R inputs; the weight
    update that belongs to it is `blockwise.sparsegpt`.

    When: for pretrained language models, best with the weight update of `blockwise`.
    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in
        one-shot", ICML 2023.

    Args:
        weight: Kernel.
        hessian: (2/n) Σ x xᵀ over its R inputs.
        inputs: Axes of the kernel along which its inputs run.
        damping: Damping of `inverse_factor`; eager code warns when it takes more. In a jit that
            finds no damping that does, all scores are NaN.
    """
    rows = math.prod(weight.shape[axis] for axis in inputs)
    if hessian.shape != (rows, rows):
        raise InputError(
            f"the hessian has shape {hessian.shape} and the kernel {rows} inputs; pass "
            "the layout= that it was measured with, and measure it on these parameters"
        )
    factor_RxR, used = inverse_factor(hessian, damping)
    if not isinstance(used, Tracer) and float(used) > 1.5 * damping:
        warnings.warn(
            f"a Hessian of {rows} inputs was factored only with damping {float(used):g} instead of "
            f"{damping:g}; more calibration data would make it better conditioned",
            stacklevel=2,
        )
    cost_R = jnp.where(dead(hessian), 0.0, 1 / jnp.diag(factor_RxR) ** 2)
    along = [weight.shape[axis] if axis in inputs else 1 for axis in range(weight.ndim)]
    return weight**2 * cost_R.reshape(along)


def dead(hessian_RxR: Float[Array, "R R"]) -> Bool[Array, " R"]:
    """Returns which inputs were 0 in all of the calibration data."""
    return jnp.diag(hessian_RxR) == 0


def inverse_factor(
    hessian_RxR: Float[Array, "R R"], damping: float = 0.01
) -> tuple[Float[Array, "R R"], Float[Array, ""]]:
    """Returns U, upper triangular with H⁻¹ = Uᵀ U, of the damped Hessian, and the damping used.

        H ← H, 1 where H_jj = 0;  H ← H + damping · mean(diag H) · I

    When H has no finite factor it is tried again with ten times the damping, `TRIES` times in all.
    U is found without the inverse: with J the reversal, J H J = M Mᵀ (Cholesky) makes R = J M J an
    upper factor of H = R Rᵀ, so U = R⁻¹. The inverse of an ill-conditioned H in float32 is often
    not positive definite; the inverse of its factor always serves.

    Args:
        hessian_RxR: Symmetric, positive semi-definite, floating; the result has its dtype.
        damping: Share of the mean of the diagonal, positive or 0.

    Raises:
        InputError: A matrix that is not square, a negative damping, or NaN or inf in the Hessian.
        RunError: Not positive definite at the last try. In a jit there is no error, but U is NaN.

    >>> factor, damping = inverse_factor(jnp.diag(jnp.array([4.0, 0.25])), 0.0)
    >>> factor.tolist(), float(damping)
    ([[0.5, 0.0], [0.0, 2.0]], 0.0)
    """
    if hessian_RxR.ndim != 2 or hessian_RxR.shape[0] != hessian_RxR.shape[1]:
        raise InputError(f"hessian must be square, R x R, got shape {hessian_RxR.shape}")
    if not isinstance(damping, Tracer) and not 0 <= float(damping) < math.inf:
        raise InputError(f"damping = {damping} cannot be used; give 0 or a little more, as 0.01")
    factor_RxR, used = _factored(hessian_RxR, jnp.asarray(damping, hessian_RxR.dtype))
    if isinstance(factor_RxR, Tracer):
        return factor_RxR, used
    if not bool(tree.all_finite(factor_RxR)):
        if not bool(tree.all_finite(hessian_RxR)):
            raise InputError("the hessian has NaN or inf; find the calibration batch that has them")
        raise RunError(
            f"the hessian of {len(hessian_RxR)} inputs is not positive definite even with damping "
            f"{float(used):g}, the last of {TRIES} tries; measure it as (2/n) Σ x xᵀ"
        )
    return factor_RxR, used


@jax.jit
def _factored(hessian_RxR: Array, damping: Array) -> tuple[Array, Array]:
    eye_RxR = jnp.eye(len(hessian_RxR), dtype=hessian_RxR.dtype)
    alive_RxR = hessian_RxR + eye_RxR * dead(hessian_RxR)
    mean = jnp.mean(jnp.diag(alive_RxR))

    def attempt(damping: Array) -> Array:
        damped_RxR = alive_RxR + damping * mean * eye_RxR
        lower_RxR = jnp.linalg.cholesky(damped_RxR[::-1, ::-1], symmetrize_input=False)
        upper_RxR = lower_RxR[::-1, ::-1]
        return jnp.triu(jax.scipy.linalg.solve_triangular(upper_RxR, eye_RxR, lower=False))

    def failed(state: tuple[Array, Array, Array]) -> Array:
        tries, _, factor_RxR = state
        return (tries < TRIES) & ~jnp.all(jnp.isfinite(factor_RxR))

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, damping, _ = state
        more = jnp.maximum(damping * 10, 1e-3)  # 0 would stay 0
        return tries + 1, more, attempt(more)

    start = (jnp.int32(1), damping, attempt(damping))
    _, used, factor_RxR = jax.lax.while_loop(failed, again, start)
    # Of both, since a factor of infinities has the inverse 0.
    whole = jnp.all(jnp.isfinite(factor_RxR)) & jnp.all(jnp.isfinite(hessian_RxR))
    return jnp.where(whole, factor_RxR, jnp.nan), used
