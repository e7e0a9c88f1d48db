"""Decoder block: attention and an MLP, each with a pre-norm and a residual connection."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from swe_prune.config import ModelConfig
from swe_prune.models import rope
from swe_prune.models.attention import attention
from swe_prune.models.kv_cache import PLAIN, Positions

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # tanh approximation, as in GPT-2
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

INIT_STDDEV = 0.02


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); updates the KV cache of the block if given."""

    config: ModelConfig

    @nn.compact
    def __call__(  # noqa: D102 (the class's)
        self,
        x_NxD: Array,
        batch: int,
        train: bool,
        positions: Positions = PLAIN,
        kv: tuple[Array, Array] | None = None,
    ) -> Any:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        y_NxD = norm(cfg, "attention_norm")(x_NxD)
        y_NxD, kv = Attention(cfg, name="attention")(y_NxD, batch, positions, kv)
        x_NxD = x_NxD + drop(y_NxD)
        y_NxD = norm(cfg, "mlp_norm")(x_NxD)
        x_NxD = x_NxD + drop(MLP(cfg, name="mlp")(y_NxD))
        return x_NxD if kv is None else (x_NxD, kv)


class Attention(nn.Module):
    """Causal self-attention: kernels query (D x HK), key and value (D x GK), and out (HK x D)."""

    config: ModelConfig

    @nn.compact
    def __call__(  # noqa: D102 (the class's)
        self,
        x_NxD: Array,
        batch: int,
        positions: Positions = PLAIN,
        kv: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        cfg = self.config

        def heads(name: str, count: int) -> Array:
            y_NxC = dense(cfg, count * cfg.head_size, name, cfg.qkv_bias)(x_NxD)
            return y_NxC.reshape(batch, -1, count, cfg.head_size)

        q_BxLxHxK = heads("query", cfg.heads)
        k_BxTxGxK, v_BxTxGxK = heads("key", cfg.key_heads), heads("value", cfg.key_heads)
        # Rotate queries and keys by their positions.
        if positions.turn is not None:
            q_BxLxHxK = rope.rotate(q_BxLxHxK, positions.turn)
            k_BxTxGxK = rope.rotate(k_BxTxGxK, positions.turn)
        start = 0 if positions.start is None else positions.start
        # Write the new keys and values to the KV cache, and attend to all of it.
        if kv is not None:
            at = (0, start, 0, 0)
            k_BxTxGxK, v_BxTxGxK = kv = (
                jax.lax.dynamic_update_slice(kv[0], k_BxTxGxK.astype(kv[0].dtype), at),
                jax.lax.dynamic_update_slice(kv[1], v_BxTxGxK.astype(kv[1].dtype), at),
            )
        y_BxLxHxK = attention(
            q_BxLxHxK,
            k_BxTxGxK,
            v_BxTxGxK,
            window=cfg.window,
            valid_BxT=positions.valid_BxT,
            start=start,
        )
        y_NxC = y_BxLxHxK.reshape(len(x_NxD), -1)
        return dense(cfg, cfg.width, "out", cfg.out_bias, residual=True)(y_NxC), kv


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where it is gated."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        h_NxF = dense(cfg, cfg.hidden_size, "up", cfg.mlp_bias)(x_NxD)
        # Store only the input for the backward pass; recomputing the rest is cheaper.
        activation = jax.checkpoint(ACTIVATIONS[cfg.activation])
        if cfg.gated:
            h_NxF = activation(dense(cfg, cfg.hidden_size, "gate", cfg.mlp_bias)(x_NxD)) * h_NxF
        else:
            h_NxF = activation(h_NxF)
        return dense(cfg, cfg.width, "down", cfg.mlp_bias, residual=True)(h_NxF)


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
    # GPT-2 scales additions to the residual stream by 1 / sqrt(additions), two in every layer.
    stddev = INIT_STDDEV / math.sqrt(2 * cfg.layers) if residual else INIT_STDDEV
    return nn.Dense(
        features,
        use_bias=cfg.use_bias if use_bias is None else use_bias,
        kernel_init=nn.initializers.normal(stddev),
        dtype=cfg.dtype,
        name=name,
    )


def norm(cfg: ModelConfig, name: str) -> nn.Module:
    """Returns the normalization layer of the config."""
    if cfg.norm == "rms":
        return nn.RMSNorm(epsilon=cfg.norm_epsilon, dtype=cfg.dtype, name=name)
    return nn.LayerNorm(epsilon=cfg.norm_epsilon, use_bias=cfg.use_bias, dtype=cfg.dtype, name=name)
