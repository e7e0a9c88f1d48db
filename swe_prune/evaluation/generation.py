"""Text from a model, token after token, with the keys and values of what was said kept."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from swe_prune.errors import InputError
from swe_prune.evaluation.sampling import Sampling, draw
from swe_prune.evaluation.token_losses import check_tokens, context_of
from swe_prune.models import gpt

LENGTHS = 32
"""Prompts are padded to a multiple of so many tokens, so that few programs are compiled."""
AT_ONCE = 128
"""Tokens of the prompts that the model takes at a time, whose logits are in memory together."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model made of each prompt.

    Attributes:
        tokens: the new tokens of each, without the prompt and without the final eos_id.
        ended: for each, whether it ended by itself, with eos_id.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]


def generate(
    model: Any,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    seed: int,
    eos_id: int | None = None,
) -> Generated:
    """Returns up to `max_new_tokens` more tokens for each prompt.

    The prompts are padded on the left and run together: one program, compiled for the number of
    prompts, their padded length and `max_new_tokens`, takes them in and then loops until all have
    ended. What a prompt is answered depends on the seed and on its place among the prompts, and
    not on what the others are; but for the rounding of products of other shapes, and for rotary
    positions that are scaled by the longest text ("dynamic" and "longrope").

    Args:
        model: of `models.gpt`.
        params: its weights.
        prompts: token ids of each, one or more.
        max_new_tokens: of each, at most.
        sampling: how each token is chosen.
        seed: of what is drawn.
        eos_id: the token that ends a text; None: none does.

    Raises:
        InputError: no prompt or an empty one, tokens that the model does not have, or a prompt
            whose answer would exceed the context.
    """
    rows = [np.asarray(prompt, dtype=np.int64).reshape(-1) for prompt in prompts]
    length = _checked(model, rows, max_new_tokens)
    tokens_BxL = np.zeros((len(rows), length), np.int32)
    valid_BxL = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        tokens_BxL[number, length - len(row) :] = row
        valid_BxL[number, length - len(row) :] = True
    key = jax.random.key(seed)
    eos = -1 if eos_id is None else eos_id  # no token is -1
    new_BxN = np.asarray(
        _generate(model, sampling, max_new_tokens, params, tokens_BxL, valid_BxL, key, eos)
    )
    is_eos_BxN = new_BxN == eos
    ended = is_eos_BxN.any(axis=1)
    kept = np.where(ended, is_eos_BxN.argmax(axis=1), max_new_tokens)
    tokens = tuple(tuple(row[:n].tolist()) for row, n in zip(new_BxN, kept, strict=True))
    return Generated(tokens, tuple(ended.tolist()))


def _checked(model: Any, rows: list[np.ndarray], max_new_tokens: int) -> int:
    """Returns the length to which the prompts are padded."""
    if not rows:
        raise InputError("there is no prompt to go on from; give one or more")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens} asks for nothing; give 1 or more")
    for number, row in enumerate(rows):
        if not len(row):
            raise InputError(
                f"prompt {number} is empty; give it a token, such as the one that begins a text"
            )
        check_tokens(model, row, f"prompt {number}")
    longest = max(map(len, rows))
    padded = -(-longest // LENGTHS) * LENGTHS
    context = context_of(model)
    if context is None:
        return padded
    if longest + max_new_tokens > context:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {context}; shorten the prompt or ask for at most "
            f"{max(0, context - longest)} new tokens"
        )
    return min(padded, context - max_new_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model: Any,
    sampling: Sampling,
    new: int,
    params: PyTree,
    tokens_BxL: Int[Array, "B L"],
    valid_BxL: Bool[Array, "B L"],
    key: Key[Array, ""],
    eos: Int[Array, ""],
) -> Int[Array, "B N"]:
    """Returns the new tokens; what follows a row's `eos` means nothing."""
    batch, length = tokens_BxL.shape
    rows_B = jnp.arange(batch)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)

    def choose(logits_BxV: Array, step: Any) -> Array:
        of_step_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return draw(logits_BxV, of_step_B, sampling)

    def going_on(state: Any) -> Array:
        step, _, _, _, done_B = state
        return (step < new) & ~done_B.all()

    def go_on(state: Any) -> Any:
        step, token_B, new_BxN, cache, done_B = state
        logits_Bx1xV, cache = model.apply(
            {"params": params}, token_B[:, None], cache, method="decode"
        )
        token_B = choose(logits_Bx1xV[:, -1], step)
        new_BxN = new_BxN.at[:, step].set(token_B)
        return step + 1, token_B, new_BxN, cache, done_B | (token_B == eos)

    cache = gpt.empty_cache(model.config, batch, length + new)
    logits_BxV, cache = _taken_in(model, params, tokens_BxL, valid_BxL, cache)
    token_B = choose(logits_BxV, 0)
    new_BxN = jnp.zeros((batch, new), jnp.int32).at[:, 0].set(token_B)
    state = (jnp.int32(1), token_B, new_BxN, cache, token_B == eos)
    return jax.lax.while_loop(going_on, go_on, state)[2]


def _taken_in(
    model: Any, params: PyTree, tokens_BxL: Array, valid_BxL: Array, cache: Any
) -> tuple[Array, Any]:
    """Returns the logits after the prompts, B x V, and the cache that holds them."""

    def take(cache: Any, part: tuple[Array, Array]) -> tuple[Any, Array]:
        tokens_BxP, valid_BxP = part
        logits_BxPxV, cache = model.apply(
            {"params": params}, tokens_BxP, cache, valid_BxP, method="decode"
        )
        return cache, logits_BxPxV[:, -1]

    batch, length = tokens_BxL.shape
    first = length % AT_ONCE
    logits_BxV = None
    if first:
        cache, logits_BxV = take(cache, (tokens_BxL[:, :first], valid_BxL[:, :first]))
    if length > first:

        def parts(x_BxL: Array) -> Array:
            return x_BxL[:, first:].reshape(batch, -1, AT_ONCE).swapaxes(0, 1)

        cache, of_parts = jax.lax.scan(take, cache, (parts(tokens_BxL), parts(valid_BxL)))
        logits_BxV = of_parts[-1]
    assert logits_BxV is not None
    return logits_BxV, cache
