"""Decoder block: attention and an MLP, each with norms and a residual connection."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from swe_prune.config import ModelConfig
from swe_prune.models import rope
from swe_prune.models.attention import attention
from swe_prune.models.experts import Experts
from swe_prune.models.fusing import projections
from swe_prune.models.kv_cache import PLAIN, Positions
from swe_prune.models.layers import ACTIVATIONS, dense, head_norm, norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); updates the KV cache of the block if given.

    The config may place the norms behind attention and MLP, or on both sides, and let the MLP read
    what the attention reads (`norms`, `residual`).
    """

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

        def before(name: str, x_NxD: Array) -> Array:
            return x_NxD if cfg.norms == "post" else norm(cfg, name)(x_NxD)

        def added(x_NxD: Array, name: str, y_NxD: Array) -> Array:
            if cfg.norms != "pre":
                y_NxD = norm(cfg, name)(y_NxD)
            y_NxD = drop(y_NxD)
            return x_NxD + (y_NxD if cfg.residual_scale == 1 else y_NxD * cfg.residual_scale)

        into_NxD = before("attention_norm", x_NxD)
        y_NxD, kv = Attention(cfg, name="attention")(into_NxD, batch, positions, kv)
        after_NxD = added(x_NxD, "attention_out_norm", y_NxD)
        if cfg.residual != "parallel_one_norm":
            into_NxD = before("mlp_norm", after_NxD if cfg.residual == "sequential" else x_NxD)
        mlp = MLP(cfg, name="mlp") if cfg.experts is None else Experts(cfg, name="mlp")
        x_NxD = added(after_NxD, "mlp_out_norm", mlp(into_NxD))
        return x_NxD if kv is None else (x_NxD, kv)


class Attention(nn.Module):
    """Causal self-attention: kernels query (D x HK), key and value (D x GK), and out (HK x D).

    Queries and keys may be normalized before they are rotated (Henry et al., 2010.04245).
    """

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

        counts = {"query": cfg.heads, "key": cfg.key_heads, "value": cfg.key_heads}
        sizes = {name: count * cfg.head_size for name, count in counts.items()}
        projected = projections(self, cfg, x_NxD, sizes, cfg.qkv_bias)

        def heads(name: str) -> Array:
            y_NxC = projected[name]
            normed = cfg.head_norm if name != "value" else "none"
            if normed == "projection":
                y_NxC = head_norm(cfg, f"{name}_norm")(y_NxC)
            y_BxLxHxK = y_NxC.reshape(batch, -1, counts[name], cfg.head_size)
            if normed in ("head", "each_head"):
                y_BxLxHxK = head_norm(cfg, f"{name}_norm")(y_BxLxHxK)
            return y_BxLxHxK

        q_BxLxHxK, k_BxTxGxK, v_BxTxGxK = heads("query"), heads("key"), heads("value")
        # Rotate queries and keys by their positions.
        turn = positions.turn_of(cfg)
        if turn is not None:
            q_BxLxHxK = rope.rotate(q_BxLxHxK, turn)
            k_BxTxGxK = rope.rotate(k_BxTxGxK, turn)
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
            scale=cfg.attention_scale,
            cap=cfg.attention_cap,
            causal=cfg.causal,
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
        names = ["gate", "up"] if cfg.gated else ["up"]
        sizes = dict.fromkeys(names, cfg.hidden_size)
        h = projections(self, cfg, x_NxD, sizes, cfg.mlp_bias)
        # Store only the input for the backward pass; recomputing the rest is cheaper.
        activation = jax.checkpoint(ACTIVATIONS[cfg.activation])
        h_NxF = activation(h["gate"]) * h["up"] if cfg.gated else activation(h["up"])
        return dense(cfg, cfg.width, "down", cfg.mlp_bias, residual=True)(h_NxF)


def scanned(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    x_NxD: Array,
    batch: int,
    train: bool,
    positions: Positions,
    key: Array | None,
    constrain: Callable[[Array], Array],
) -> Array:
    """Returns the output of all the blocks, computed by one compiled body in a scan.

    Args:
        cfg: Config of the model.
        params: Parameters of the model, with block i under "block_i" as in the unscanned model.
        x_NxD: Input of the first block.
        batch: Number of sequences among the N tokens.
        train: Whether to apply dropout.
        positions: Positions and masks of the tokens.
        key: Random key for dropout, split into one key per layer; None without dropout.
        constrain: Function applied to the output of each block.
    """

    def stack(path: Any, *leaves: Array) -> Array:
        # Dense makes the same cast; casting before stacking takes half the memory. A norm
        # multiplies by its scale in float32, so its scale is not cast.
        if jax.tree_util.keystr(path).endswith("['kernel']"):
            return jnp.stack([leaf.astype(cfg.dtype) for leaf in leaves])
        return jnp.stack(leaves)

    blocks = [params[f"block_{layer}"] for layer in range(cfg.layers)]
    block = Block(cfg, parent=None)

    def run(x_NxD: Array, layer: tuple[Any, Array | None]) -> tuple[Array, None]:
        weights, key = layer
        rngs = {} if key is None else {"dropout": key}
        y_NxD: Any = block.apply({"params": weights}, x_NxD, batch, train, positions, rngs=rngs)
        return constrain(y_NxD), None

    if cfg.remat:
        # The loop already keeps the compiler from sharing values between the two passes.
        run = jax.checkpoint(run, prevent_cse=False)
    keys = None if key is None else jax.random.split(key, cfg.layers)
    x_NxD, _ = jax.lax.scan(run, x_NxD, (jax.tree.map_with_path(stack, *blocks), keys))
    return x_NxD
