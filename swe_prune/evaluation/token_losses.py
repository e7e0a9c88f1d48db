"""Loss of every token of a batch, with the logits of only a few rows in memory."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from swe_prune.calibration.batching import check_arrays
from swe_prune.errors import InputError, shown

LOGITS_BYTES = 2**28
"""Upper bound on the bytes of float32 logits in memory, except that one row is always computed."""


@functools.partial(jax.jit, static_argnames="model")
def token_losses(
    model: Any, params: PyTree, tokens_BxL: Int[Array, "B L"], targets_BxL: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Returns the loss of each target given the tokens before it, and whether it was the likeliest.

        loss[b, i] = logsumexp(logits[b, i]) - logits[b, i, targets[b, i]]

    Rows may be padded on the right, because a causal model does not attend to later tokens.
    Compiled once per model and shape. The rows are processed in groups, so that at most
    LOGITS_BYTES or one row of logits is in memory, not B x L x V.

    Args:
        model: Linen module, applied to {"params": params} and int32 tokens_BxL.
        params: Parameters of the model.
        tokens_BxL: Int32 input tokens.
        targets_BxL: Int32 target tokens; for a text, the next token at each position.

    Returns:
        The losses in nats, float32, and whether each target was the likeliest, bool.
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
    """Returns the shape of the logits for tokens of a shape, without computing them."""
    tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32)
    return jax.eval_shape(lambda p, t: model.apply({"params": p}, t), params, tokens).shape


def by_rows(
    function: Callable[[Any], Any], batch: PyTree, logits: tuple[int, ...], copies: int = 1
) -> PyTree:
    """Applies a function to a batch, in equal groups of rows one after another.

    Args:
        function: Function of a pytree of arrays whose first axis runs over rows, which treats every
            row independently.
        batch: Pytree of arrays with B rows.
        logits: Shape B x L x V of the logits that `function` computes for the whole batch.
        copies: Number of such arrays that `function` has in memory.
    """
    rows, row_bytes = logits[0], 4 * copies * int(np.prod(logits[1:]))
    # Use the largest group that fits and divides the rows evenly.
    fitting = max(1, LOGITS_BYTES // row_bytes)
    group = max(r for r in range(1, rows + 1) if rows % r == 0 and r <= fitting)
    if group == rows:
        return function(batch)
    groups = jax.tree.map(lambda x: x.reshape(rows // group, group, *x.shape[1:]), batch)
    results = jax.lax.map(function, groups)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)


def check_model(model: Any, params: PyTree) -> None:
    """Raises InputError if a model has no `apply`, or its parameters are not arrays."""
    if not hasattr(model, "apply") or not isinstance(model, Hashable) or isinstance(model, type):
        raise InputError(f"model must be a Linen module, got {shown(model)}")
    check_arrays("params", params)


def context_of(model: Any) -> int | None:
    """Returns the context of a model in tokens, or None if the model does not state it."""
    return getattr(getattr(model, "config", None), "context", None)


def check_tokens(model: Any, tokens: Int[np.ndarray, "..."], what: str) -> None:
    """Checks that token ids are in the model's vocabulary.

    Args:
        model: Model to check against; a model that does not state its vocabulary passes.
        tokens: Token ids.
        what: Description of the tokens for the error message.

    Raises:
        InputError: If an id is below 0 or outside the vocabulary; a lookup would silently clamp it.
    """
    vocab_size = getattr(model, "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(
            f"{what} has token ids from {low} to {high} and the model has a vocabulary of "
            f"{vocab_size}; encode it with the tokenizer that the model was trained with"
        )


def bucket(length: int, at_most: int | None = None) -> int:
    """Returns a length to pad rows to, so that few programs are compiled.

    The result is the next of 32, 48, 64, 96, 128, 192, …, which gives two programs per doubling.

    Args:
        length: Number of tokens of the longest row.
        at_most: Upper bound of the result. If None, there is no bound.

    >>> [bucket(length) for length in (1, 33, 64, 65, 1000)], bucket(1000, at_most=1010)
    ([32, 48, 64, 96, 1024], 1010)
    """
    padded = 32
    while padded < length:
        padded = padded * 3 // 2 if padded & (padded - 1) == 0 else padded // 3 * 4
    return padded if at_most is None else min(padded, at_most)
