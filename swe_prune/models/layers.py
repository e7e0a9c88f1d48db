"""Dense layers, norms and activations of the decoder."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from swe_prune.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # The tanh form is that of OpenAI's GPT-2 and of Hugging Face's "gelu_new"; nanoGPT trains with
    # PyTorch's default, which is exact.
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of CLIP
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def dense(
    cfg: ModelConfig, features: int, name: str, use_bias: bool | None, residual: bool = False
) -> nn.Dense:
    """Returns a Dense layer of the decoder.

    Args:
        cfg: Config of the model.
        features: Number of outputs.
        name: Name of the layer.
        use_bias: Whether the layer has a bias. If None, `cfg.use_bias`.
        residual: Whether the output is added to the residual stream.
    """
    return nn.Dense(
        features,
        use_bias=cfg.use_bias if use_bias is None else use_bias,
        kernel_init=nn.initializers.normal(init_stddev(cfg, residual)),
        dtype=cfg.dtype,
        name=name,
    )


def init_stddev(cfg: ModelConfig, residual: bool) -> float:
    """Returns the standard deviation of a kernel's initial values."""
    # GPT-2 scales additions to the residual stream by 1 / sqrt(additions), two in every layer.
    return cfg.init_stddev / math.sqrt(2 * cfg.layers) if residual else cfg.init_stddev


def norm(cfg: ModelConfig, name: str) -> nn.Module:
    """Returns the normalization layer of the config."""
    if cfg.norm == "rms" and cfg.norm_plus_one:
        return PlusOneRMSNorm(epsilon=cfg.norm_epsilon, dtype=cfg.dtype, name=name)
    if cfg.norm == "rms":
        return nn.RMSNorm(epsilon=cfg.norm_epsilon, dtype=cfg.dtype, name=name)
    return nn.LayerNorm(epsilon=cfg.norm_epsilon, use_bias=cfg.use_bias, dtype=cfg.dtype, name=name)


def head_norm(cfg: ModelConfig, name: str) -> nn.Module:
    """Returns the normalization of queries or keys, of arrays B x L x H x K or N x HK.

    Each head is normalized by itself if the array has an axis of heads. With "each_head" the scale
    is H x K (StableLM's `qk_layernorm`), otherwise it has one axis.
    """
    if cfg.head_norm != "each_head":
        return norm(cfg, name)
    one = nn.RMSNorm if cfg.norm == "rms" else functools.partial(nn.LayerNorm, use_bias=False)
    return one(
        epsilon=cfg.norm_epsilon,
        reduction_axes=-1,
        feature_axes=(-2, -1),
        dtype=cfg.dtype,
        name=name,
    )


class PlusOneRMSNorm(nn.Module):
    """RMS norm that multiplies by 1 + scale, in float32 (Gemma, 2403.08295).

    Stored weights are the distance from 1, so weight decay pulls the factor toward 1.
    """

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:  # noqa: D102 (the class's)
        scale_D = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return (x * (1.0 + scale_D.astype(jnp.float32))).astype(self.dtype)
