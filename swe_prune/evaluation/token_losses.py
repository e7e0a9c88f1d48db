"""The loss of every token of a batch, with no more logits in memory than a few rows have."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from swe_prune.errors import InputError

LOGITS_BYTES = 2**28
"""The float32 logits of so many bytes are made at a time; one row's always are."""


@functools.partial(jax.jit, static_argnames="model")
def token_losses(
    model: Any, params: PyTree, tokens_BxL: Int[Array, "B L"], targets_BxL: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Returns what each target costs after the tokens up to its place, and if it was the likeliest.

        loss[b, i] = logsumexp(logits[b, i]) - logits[b, i, targets[b, i]]

    A row may be padded on its right: a causal model does not see what follows. Compiled once for a
    model and a shape; the rows are run a few at a time, so that the logits of LOGITS_BYTES or of
    one row are held, not B x L x V.

    Args:
        model: a Flax Linen module, called with {"params": params} and int32 tokens_BxL.
        params: its weights.
        tokens_BxL: int32.
        targets_BxL: int32; in a text, tokens_BxL one place on.

    Returns:
        Nats, float32, and bool.
    """

    def of_rows(rows: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens_RxL, targets_RxL = rows
        logits_RxLxV = model.apply({"params": params}, tokens_RxL).astype(jnp.float32)
        of_target_RxL = jnp.take_along_axis(logits_RxLxV, targets_RxL[..., None], axis=-1)[..., 0]
        loss_RxL = jax.nn.logsumexp(logits_RxLxV, axis=-1) - of_target_RxL
        return loss_RxL, jnp.argmax(logits_RxLxV, axis=-1) == targets_RxL

    return by_rows(
        of_rows, (tokens_BxL, targets_BxL), logits_shape(model, params, tokens_BxL.shape)
    )


def logits_shape(model: Any, params: PyTree, tokens_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the logits of so many tokens; nothing is computed."""
    tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32)
    return jax.eval_shape(lambda p, t: model.apply({"params": p}, t), params, tokens).shape


def by_rows(
    function: Callable[[Any], Any], batch: PyTree, logits: tuple[int, ...], copies: int = 1
) -> PyTree:
    """Returns function(batch), run over equal groups of rows one after the other.

    Args:
        function: of a pytree of arrays whose first axis are rows; treats each row alone.
        batch: such a pytree, of B rows.
        logits: the shape B x L x V of the logits that `function` would make of all.
        copies: how many such arrays it makes.
    """
    rows, row_bytes = logits[0], 4 * copies * int(np.prod(logits[1:]))
    fitting = max(1, LOGITS_BYTES // row_bytes)
    group = max(r for r in range(1, rows + 1) if rows % r == 0 and r <= fitting)
    if group == rows:
        return function(batch)
    groups = jax.tree.map(lambda x: x.reshape(rows // group, group, *x.shape[1:]), batch)
    results = jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)


def context_of(model: Any) -> int | None:
    """Returns how many tokens in a row a model takes; None where it does not say."""
    return getattr(getattr(model, "config", None), "context", None)


def check_tokens(model: Any, tokens: Int[np.ndarray, "..."], what: str) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        InputError: an id below 0 or beyond the vocabulary, which a lookup would clamp unseen.
    """
    vocab_size = getattr(model, "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(
            f"{what} has token ids from {low} to {high} and the model a vocabulary of "
            f"{vocab_size}; encode it with the tokenizer that the model was trained with"
        )


def bucket(length: int, at_most: int | None = None) -> int:
    """Returns the length that rows of `length` tokens are padded to, so that few programs do.

    The next of 32, 48, 64, 96, 128, 192, …: by at most a half, and two programs for each doubling.

    Args:
        length: of the longest row.
        at_most: never more than this; None: no bound.

    >>> [bucket(length) for length in (1, 33, 64, 65, 1000)], bucket(1000, at_most=1010)
    ([32, 48, 64, 96, 1024], 1010)
    """
    padded = 32
    while padded < length:
        padded = padded * 3 // 2 if padded & (padded - 1) == 0 else padded // 3 * 4
    return padded if at_most is None else min(padded, at_most)
