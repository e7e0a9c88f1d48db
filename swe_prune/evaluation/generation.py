"""Text generation, token by token with a KV cache."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.evaluation.sampling import Sampling, draw
from swe_prune.evaluation.token_losses import bucket, check_model, check_tokens, context_of
from swe_prune.models import gpt

STOP_CHECK_EVERY = 32
"""Number of new tokens between calls of `stop`."""
AT_ONCE = 128
"""Number of prompt tokens per prefill chunk, whose activations are in memory together."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of the prompts.

    Attributes:
        tokens: New tokens for each prompt, without the prompt and without the final eos_id.
        ended: Whether each continuation ended with eos_id.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]


@checked
def generate(
    model: Any,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    seed: int,
    eos_id: int | Sequence[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    images: Mapping[str, Any] | None = None,
) -> Generated:
    """Returns up to `max_new_tokens` new tokens for each prompt.

    The prompts are padded on the left and run together: one program prefills the KV cache, another
    one loops until all texts have ended. Both are compiled for the number of prompts, their padded
    length and `max_new_tokens`. The answer to a prompt depends on the seed and on its index among
    the prompts, but not on the other prompts, except through rounding in products of other shapes
    and through rotary positions that are scaled by the longest text ("dynamic" and "longrope").

    Args:
        model: Decoder from `models.gpt`.
        params: Parameters of the model.
        prompts: Token ids of one or more prompts.
        max_new_tokens: Maximal number of new tokens per prompt.
        sampling: Rule for choosing each token.
        seed: Seed of the sampling.
        eos_id: Token or tokens that end a text. If None, no token does.
        stop: Function of a prompt's new tokens, called after every STOP_CHECK_EVERY of them, that
            returns whether to stop; all tokens generated until then are returned. If None, texts
            do not stop early.
        images: "pixels" and "grid" of an image for each prompt, for a model that takes them next to
            the "tokens", where the image's are below 0; see `models.phi3v`. If None, none.

    Raises:
        InputError: If there is no prompt, a prompt is empty or has tokens outside the vocabulary,
            or a prompt and its new tokens exceed the context.
    """
    check_model(model, params)
    # Pad the prompts on the left to a common length.
    rows = [np.asarray(prompt, dtype=np.int64).reshape(-1) for prompt in prompts]
    words = rows if images is None else [np.maximum(row, 0) for row in rows]
    length = check_prompts(model, words, max_new_tokens)
    tokens_BxL = np.zeros((len(rows), length), np.int32)
    valid_BxL = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        tokens_BxL[number, length - len(row) :] = row
        valid_BxL[number, length - len(row) :] = True
    key = jax.random.key(seed)
    ends = [] if eos_id is None else np.atleast_1d(eos_id)
    eos_E = np.array([*ends, -1], np.int32)  # -1 is not a token, so the array is never empty
    state = begin(
        model, sampling, max_new_tokens, params, tokens_BxL, valid_BxL, key, eos_E, images
    )
    # Decode in chunks, between which `stop` may end texts; without it, in a single chunk.
    until = max_new_tokens if stop is None else 1
    while True:
        state = decode_until(model, sampling, params, state, key, eos_E, until)
        texts = _texts(state, eos_E)
        if int(state.step) < until or until == max_new_tokens:
            break
        assert stop is not None
        done_B = [ended or stop(text) for text, ended in zip(*texts, strict=True)]
        if all(done_B):
            break
        state = dataclasses.replace(state, done_B=state.done_B | np.asarray(done_B))
        until = min(until + STOP_CHECK_EVERY, max_new_tokens)
    return Generated(*texts)


def check_prompts(model: Any, rows: list[np.ndarray], max_new_tokens: int) -> int:
    """Checks the prompts and returns the length to pad them to."""
    if not rows:
        raise InputError("there is no prompt; give one or more")
    for number, row in enumerate(rows):
        if not len(row):
            raise InputError(
                f"prompt {number} is empty; give at least one token, such as the BOS token"
            )
        check_tokens(model, row, f"prompt {number}")
    longest = max(map(len, rows))
    context = context_of(model)
    if context is None:
        return bucket(longest)
    if longest + max_new_tokens > context:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the model's "
            f"context of {context}; shorten the prompt or generate at most "
            f"{max(0, context - longest)} new tokens"
        )
    return bucket(longest, at_most=context - max_new_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """State of the generation.

    Attributes:
        step: Number of new tokens so far, int32.
        new_BxN: New tokens, 0 where not generated yet.
        cache: KV cache of all tokens but the last.
        done_B: Whether each text has ended.
    """

    step: Int[Array, ""]
    new_BxN: Int[Array, "B N"]
    cache: gpt.Cache
    done_B: Bool[Array, " B"]


def _texts(
    state: _State, eos_E: np.ndarray
) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Returns the new tokens of each text before its eos_id, and whether it has one."""
    new_BxS = np.asarray(state.new_BxN)[:, : int(state.step)]
    is_eos_BxS = np.isin(new_BxS, eos_E)
    ended_B = np.any(is_eos_BxS, axis=1)
    # Cut each text at its first eos_id.
    kept_B = np.where(ended_B, is_eos_BxS.argmax(axis=1), new_BxS.shape[1])
    texts = [tuple(row[:n].tolist()) for row, n in zip(new_BxS, kept_B, strict=True)]
    return tuple(texts), tuple(ended_B.tolist())


def _chosen(
    state: _State, logits_BxV: Array, key: Array, sampling: Sampling, cache: Any, eos_E: Any
) -> _State:
    """Appends one token to each text, chosen from its logits."""
    batch = len(logits_BxV)
    # A key per row and step, so that rows do not depend on each other.
    of_row_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(of_row_B, state.step)
    token_B = draw(logits_BxV, keys_B, sampling)
    new_BxN = state.new_BxN.at[:, state.step].set(token_B)
    return _State(state.step + 1, new_BxN, cache, state.done_B | jnp.isin(token_B, eos_E))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    model: Any,
    sampling: Sampling,
    new: int,
    params: PyTree,
    tokens_BxL: Int[Array, "B L"],
    valid_BxL: Bool[Array, "B L"],
    key: Key[Array, ""],
    eos_E: Int[Array, " E"],
    images: Any = None,
) -> _State:
    """Prefills the KV cache with the prompts and generates the first new token of each."""
    batch, length = tokens_BxL.shape
    cache = gpt.empty_cache(model.config, batch, length + new)
    if images is None:
        logits_BxV, cache = _prefill(model, params, tokens_BxL, valid_BxL, cache)
    else:  # at once, since an image lies anywhere in the prompt
        inputs = {"tokens": tokens_BxL, **images}
        logits_BxLxV, cache = model.apply(
            {"params": params}, inputs, cache, valid_BxL, method="decode"
        )
        logits_BxV = logits_BxLxV[:, -1]
    new_BxN = jnp.zeros((batch, new), jnp.int32)
    empty = _State(jnp.int32(0), new_BxN, cache, jnp.zeros(batch, bool))
    return _chosen(empty, logits_BxV, key, sampling, cache, eos_E)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode_until(
    model: Any,
    sampling: Sampling,
    params: PyTree,
    state: _State,
    key: Key[Array, ""],
    eos_E: Int[Array, " E"],
    until: Int[Array, ""],
) -> _State:
    """Generates tokens until all texts have ended or have `until` new tokens."""

    def unfinished(state: _State) -> Array:
        return (state.step < until) & ~state.done_B.all()

    def one_more(state: _State) -> _State:
        last_Bx1 = jax.lax.dynamic_slice_in_dim(state.new_BxN, state.step - 1, 1, axis=1)
        logits_Bx1xV, cache = model.apply(
            {"params": params}, last_Bx1, state.cache, method="decode"
        )
        return _chosen(state, logits_Bx1xV[:, -1], key, sampling, cache, eos_E)

    return jax.lax.while_loop(unfinished, one_more, state)


def _prefill(
    model: Any, params: PyTree, tokens_BxL: Array, valid_BxL: Array, cache: Any
) -> tuple[Array, Any]:
    """Returns the logits B x V after the prompts, and the KV cache with the prompts."""

    def take(cache: Any, part: tuple[Array, Array]) -> tuple[Any, Array]:
        tokens_BxP, valid_BxP = part
        # Only the last token's logits are used, and the head is a large part of a small model.
        logits_Bx1xV, cache = model.apply(
            {"params": params}, tokens_BxP, cache, valid_BxP, last_only=True, method="decode"
        )
        return cache, logits_Bx1xV[:, 0]

    # A first chunk with the remainder, then a scan over equal chunks of AT_ONCE tokens.
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
