"""A decoder-only Transformer, GPT-2 as nanoGPT writes it: pre-norm, learned positions, causal.

The activations travel as N x D, tokens of the whole batch by width: a matrix product over two axes
is the one shape that every backend runs at full speed. Heads exist inside `attention` only.
Dropout acts on the embedding and on what each block adds, not on the attention's weights.

Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2: pre-norm, the initialization),
https://github.com/karpathy/nanoGPT (one flag for all biases, the 10.7 M character-level model).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, did_you_mean

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's, by tanh
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

PARTITION_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"position_embedding$", (None, "fsdp")),
    (r"embedding/embedding$", ("tensor", "fsdp")),
)
"""How each parameter is divided over a mesh: the hidden axes by "tensor", the others by "fsdp"."""

HEAD_RULE: tuple[str, tuple[str | None, ...]] = (r"head/kernel$", ("fsdp", "tensor"))
"""Of the output head, where it is a parameter of its own."""

INIT_STDDEV = 0.02
QUERY_PARTS = (
    4  # of the causal attention; more would save up to half of the work, in smaller pieces
)
MIN_QUERIES = 64  # in a part; fewer do not fill a matrix product


def _as_it_is(x_NxD: Array) -> Array:
    return x_NxD


def build(
    config: ModelConfig, vocab_size: int, constrain: Callable[[Array], Array] = _as_it_is
) -> "GPT":
    """Returns the model that `config` describes, for `vocab_size` symbols.

    Args:
        config: sizes and choices.
        vocab_size: symbols, V.
        constrain: applied to the activations between blocks; see `GPT`.

    Raises:
        InputError: an unknown activation or dtype, or a width that the heads do not divide.

    >>> model = build(ModelConfig(layers=1, heads=2, width=8, context=4), vocab_size=5)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> sorted(params)
    ['block_0', 'embedding', 'final_norm', 'position_embedding']
    >>> sorted(params["block_0"])
    ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    """
    if config.activation not in ACTIVATIONS:
        raise InputError(
            f"config.model.activation = {config.activation!r} is unknown; "
            f"{did_you_mean(config.activation, ACTIVATIONS)}"
        )
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"config.model.dtype = {config.dtype!r} cannot be used: give 'float32' or 'bfloat16'"
        )
    if config.width % config.heads:
        raise InputError(
            f"config.model.width = {config.width} cannot be used: "
            f"make it a multiple of heads = {config.heads}"
        )
    return GPT(config, vocab_size, constrain)


def partition_rules(config: ModelConfig) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Returns the partition rules of a model's parameters; see `parallel.partition`."""
    return PARTITION_RULES if config.tied_head else (*PARTITION_RULES, HEAD_RULE)


class GPT(nn.Module):
    """Logits for the next symbol after each token; parameters float32, computed in config.dtype.

    Two switches of the config change how this is computed, and neither the result nor the names and
    shapes of the parameters. With `remat` the backward pass is given only what enters each block
    and runs the block again; on a CPU that saves memory with `scan_layers` alone, since XLA may run
    the unscanned blocks again all at once. With `scan_layers` one compiled block runs in a loop
    over the stacked parameters of all, so compiling takes no longer for many layers than for one.
    Then dropout draws other numbers, of the same distribution, and no block can be seen by
    `nn.intercept_methods` or `capture_intermediates`.

    Attributes:
        config: sizes and choices; `build` checks them.
        vocab_size: symbols, V.
        constrain: applied to what enters each block and leaves the last, N x D, such as
            `parallel.constrain_rows`. Without it the partitioner may divide activations as the
            embedding is divided, over D, and each norm then has to ask all devices.
    """

    config: ModelConfig
    vocab_size: int
    constrain: Callable[[Array], Array] = _as_it_is

    @nn.compact
    def __call__(
        self, tokens_BxL: Int[Array, "B L"], *, train: bool = False
    ) -> Float[Array, "B L V"]:
        """Returns logits_BxLxV, float32.

        Args:
            tokens_BxL: int32 in [0, vocab_size), at most config.context of them in a row.
            train: apply dropout, which then needs the rng "dropout".

        Raises:
            InputError: L exceeds config.context (at trace time).
        """
        cfg = self.config
        batch, length = tokens_BxL.shape
        if length > cfg.context:
            raise InputError(
                f"{length} tokens exceed the model's context of {cfg.context}; "
                "cut the sequence or raise config.model.context"
            )
        init = nn.initializers.normal(INIT_STDDEV)
        embed = nn.Embed(
            self.vocab_size, cfg.width, embedding_init=init, dtype=cfg.dtype, name="embedding"
        )
        position_embedding = self.param("position_embedding", init, (cfg.context, cfg.width))
        x_BxLxD = embed(tokens_BxL) + position_embedding[:length].astype(cfg.dtype)
        x_NxD = x_BxLxD.reshape(batch * length, cfg.width)
        x_NxD = self.constrain(nn.Dropout(cfg.dropout)(x_NxD, deterministic=not train))
        if cfg.scan_layers and not self.is_initializing():
            key = self.make_rng("dropout") if train and cfg.dropout else None
            params = self.variables["params"]
            x_NxD = _scanned(cfg, params, x_NxD, batch, train, key, self.constrain)
        else:
            block = nn.remat(Block, static_argnums=(2, 3)) if cfg.remat else Block
            for layer in range(cfg.layers):
                x_NxD = self.constrain(block(cfg, name=f"block_{layer}")(x_NxD, batch, train))
        x_NxD = _norm(cfg, "final_norm")(x_NxD)
        if cfg.tied_head:
            # Not embed.attend, whose logits would be rounded to config.dtype.
            table_VxD = embed.embedding.astype(cfg.dtype)
            logits_NxV = jnp.einsum(
                "nd,vd->nv", x_NxD, table_VxD, preferred_element_type=jnp.float32
            )
        else:
            logits_NxV = _dense(cfg, self.vocab_size, "head")(x_NxD)
        return logits_NxV.astype(jnp.float32).reshape(batch, length, self.vocab_size)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array, batch: int, train: bool) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        y_NxD = _norm(cfg, "attention_norm")(x_NxD)
        x_NxD = x_NxD + drop(Attention(cfg, name="attention")(y_NxD, batch))
        y_NxD = _norm(cfg, "mlp_norm")(x_NxD)
        return x_NxD + drop(MLP(cfg, name="mlp")(y_NxD))


def _scanned(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    x_NxD: Array,
    batch: int,
    train: bool,
    key: Array | None,
    constrain: Callable[[Array], Array],
) -> Array:
    """Returns what the blocks make of x_NxD, all of them run by one compiled body.

    Args:
        cfg: of the model.
        params: of the model; those of block i under "block_i", as the unscanned model has them.
        x_NxD: what enters the first block.
        batch: sequences among the N tokens.
        train: apply dropout.
        key: for dropout, a key for each layer is split off it; None where there is none.
        constrain: applied to what leaves each block.
    """

    def stack(path: Any, *leaves: Array) -> Array:
        # Dense would make the same cast; made before, the stack takes half of the memory. A norm
        # multiplies by its scale in float32, so that stays as it is.
        if jax.tree_util.keystr(path).endswith("['kernel']"):
            return jnp.stack([leaf.astype(cfg.dtype) for leaf in leaves])
        return jnp.stack(leaves)

    blocks = [params[f"block_{layer}"] for layer in range(cfg.layers)]
    block = Block(cfg, parent=None)

    def run(x_NxD: Array, layer: tuple[Any, Array | None]) -> tuple[Array, None]:
        weights, key = layer
        rngs = {} if key is None else {"dropout": key}
        y_NxD: Any = block.apply({"params": weights}, x_NxD, batch, train, rngs=rngs)
        return constrain(y_NxD), None

    if cfg.remat:
        # The loop alone keeps the compiler from sharing values between the two passes.
        run = jax.checkpoint(run, prevent_cse=False)
    keys = None if key is None else jax.random.split(key, cfg.layers)
    x_NxD, _ = jax.lax.scan(run, x_NxD, (jax.tree.map_with_path(stack, *blocks), keys))
    return x_NxD


class Attention(nn.Module):
    """Causal self-attention; query, key, value and out are four kernels of D x D."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array, batch: int) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        qkv_bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias

        def heads(name: str) -> Array:
            y_NxD = _dense(cfg, cfg.width, name, use_bias=qkv_bias)(x_NxD)
            return y_NxD.reshape(batch, -1, cfg.heads, cfg.width // cfg.heads)

        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = heads("query"), heads("key"), heads("value")
        y_BxLxHxK = attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
        return _dense(cfg, cfg.width, "out", residual=True)(y_BxLxHxK.reshape(x_NxD.shape))


class MLP(nn.Module):
    """down(activation(up(x))), hidden width F = hidden_ratio * D."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        h_NxF = _dense(cfg, cfg.hidden_ratio * cfg.width, "up")(x_NxD)
        # Only its input is kept for the backward pass; what lies between is cheaper made anew.
        h_NxF = jax.checkpoint(ACTIVATIONS[cfg.activation])(h_NxF)
        return _dense(cfg, cfg.width, "down", residual=True)(h_NxF)


@jax.checkpoint  # the backward pass may make the L x L arrays anew: O(L) is kept of each head
def attention(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxHxK: Float[Array, "B L H K"],
    v_BxLxHxK: Float[Array, "B L H K"],
) -> Float[Array, "B L H K"]:
    """Returns softmax(mask(q kᵀ / √K)) v, each token attending to itself and those before it.

    The queries are taken in up to QUERY_PARTS consecutive parts, and a part meets only the keys up
    to its own last token: with four parts 5/8 of the products and exponentials remain. Scores and
    softmax are float32; the products are of the inputs' dtype and accumulate in float32.
    """
    length, width = q_BxLxHxK.shape[1], q_BxLxHxK.shape[-1]
    q_BxHxLxK = (q_BxLxHxK / math.sqrt(width)).swapaxes(1, 2)
    k_BxHxLxK, v_BxHxLxK = k_BxLxHxK.swapaxes(1, 2), v_BxLxHxK.swapaxes(1, 2)
    part = math.ceil(length / max(1, min(QUERY_PARTS, length // MIN_QUERIES)))
    parts = []
    for start in range(0, length, part):
        stop = min(start + part, length)
        q, k, v = q_BxHxLxK[:, :, start:stop], k_BxHxLxK[:, :, :stop], v_BxHxLxK[:, :, :stop]
        parts.append(_attend(q, k, v, start))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _attend(q_BxHxQxK: Array, k_BxHxLxK: Array, v_BxHxLxK: Array, start: int) -> Array:
    """Returns the outputs B x H x Q x K of Q queries, of which the first is at position `start`."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BxHxQxL = dot("bhqk,bhlk->bhql", q_BxHxQxK, k_BxHxLxK)
    seen_QxL = jnp.tri(*scores_BxHxQxL.shape[2:], k=start, dtype=bool)
    scores_BxHxQxL = jnp.where(seen_QxL, scores_BxHxQxL, -jnp.inf)
    # The maximum cancels in the quotient, so no gradient need flow through it.
    top_BxHxQx1 = jax.lax.stop_gradient(scores_BxHxQxL.max(-1, keepdims=True))
    weights_BxHxQxL = jnp.exp(scores_BxHxQxL - top_BxHxQx1)
    # Divided after the product, where the array is L / K times smaller.
    y_BxHxQxK = dot("bhql,bhlk->bhqk", weights_BxHxQxL.astype(v_BxHxLxK.dtype), v_BxHxLxK)
    return (y_BxHxQxK / weights_BxHxQxL.sum(-1, keepdims=True)).astype(v_BxHxLxK.dtype)


def _dense(
    cfg: ModelConfig, features: int, name: str, use_bias: bool | None = None, residual: bool = False
) -> nn.Dense:
    # GPT-2 scales what is added to the residual stream by 1 / sqrt(additions), two in every layer.
    stddev = INIT_STDDEV / math.sqrt(2 * cfg.layers) if residual else INIT_STDDEV
    return nn.Dense(
        features,
        use_bias=cfg.use_bias if use_bias is None else use_bias,
        kernel_init=nn.initializers.normal(stddev),
        dtype=cfg.dtype,
        name=name,
    )


def _norm(cfg: ModelConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_bias=cfg.use_bias, dtype=cfg.dtype, name=name)
