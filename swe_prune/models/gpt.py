"""Decoder-only Transformer with causal attention, for many model families.

The default is GPT-2: layer norm, learned positions, and a plain MLP with the tanh form of GELU.
nanoGPT differs in having the exact GELU, `activation="gelu_exact"`. Llama and those after it have
RMS norm, rotary positions, a gated MLP, and grouped-query attention. What a family has of its own
is a field of `ModelConfig`: norms of queries and keys (Qwen3, OLMo 2), norms behind
attention and MLP, capped scores and logits, layers with a window between layers without (Gemma),
attention and MLP in parallel (GPT-NeoX), sparse experts (Mixtral). `interop` reads the pretrained
weights of all of them.

Activations have the shape N x D, all tokens of the batch by width, because matrix products over two
axes run at full speed on every backend. Only `attention` has a head axis. Dropout is applied to the
embedding and to the output of each sub-layer, not to the attention weights.

Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2: pre-norm, the initialization),
https://github.com/karpathy/nanoGPT (one flag for all biases, the 10.7 M character-level model),
Zhang and Sennrich 2019 (RMS norm), Shazeer 2020 (gated MLP), Touvron et al. 2023 (Llama).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models.attention import attention
from swe_prune.models.block import Block, scanned
from swe_prune.models.checks import check
from swe_prune.models.fusing import fuse
from swe_prune.models.kv_cache import Cache, empty_cache, positions_and_masks
from swe_prune.models.layers import ACTIVATIONS, dense, norm

__all__ = ["ACTIVATIONS",
    "BLOCKS", "GPT", "Block", "Cache", "attention", "build", "empty_cache", "fuse",
           "partition_rules"]  # fmt: skip

BLOCKS = r"block_[0-9]+"
"""Regular expression for the paths of the blocks, which `blockwise` prunes one by one."""

Rule = tuple[str, tuple[str | None, ...]]

PARTITION_RULES: tuple[Rule, ...] = (
    (r"(query|key|value|up|gate)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"embedding/embedding$", ("tensor", "fsdp")),
)
"""Partition of the parameters over a mesh: hidden axes over "tensor", the others over "fsdp"."""

ATTENTION_RULES: tuple[Rule, ...] = (
    (r"(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"out/kernel$", ("tensor", "fsdp")),
    PARTITION_RULES[-1],
)
"""The same where the MLPs are sparse experts, which have rules of their own."""

POSITION_RULE: Rule = (r"position_embedding$", (None, "fsdp"))
HEAD_RULE: Rule = (r"head/kernel$", ("fsdp", "tensor"))
EXPERT_RULES: tuple[Rule, ...] = (
    (r"router/kernel$", ("fsdp", None)),
    (r"mlp/(up|gate)/kernel$", (None, "fsdp", "tensor")),
    (r"mlp/down/kernel$", (None, "tensor", "fsdp")),
)
HEAD_NORM_RULE: Rule = (r"(query|key)_norm/scale$", ())
"""Rules for learned positions, an untied output head, sparse experts, and norms with a scale for
each head, if the model has them."""


def identity(x_NxD: Array) -> Array:
    return x_NxD


def build(
    config: ModelConfig, vocab_size: int, constrain: Callable[[Array], Array] = identity
) -> "GPT":
    """Builds the model for a config.

    Args:
        config: Sizes and choices of the model.
        vocab_size: Size V of the vocabulary.
        constrain: Function applied to the activations between blocks; see `GPT`.

    Raises:
        InputError: If a setting is unknown, or the heads do not divide the width.

    >>> import jax
    >>> model = build(ModelConfig(layers=1, heads=2, width=8, context=4), vocab_size=5)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> sorted(params)
    ['block_0', 'embedding', 'final_norm', 'position_embedding']
    >>> sorted(params["block_0"])
    ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    """
    check(config)
    return GPT(config, vocab_size, constrain)


def partition_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the partition rules of the model's parameters, for `parallel.partition`."""
    learned = (POSITION_RULE,) if config.positions == "learned" else ()
    experts = () if config.experts is None else EXPERT_RULES
    rules = PARTITION_RULES if config.experts is None else ATTENTION_RULES
    norms = (HEAD_NORM_RULE,) if config.head_norm == "each_head" else ()
    return (*learned, *experts, *rules, *norms, *(() if config.tied_head else (HEAD_RULE,)))


class GPT(nn.Module):
    """Decoder that returns logits for the next symbol after each token, computed in config.dtype.

    Parameters are initialized as float32; pretrained parameters retain their dtype.

    Two switches of the config change how the model is computed, but not its result or the names
    and shapes of its parameters. With `remat` the backward pass stores only the input of each block
    and recomputes the block. On a CPU this saves memory only together with `scan_layers`, because
    XLA may recompute all unscanned blocks at once. With `scan_layers` one compiled block runs in a
    loop over the stacked parameters of all blocks, so the compilation time does not grow with the
    number of layers. Dropout then draws different numbers from the same distribution, and
    `nn.intercept_methods` and `capture_intermediates` cannot see the blocks.

    Attributes:
        config: Sizes and choices of the model, checked by `build`.
        vocab_size: Size V of the vocabulary.
        constrain: Function applied to the input of each block and the output of the last, N x D,
            such as `parallel.constrain_rows`. Without it the partitioner may shard activations like
            the embedding, over D, so that each norm needs communication.
    """

    config: ModelConfig
    vocab_size: int
    constrain: Callable[[Array], Array] = identity

    def __call__(
        self,
        tokens_BxL: Int[Array, "B L"],
        *,
        train: bool = False,
        valid_BxL: Bool[Array, "B L"] | None = None,
        images_BxTxD: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Returns logits_BxLxV, float32.

        Args:
            tokens_BxL: Int32 tokens in [0, vocab_size), at most config.context per row.
            train: Whether to apply dropout, which needs the rng "dropout".
            valid_BxL: False for padding, which is masked and does not count as a position; the
                logits of padding are meaningless. If None, there is no padding.
            images_BxTxD: Embeddings of images, which take the places of the tokens below 0, in
                their order; a row may have more. If None, no token is below 0.

        Raises:
            InputError: If L exceeds config.context (at trace time).
        """
        logits_BxLxV, _ = self._run(tokens_BxL, train, valid_BxL, None, images_BxTxD)
        return logits_BxLxV

    def decode(
        self,
        tokens_BxL: Int[Array, "B L"],
        cache: Cache,
        valid_BxL: Bool[Array, "B L"] | None = None,
        images_BxTxD: Float[Array, "B T D"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Returns the logits of tokens that follow those in a KV cache, and the updated cache.

        The first call takes the prompts, padded on the left if they differ in length, and each
        later call the next token. Use it with `model.apply(..., method="decode")`.

        Args:
            tokens_BxL: Int32 tokens. Together with the cached tokens they must fit into the cache;
                this is not checked, and otherwise the last tokens are overwritten.
            cache: KV cache from `empty_cache` or the previous call.
            valid_BxL: False for padding, which is masked. If None, there is no padding.
            images_BxTxD: Embeddings of the images in these tokens, as in `__call__`.
            last_only: Whether to compute the logits of the last token alone, B x 1 x V.

        Raises:
            InputError: If L alone exceeds the capacity of the cache (at trace time).
        """
        room = cache.valid_BxT.shape[1]
        if tokens_BxL.shape[1] > room:
            raise InputError(
                f"{tokens_BxL.shape[1]} tokens exceed the cache's capacity of {room}; "
                "increase it in empty_cache"
            )
        return self._run(tokens_BxL, False, valid_BxL, cache, images_BxTxD, last_only)

    @nn.compact
    def _run(
        self,
        tokens_BxL: Array,
        train: bool,
        valid_BxL: Array | None,
        cache: Cache | None,
        images_BxTxD: Array | None = None,
        last_only: bool = False,
    ) -> tuple[Array, Any]:
        # 1. Embed the tokens, and add their positions if these are learned.
        cfg = self.config
        batch, length = tokens_BxL.shape
        if length > cfg.context:
            raise InputError(
                f"{length} tokens exceed the model's context of {cfg.context}; "
                "cut the sequence or raise config.model.context"
            )
        init = nn.initializers.normal(cfg.init_stddev)
        embed = nn.Embed(
            self.vocab_size, cfg.width, embedding_init=init, dtype=cfg.dtype, name="embedding"
        )
        words_BxL = tokens_BxL if images_BxTxD is None else jnp.maximum(tokens_BxL, 0)
        x_BxLxD = embed(words_BxL)
        if cfg.embedding_scale != 1:
            x_BxLxD = x_BxLxD * jnp.asarray(cfg.embedding_scale, cfg.dtype)
        if images_BxTxD is not None:
            x_BxLxD = _placed(images_BxTxD.astype(cfg.dtype), tokens_BxL, x_BxLxD)
        positions_BxL, positions = positions_and_masks(cfg, batch, length, valid_BxL, cache)
        if cfg.positions == "learned":
            first = cfg.position_offset
            table = self.param("position_embedding", init, (first + cfg.context, cfg.width))
            if positions_BxL is None:
                learned = table[first : first + length]
            else:
                learned = table[positions_BxL + first]
            x_BxLxD = x_BxLxD + learned.astype(cfg.dtype)
        x_NxD = x_BxLxD.reshape(batch * length, cfg.width)
        x_NxD = self.constrain(nn.Dropout(cfg.dropout)(x_NxD, deterministic=not train))
        # 2. Run the blocks: with a KV cache, scanned, or one after another.
        if cache is not None:
            keys, values = [], []
            for layer in range(cfg.layers):
                kv = (cache.keys[layer], cache.values[layer])
                block = Block(cfg.of_layer(layer), name=f"block_{layer}")
                x_NxD, (k, v) = block(x_NxD, batch, train, positions, kv)
                keys.append(k)
                values.append(v)
            assert positions.valid_BxT is not None
            cache = Cache(tuple(keys), tuple(values), positions.valid_BxT, cache.length + length)
        elif cfg.scan_layers and not self.is_initializing():
            key = self.make_rng("dropout") if train and cfg.dropout else None
            params = self.variables["params"]
            x_NxD = scanned(cfg, params, x_NxD, batch, train, positions, key, self.constrain)
        else:
            block = nn.remat(Block, static_argnums=(2, 3)) if cfg.remat else Block
            for layer in range(cfg.layers):
                run = block(cfg.of_layer(layer), name=f"block_{layer}")
                x_NxD = self.constrain(run(x_NxD, batch, train, positions))
        # 3. Compute the logits with the embedding table or a separate head.
        if last_only:
            x_NxD = x_NxD.reshape(batch, length, cfg.width)[:, -1]
        x_NxD = norm(cfg, "final_norm")(x_NxD)
        if cfg.tied_head:
            # Not embed.attend, which rounds the logits to config.dtype.
            table_VxD = embed.embedding.astype(cfg.dtype)
            logits_NxV = jnp.einsum(
                "nd,vd->nv", x_NxD, table_VxD, preferred_element_type=jnp.float32
            )
        else:
            logits_NxV = dense(cfg, self.vocab_size, "head", cfg.head_bias)(x_NxD)
        logits_NxV = logits_NxV.astype(jnp.float32)
        if cfg.logit_divisor != 1:
            logits_NxV = logits_NxV / cfg.logit_divisor
        if cfg.logit_cap is not None:
            logits_NxV = cfg.logit_cap * jnp.tanh(logits_NxV / cfg.logit_cap)
        return logits_NxV.reshape(batch, -1, self.vocab_size), cache


def _placed(images_BxTxD: Array, tokens_BxL: Array, words_BxLxD: Array) -> Array:
    """Returns the embeddings of words, with those of images where tokens are below 0."""
    here_BxL = tokens_BxL < 0
    slot_BxL = jnp.maximum(jnp.cumsum(here_BxL, axis=1) - 1, 0)
    found_BxLxD = jnp.take_along_axis(images_BxTxD, slot_BxL[..., None], axis=1)
    return jnp.where(here_BxL[..., None], found_BxLxD, words_BxLxD)
