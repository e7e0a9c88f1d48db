"""Positions of tokens, and the cache of keys and values of earlier tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError
from swe_prune.models import rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """KV cache: the keys and values of the tokens so far.

    Attributes:
        keys: Keys of each block, B x T x G x K, with room for T tokens.
        values: Values of each block, B x T x G x K.
        valid_BxT: False for padding and for room that is not used yet.
        length: Number of tokens so far, padding included, int32.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    valid_BxT: Bool[Array, "B T"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Returns a cache in the computation dtype, for `capacity` tokens of each of `batch` sequences.

    Args:
        config: Config of the model.
        batch: Number of sequences B.
        capacity: Number of tokens T, prompt and new tokens together.

    Raises:
        InputError: If the capacity exceeds the model's context.
    """
    if capacity > config.context:
        raise InputError(
            f"{capacity} tokens exceed the model's context of {config.context}; "
            "shorten the prompt or ask for fewer new tokens"
        )

    def room() -> tuple[Array, ...]:
        layers = [config.of_layer(layer) for layer in range(config.layers)]
        shapes = [(batch, capacity, own.key_heads, own.head_size) for own in layers]
        return tuple(jnp.zeros(shape, config.dtype) for shape in shapes)

    return Cache(room(), room(), jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions and masks of the tokens, shared by the attention of all blocks.

    Attributes:
        turn: Cosine and sine of `rope.rotation`, or None without rotary positions.
        sliding_turn: Cosine and sine for the layers with a window, if these have a theta of their
            own, else None.
        valid_BxT: False for keys of padding, or None if all keys are valid.
        start: Position of the first token among the keys, or None for 0.
    """

    turn: tuple[Array, Array] | None = None
    valid_BxT: Array | None = None
    start: Array | None = None
    sliding_turn: tuple[Array, Array] | None = None

    def turn_of(self, cfg: ModelConfig) -> tuple[Array, Array] | None:
        """Returns the cosine and sine for a layer, or None if it has no rotary positions.

        Args:
            cfg: Config of the layer, from `ModelConfig.of_layer`.
        """
        if cfg.positions != "rope":
            return None
        return self.turn if cfg.sliding_theta is None else self.sliding_turn


PLAIN = Positions()
"""Learned positions, no padding, no cache."""


def positions_and_masks(
    cfg: ModelConfig, batch: int, length: int, valid_BxL: Array | None, cache: Cache | None
) -> tuple[Array | None, Positions]:
    """Returns the position of each token, None for 0, 1, …, and the `Positions` for attention.

    Args:
        cfg: Config of the model.
        batch: Number of sequences B.
        length: Number of tokens L.
        valid_BxL: False for padding, or None if there is none.
        cache: KV cache of the earlier tokens, or None if there are none.
    """
    # Without padding and cache, the positions are 0, 1, … in every row.
    if valid_BxL is None and cache is None:
        if cfg.positions != "rope":
            return None, Positions()
        plain_1xL = jnp.arange(length, dtype=jnp.int32)[None]
        turn, sliding_turn = _turns(cfg, plain_1xL)
        return plain_1xL, Positions(turn, sliding_turn=sliding_turn)
    # Positions count valid tokens only, and continue after those in the cache.
    valid_BxL = jnp.ones((batch, length), bool) if valid_BxL is None else valid_BxL
    before_B, valid_BxT, start = jnp.zeros(batch, jnp.int32), valid_BxL, None
    if cache is not None:
        start = cache.length
        before_B = cache.valid_BxT.sum(-1, dtype=jnp.int32)
        valid_BxT = jax.lax.dynamic_update_slice(cache.valid_BxT, valid_BxL, (0, start))
    # Padding before the first token would be at -1; it is masked, so any position will do.
    positions_BxL = before_B[:, None] + jnp.cumsum(valid_BxL, axis=1, dtype=jnp.int32) - 1
    positions_BxL = jnp.maximum(positions_BxL, 0)
    turn, sliding_turn = _turns(cfg, positions_BxL)
    return positions_BxL, Positions(turn, valid_BxT, start, sliding_turn)


def _turns(cfg: ModelConfig, positions_BxL: Array) -> tuple[Any, Any]:
    """Returns `rope.rotation` for all layers, and for those with a window and its own theta."""
    turn = sliding_turn = None
    if cfg.positions == "rope":
        turn = rope.rotation(cfg, cfg.head_size, positions_BxL)
        if cfg.sliding_theta is not None:
            own = RopeConfig(theta=cfg.sliding_theta, share=cfg.rope.share)
            sliding = dataclasses.replace(cfg, rope=own)
            sliding_turn = rope.rotation(sliding, cfg.head_size, positions_BxL)
    return turn, sliding_turn
