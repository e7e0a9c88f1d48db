"""Causal attention: grouped heads, padding, a sliding window, and keys that are kept."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_PARTS = (
    4  # of the causal attention; more would save up to half of the work, in smaller pieces
)
MIN_QUERIES = 64  # in a part; fewer do not fill a matrix product

MASKED_SCORE = -1e30
"""Score of a key that is not seen: its weight is exactly 0 beside any that is. Not -inf, since a
query in the padding sees nothing, and its output must be finite, whatever it is."""


def attention(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxTxGxK: Float[Array, "B T G K"],
    v_BxTxGxK: Float[Array, "B T G K"],
    *,
    window: int | None = None,
    valid_BxT: Bool[Array, "B T"] | None = None,
    start: Int[Array, ""] | int = 0,
) -> Float[Array, "B L H K"]:
    """Returns softmax(mask(q kᵀ / √K)) v, each token attending to itself and those before it.

    Query heads share the G heads of keys and values in consecutive groups of H / G (grouped-query
    attention, Ainslie et al., 2305.13245). Scores and softmax are float32; the products are of the
    inputs' dtype and accumulate in float32. With `start` = 0 the queries are taken in up to
    QUERY_PARTS consecutive parts, and a part meets only the keys up to its own last token: with
    four parts 5/8 of the products and exponentials remain. The backward pass makes the L x T
    arrays anew: O(L) is kept of each head.

    Args:
        q_BxLxHxK: queries of the tokens start, …, start + L - 1.
        k_BxTxGxK: keys of the tokens 0, …, T - 1.
        v_BxTxGxK: their values.
        window: a token sees itself and the window - 1 before it (Jiang et al., 2310.06825).
        valid_BxT: False for keys of padding, which nothing sees.
        start: position of the first query among the keys; may be traced.
    """
    run = functools.partial(_in_parts, window=window)
    return jax.checkpoint(run)(q_BxLxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, start)


def _in_parts(
    q_BxLxHxK: Array,
    k_BxTxGxK: Array,
    v_BxTxGxK: Array,
    valid_BxT: Array | None,
    begin: Array | int,
    *,
    window: int | None,
) -> Array:
    length, width = q_BxLxHxK.shape[1], q_BxLxHxK.shape[-1]
    whole = length == k_BxTxGxK.shape[1]  # then the queries begin where the keys do
    q_BxHxLxK = (q_BxLxHxK / math.sqrt(width)).swapaxes(1, 2)
    k_BxGxTxK, v_BxGxTxK = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    wanted = max(1, min(QUERY_PARTS, length // MIN_QUERIES)) if whole else 1
    part = math.ceil(length / wanted)
    parts = []
    for first in range(0, length, part):
        last = min(first + part, length)
        used = slice(0, last if whole else None)
        valid = None if valid_BxT is None else valid_BxT[:, used]
        q, k, v = q_BxHxLxK[:, :, first:last], k_BxGxTxK[:, :, used], v_BxGxTxK[:, :, used]
        parts.append(_attend(q, k, v, valid, first if whole else begin, window))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _attend(
    q_BxHxQxK: Array,
    k_BxGxTxK: Array,
    v_BxGxTxK: Array,
    valid_BxT: Array | None,
    start: Array | int,
    window: int | None,
) -> Array:
    """Returns the outputs B x H x Q x K of Q queries, of which the first is at position `start`."""
    batch, heads, queries, width = q_BxHxQxK.shape
    groups, keys = k_BxGxTxK.shape[1:3]
    # The heads of a group ask the same keys: their queries stand one after another, as S = H/G * Q.
    q_BxGxSxK = q_BxHxQxK.reshape(batch, groups, -1, width)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BxGxSxT = dot("bgsk,bgtk->bgst", q_BxGxSxK, k_BxGxTxK)
    at_Q, at_T = start + jnp.arange(queries), jnp.arange(keys)
    seen_QxT = at_T <= at_Q[:, None]
    if window is not None:
        seen_QxT &= at_T > at_Q[:, None] - window
    seen = jnp.tile(seen_QxT, (heads // groups, 1))
    if valid_BxT is not None:
        seen = seen & valid_BxT[:, None, None]
    scores_BxGxSxT = jnp.where(seen, scores_BxGxSxT, MASKED_SCORE)
    # The maximum cancels in the quotient, so no gradient need flow through it.
    top_BxGxSx1 = jax.lax.stop_gradient(scores_BxGxSxT.max(-1, keepdims=True))
    weights_BxGxSxT = jnp.exp(scores_BxGxSxT - top_BxGxSx1)
    # Divided after the product, where the array is T / K times smaller.
    y_BxGxSxK = dot("bgst,bgtk->bgsk", weights_BxGxSxT.astype(v_BxGxTxK.dtype), v_BxGxTxK)
    y_BxGxSxK = (y_BxGxSxK / weights_BxGxSxT.sum(-1, keepdims=True)).astype(v_BxGxTxK.dtype)
    return y_BxGxSxK.reshape(batch, heads, queries, width)
