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
from swe_prune.models.block import ACTIVATIONS, INIT_STDDEV, Block, dense, norm
from swe_prune.models.kv_cache import Cache, Positions, empty_cache, positions_and_masks

__all__ = ["ACTIVATIONS",
    "BLOCKS", "GPT", "Block", "Cache", "attention", "build", "empty_cache",
           "partition_rules"]  # fmt: skip

BLOCKS = r"block_[0-9]+"
"""Matches the paths of the blocks, which `blockwise` takes one after another."""

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
        positions_BxL, places = positions_and_masks(cfg, batch, length, valid_BxL, cache)
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
        x_NxD = norm(cfg, "final_norm")(x_NxD)
        if cfg.tied_head:
            # Not embed.attend, whose logits would be rounded to config.dtype.
            table_VxD = embed.embedding.astype(cfg.dtype)
            logits_NxV = jnp.einsum(
                "nd,vd->nv", x_NxD, table_VxD, preferred_element_type=jnp.float32
            )
        else:
            logits_NxV = dense(cfg, self.vocab_size, "head", cfg.head_bias)(x_NxD)
        return logits_NxV.astype(jnp.float32).reshape(batch, length, self.vocab_size), cache


def _scanned(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    x_NxD: Array,
    batch: int,
    train: bool,
    places: Positions,
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
