"""A decoder-only Transformer: pre-norm, causal. One decoder for several families, by its config.

GPT-2 as nanoGPT writes it is the default: layer norm, learned positions, one MLP. Llama, Mistral
and Phi-3 have RMS norm, rotary positions, a gated MLP, and heads of keys and values that groups of
queries share; `interop` reads their checkpoints.

The activations travel as N x D, tokens of the whole batch by width: a matrix product over two axes
is the one shape that every backend runs at full speed. Heads exist inside `attention` only.
Dropout acts on the embedding and on what each block adds, not on the attention's weights.

Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2: pre-norm, the initialization),
https://github.com/karpathy/nanoGPT (one flag for all biases, the 10.7 M character-level model),
Zhang and Sennrich 2019 (RMS norm), Shazeer 2020 (gated MLP), Touvron et al. 2023 (Llama).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, did_you_mean
from swe_prune.models import rope
from swe_prune.models.attention import attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's, by tanh
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

Rule = tuple[str, tuple[str | None, ...]]

PARTITION_RULES: tuple[Rule, ...] = (
    (r"(query|key|value|up|gate)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"embedding/embedding$", ("tensor", "fsdp")),
)
"""How each parameter is divided over a mesh: the hidden axes by "tensor", the others by "fsdp"."""

POSITION_RULE: Rule = (r"position_embedding$", (None, "fsdp"))
HEAD_RULE: Rule = (r"head/kernel$", ("fsdp", "tensor"))
"""Of learned positions and of the output head, where there is a parameter for them."""

INIT_STDDEV = 0.02


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
        InputError: a setting that is unknown, or heads that do not divide what they must.

    >>> model = build(ModelConfig(layers=1, heads=2, width=8, context=4), vocab_size=5)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> sorted(params)
    ['block_0', 'embedding', 'final_norm', 'position_embedding']
    >>> sorted(params["block_0"])
    ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    """
    known = {
        "activation": ACTIVATIONS,
        "norm": ("layer", "rms"),
        "positions": ("learned", "rope"),
    }
    for name, choices in known.items():
        value = getattr(config, name)
        if value not in choices:
            raise InputError(
                f"config.model.{name} = {value!r} is unknown; {did_you_mean(value, choices)}"
            )
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"config.model.dtype = {config.dtype!r} cannot be used: give 'float32' or 'bfloat16'"
        )
    if config.head_width is None and config.width % config.heads:
        raise InputError(
            f"config.model.width = {config.width} cannot be used: "
            f"make it a multiple of heads = {config.heads}"
        )
    if config.key_heads < 1 or config.heads % config.key_heads:
        raise InputError(
            f"config.model.kv_heads = {config.kv_heads} cannot be used: "
            f"give a divisor of heads = {config.heads}"
        )
    if config.window is not None and config.window < 1:
        raise InputError(f"config.model.window = {config.window} sees no token; give 1 or more")
    if config.positions == "rope":
        rope.check(config, config.head_size)
    return GPT(config, vocab_size, constrain)


def partition_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the partition rules of a model's parameters; see `parallel.partition`."""
    learned = (POSITION_RULE,) if config.positions == "learned" else ()
    return (*learned, *PARTITION_RULES, *(() if config.tied_head else (HEAD_RULE,)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far, to go on from without computing them again.

    Attributes:
        keys: of each block, B x T x G x K with room for T tokens.
        values: the same.
        valid_BxT: False for padding and for room that is not used yet.
        length: tokens so far, padding included, int32.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    valid_BxT: Bool[Array, "B T"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None = None) -> Cache:
    """Returns a cache with room for `capacity` tokens of each of `batch` sequences.

    Args:
        config: of the model.
        batch: B.
        capacity: T, the prompt's tokens and the new ones.
        dtype: of keys and values; None: the computation's.

    Raises:
        InputError: more room than the model's context.
    """
    if capacity > config.context:
        raise InputError(
            f"{capacity} tokens exceed the model's context of {config.context}; "
            "shorten the prompt or ask for fewer new tokens"
        )
    shape = (batch, capacity, config.key_heads, config.head_size)

    def room() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype or config.dtype) for _ in range(config.layers))

    return Cache(room(), room(), jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens stand, which every block's attention asks.

    Attributes:
        turn: cosine and sine of `rope.rotation`, or None.
        valid_BxT: of the keys, or None: all are valid.
        start: position of the first token among the keys.
    """

    turn: tuple[Array, Array] | None = None
    valid_BxT: Array | None = None
    start: Array | None = None


PLAIN = Places()
"""Learned positions, no padding, no cache."""


class GPT(nn.Module):
    """Logits for the next symbol after each token, computed in config.dtype.

    Parameters are born float32; those of a checkpoint keep their dtype.

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

    def __call__(
        self,
        tokens_BxL: Int[Array, "B L"],
        *,
        train: bool = False,
        valid_BxL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Returns logits_BxLxV, float32.

        Args:
            tokens_BxL: int32 in [0, vocab_size), at most config.context of them in a row.
            train: apply dropout, which then needs the rng "dropout".
            valid_BxL: False for padding, which nothing sees and no position counts; its own logits
                mean nothing.

        Raises:
            InputError: L exceeds config.context (at trace time).
        """
        logits_BxLxV, _ = self._run(tokens_BxL, train, valid_BxL, None)
        return logits_BxLxV

    def decode(
        self,
        tokens_BxL: Int[Array, "B L"],
        cache: Cache,
        valid_BxL: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Returns the logits of the tokens that follow those of a cache, and the longer cache.

        The first call takes the prompt, padded on the left where prompts differ in length; each
        later one the next token. Applied with `method="decode"`.

        Args:
            tokens_BxL: int32; with those before them no more than the cache has room for, which a
                traced length cannot tell: the last ones would be written over.
            cache: of `empty_cache`, or of the call before.
            valid_BxL: as in `__call__`.

        Raises:
            InputError: L alone exceeds the cache (at trace time).
        """
        room = cache.valid_BxT.shape[1]
        if tokens_BxL.shape[1] > room:
            raise InputError(
                f"{tokens_BxL.shape[1]} tokens exceed the cache's room for {room}; "
                "make it larger in empty_cache"
            )
        logits_BxLxV, cache = self._run(tokens_BxL, False, valid_BxL, cache)
        return logits_BxLxV, cache

    @nn.compact
    def _run(
        self, tokens_BxL: Array, train: bool, valid_BxL: Array | None, cache: Cache | None
    ) -> tuple[Array, Any]:
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
        x_BxLxD = embed(tokens_BxL)
        positions_BxL, places = _places(cfg, batch, length, valid_BxL, cache)
        if cfg.positions == "learned":
            table = self.param("position_embedding", init, (cfg.context, cfg.width))
            learned = table[:length] if positions_BxL is None else table[positions_BxL]
            x_BxLxD = x_BxLxD + learned.astype(cfg.dtype)
        x_NxD = x_BxLxD.reshape(batch * length, cfg.width)
        x_NxD = self.constrain(nn.Dropout(cfg.dropout)(x_NxD, deterministic=not train))
        if cache is not None:
            keys, values = [], []
            for layer in range(cfg.layers):
                kept = (cache.keys[layer], cache.values[layer])
                block = Block(cfg, name=f"block_{layer}")
                x_NxD, (k, v) = block(x_NxD, batch, train, places, kept)
                keys.append(k)
                values.append(v)
            assert places.valid_BxT is not None
            cache = Cache(tuple(keys), tuple(values), places.valid_BxT, cache.length + length)
        elif cfg.scan_layers and not self.is_initializing():
            key = self.make_rng("dropout") if train and cfg.dropout else None
            params = self.variables["params"]
            x_NxD = _scanned(cfg, params, x_NxD, batch, train, places, key, self.constrain)
        else:
            block = nn.remat(Block, static_argnums=(2, 3)) if cfg.remat else Block
            for layer in range(cfg.layers):
                run = block(cfg, name=f"block_{layer}")
                x_NxD = self.constrain(run(x_NxD, batch, train, places))
        x_NxD = _norm(cfg, "final_norm")(x_NxD)
        if cfg.tied_head:
            # Not embed.attend, whose logits would be rounded to config.dtype.
            table_VxD = embed.embedding.astype(cfg.dtype)
            logits_NxV = jnp.einsum(
                "nd,vd->nv", x_NxD, table_VxD, preferred_element_type=jnp.float32
            )
        else:
            logits_NxV = _dense(cfg, self.vocab_size, "head", cfg.head_bias)(x_NxD)
        return logits_NxV.astype(jnp.float32).reshape(batch, length, self.vocab_size), cache


def _places(
    cfg: ModelConfig, batch: int, length: int, valid_BxL: Array | None, cache: Cache | None
) -> tuple[Array | None, Places]:
    """Returns the position of each token, None for 0, 1, …, and what the attention asks of it."""
    if valid_BxL is None and cache is None:
        if cfg.positions == "learned":
            return None, Places()
        plain_1xL = jnp.arange(length, dtype=jnp.int32)[None]
        return plain_1xL, Places(rope.rotation(cfg, cfg.head_size, plain_1xL))
    valid_BxL = jnp.ones((batch, length), bool) if valid_BxL is None else valid_BxL
    before_B, valid_BxT, start = jnp.zeros(batch, jnp.int32), valid_BxL, None
    if cache is not None:
        start = cache.length
        before_B = cache.valid_BxT.sum(-1, dtype=jnp.int32)
        valid_BxT = jax.lax.dynamic_update_slice(cache.valid_BxT, valid_BxL, (0, start))
    # Padding stands at 0, wherever it is: it is not seen.
    positions_BxL = before_B[:, None] + jnp.cumsum(valid_BxL, axis=1, dtype=jnp.int32) - 1
    positions_BxL = jnp.maximum(positions_BxL, 0)
    turn = None
    if cfg.positions == "rope":
        turn = rope.rotation(cfg, cfg.head_size, positions_BxL)
    return positions_BxL, Places(turn, valid_BxT, start)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with the keys and values kept, if any are."""

    config: ModelConfig

    @nn.compact
    def __call__(  # noqa: D102 (the class's)
        self,
        x_NxD: Array,
        batch: int,
        train: bool,
        places: Places = PLAIN,
        kept: tuple[Array, Array] | None = None,
    ) -> Any:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        y_NxD = _norm(cfg, "attention_norm")(x_NxD)
        y_NxD, kept = Attention(cfg, name="attention")(y_NxD, batch, places, kept)
        x_NxD = x_NxD + drop(y_NxD)
        y_NxD = _norm(cfg, "mlp_norm")(x_NxD)
        x_NxD = x_NxD + drop(MLP(cfg, name="mlp")(y_NxD))
        return x_NxD if kept is None else (x_NxD, kept)


def _scanned(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    x_NxD: Array,
    batch: int,
    train: bool,
    places: Places,
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
        places: of the tokens.
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
        y_NxD: Any = block.apply({"params": weights}, x_NxD, batch, train, places, rngs=rngs)
        return constrain(y_NxD), None

    if cfg.remat:
        # The loop alone keeps the compiler from sharing values between the two passes.
        run = jax.checkpoint(run, prevent_cse=False)
    keys = None if key is None else jax.random.split(key, cfg.layers)
    x_NxD, _ = jax.lax.scan(run, x_NxD, (jax.tree.map_with_path(stack, *blocks), keys))
    return x_NxD


class Attention(nn.Module):
    """Causal self-attention: kernels query (D x HK), key and value (D x GK), and out (HK x D)."""

    config: ModelConfig

    @nn.compact
    def __call__(  # noqa: D102 (the class's)
        self,
        x_NxD: Array,
        batch: int,
        places: Places = PLAIN,
        kept: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        cfg = self.config

        def heads(name: str, count: int) -> Array:
            y_NxC = _dense(cfg, count * cfg.head_size, name, cfg.qkv_bias)(x_NxD)
            return y_NxC.reshape(batch, -1, count, cfg.head_size)

        q_BxLxHxK = heads("query", cfg.heads)
        k_BxTxGxK, v_BxTxGxK = heads("key", cfg.key_heads), heads("value", cfg.key_heads)
        if places.turn is not None:
            q_BxLxHxK = rope.rotate(q_BxLxHxK, places.turn)
            k_BxTxGxK = rope.rotate(k_BxTxGxK, places.turn)
        start = 0 if places.start is None else places.start
        if kept is not None:
            at = (0, start, 0, 0)
            k_BxTxGxK, v_BxTxGxK = kept = (
                jax.lax.dynamic_update_slice(kept[0], k_BxTxGxK.astype(kept[0].dtype), at),
                jax.lax.dynamic_update_slice(kept[1], v_BxTxGxK.astype(kept[1].dtype), at),
            )
        y_BxLxHxK = attention(
            q_BxLxHxK,
            k_BxTxGxK,
            v_BxTxGxK,
            window=cfg.window,
            valid_BxT=places.valid_BxT,
            start=start,
        )
        y_NxC = y_BxLxHxK.reshape(len(x_NxD), -1)
        return _dense(cfg, cfg.width, "out", cfg.out_bias, residual=True)(y_NxC), kept


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where it is gated."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_NxD: Array) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        h_NxF = _dense(cfg, cfg.hidden_size, "up", cfg.mlp_bias)(x_NxD)
        # Only its input is kept for the backward pass; what lies between is cheaper made anew.
        activation = jax.checkpoint(ACTIVATIONS[cfg.activation])
        if cfg.gated:
            h_NxF = activation(_dense(cfg, cfg.hidden_size, "gate", cfg.mlp_bias)(x_NxD)) * h_NxF
        else:
            h_NxF = activation(h_NxF)
        return _dense(cfg, cfg.width, "down", cfg.mlp_bias, residual=True)(h_NxF)


def _dense(
    cfg: ModelConfig, features: int, name: str, use_bias: bool | None, residual: bool = False
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


def _norm(cfg: ModelConfig, name: str) -> nn.Module:
    if cfg.norm == "rms":
        return nn.RMSNorm(epsilon=cfg.norm_epsilon, dtype=cfg.dtype, name=name)
    return nn.LayerNorm(epsilon=cfg.norm_epsilon, use_bias=cfg.use_bias, dtype=cfg.dtype, name=name)
