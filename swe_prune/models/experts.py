"""MLP of sparse experts: a router sends each token to a few of them (mixture of experts)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from swe_prune.arguments import checked
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models.layers import ACTIVATIONS, dense, init_stddev


@checked
def routed(scores: Float[Array, "N E"], per_token: int) -> Float[Array, "N E"]:
    """Returns the weight of each expert for each token, 0 for those that are not chosen.

    Args:
        scores: Scores of the router.
        per_token: Number k of experts of a token.

    Raises:
        InputError: If k is not between 1 and the number of experts.
    """
    experts = scores.shape[-1]
    if not 1 <= per_token <= experts:
        raise InputError(f"per_token must be between 1 and {experts} experts, got {per_token}")
    top, chosen = jax.lax.top_k(jax.nn.softmax(scores), per_token)
    return (jax.nn.one_hot(chosen, experts) * (top / top.sum(-1, keepdims=True))[..., None]).sum(-2)


class Experts(nn.Module):
    """Sum of the chosen experts' gated MLPs, weighted by the router (Mixtral, 2401.04088).

    The router's softmax over the experts is reduced to the largest `experts_per_token` and divided
    by their sum. The kernels of all experts are one array each: gate and up E x D x F, down
    E x F x D. Every expert computes all tokens, but the ones that it does not get are zeros to it,
    so the statistics of its inputs are those of its own tokens.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        assert cfg.experts is not None
        # 1. Choose the experts of each token, and their weights.
        scores_NxE = dense(cfg, cfg.experts, "router", use_bias=False)(x_NxD)
        weights_ExN = routed(scores_NxE.astype(jnp.float32), cfg.experts_per_token).T
        # 2. Compute the experts on their tokens, zeros for the others.
        x_ExNxD = jnp.where(weights_ExN[..., None] > 0, x_NxD, jnp.zeros((), x_NxD.dtype))
        gate_ExNxF = ExpertDense(cfg, cfg.hidden_size, name="gate")(x_ExNxD)
        up_ExNxF = ExpertDense(cfg, cfg.hidden_size, name="up")(x_ExNxD)
        h_ExNxF = jax.checkpoint(ACTIVATIONS[cfg.activation])(gate_ExNxF) * up_ExNxF
        y_ExNxD = ExpertDense(cfg, cfg.width, residual=True, name="down")(h_ExNxF)
        # 3. Add up the weighted results.
        return jnp.einsum("end,en->nd", y_ExNxD, weights_ExN.astype(y_ExNxD.dtype))


class ExpertDense(nn.Module):
    """Dense layer of each expert, with one kernel E x R x C and no bias.

    Attributes:
        config: Config of the model.
        features: Number of outputs C.
        residual: Whether the output is added to the residual stream.
    """

    config: ModelConfig
    features: int
    residual: bool = False

    @nn.compact
    def __call__(self, x_ExNxR: Float[Array, "E N R"]) -> Float[Array, "E N C"]:  # noqa: D102
        cfg = self.config
        init = nn.initializers.normal(init_stddev(cfg, self.residual))
        shape = (len(x_ExNxR), x_ExNxR.shape[-1], self.features)
        kernel_ExRxC = self.param("kernel", init, shape)
        return jnp.einsum("enr,erc->enc", x_ExNxR, kernel_ExRxC.astype(cfg.dtype))
