"""Causal attention with grouped heads, padding, a sliding window, and a KV cache."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_PARTS = 4  # maximal number of chunks; more save up to half the work, in smaller products
MIN_QUERIES = 64  # in a chunk; fewer do not fill a matrix product

MASKED_SCORE = -1e30
"""Score of a masked key: its weight is exactly 0 if any key is unmasked. Not -inf, because a query
in the padding attends to no key, and its output must still be finite."""


def attention(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxTxGxK: Float[Array, "B T G K"],
    v_BxTxGxK: Float[Array, "B T G K"],
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    causal: bool = True,
    valid_BxT: Bool[Array, "B T"] | None = None,
    start: Int[Array, ""] | int = 0,
) -> Float[Array, "B L H K"]:
    """Returns softmax(mask(q kᵀ / √K)) v, where each token attends to itself and earlier tokens.

    Query heads share the G heads of keys and values in consecutive groups of H / G (grouped-query
    attention, Ainslie et al., 2305.13245). Scores and softmax are float32; the products are of the
    inputs' dtype and accumulate in float32. If L = T, the queries are split into up to QUERY_PARTS
    consecutive chunks, and each chunk is multiplied only with the keys up to its own last token:
    with four chunks 5/8 of the products and exponentials remain. The backward pass recomputes the
    L x T arrays, so O(L) is stored per head.

    Args:
        q_BxLxHxK: Queries of the tokens start, …, start + L - 1.
        k_BxTxGxK: Keys of the tokens 0, …, T - 1.
        v_BxTxGxK: Values of the tokens 0, …, T - 1.
        window: Number of tokens that a token attends to, itself included (Jiang et al.,
            2310.06825). If None, all earlier tokens.
        scale: Factor of the scores instead of 1 / √K. If None, 1 / √K.
        cap: Bound of the scores, cap * tanh(score / cap) (Gemma 2, 2408.00118). If None, none.
        causal: Whether later tokens are masked. If False, every token attends to all.
        valid_BxT: False for keys of padding, which are masked. If None, all keys are valid.
        start: Position of the first query among the keys; may be traced.
    """
    run = functools.partial(_in_parts, window=window, scale=scale, cap=cap, causal=causal)
    return jax.checkpoint(run)(q_BxLxHxK, k_BxTxGxK, v_BxTxGxK, valid_BxT, start)


def _in_parts(
    q_BxLxHxK: Array,
    k_BxTxGxK: Array,
    v_BxTxGxK: Array,
    valid_BxT: Array | None,
    begin: Array | int,
    *,
    window: int | None,
    scale: float | None,
    cap: float | None,
    causal: bool,
) -> Array:
    length, width = q_BxLxHxK.shape[1], q_BxLxHxK.shape[-1]
    # Queries and keys are of the same tokens, and no query needs all the keys.
    whole = causal and length == k_BxTxGxK.shape[1]
    q_BxLxHxK = q_BxLxHxK / math.sqrt(width) if scale is None else q_BxLxHxK * scale
    q_BxHxLxK = q_BxLxHxK.swapaxes(1, 2)
    k_BxGxTxK, v_BxGxTxK = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    wanted = max(1, min(QUERY_PARTS, length // MIN_QUERIES)) if whole else 1
    part = math.ceil(length / wanted)
    parts = []
    for first in range(0, length, part):
        last = min(first + part, length)
        used = slice(0, last if whole else None)
        valid = None if valid_BxT is None else valid_BxT[:, used]
        q, k, v = q_BxHxLxK[:, :, first:last], k_BxGxTxK[:, :, used], v_BxGxTxK[:, :, used]
        parts.append(_attend(q, k, v, valid, first if whole else begin, window, cap, causal))
    return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def _attend(
    q_BxHxQxK: Array,
    k_BxGxTxK: Array,
    v_BxGxTxK: Array,
    valid_BxT: Array | None,
    start: Array | int,
    window: int | None,
    cap: float | None,
    causal: bool,
) -> Array:
    """Returns the outputs B x H x Q x K of Q queries, the first of which is at position `start`."""
    batch, heads, queries, width = q_BxHxQxK.shape
    groups, keys = k_BxGxTxK.shape[1:3]
    # Heads of a group share their keys, so their queries form one axis S = H / G * Q.
    q_BxGxSxK = q_BxHxQxK.reshape(batch, groups, -1, width)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BxGxSxT = dot("bgsk,bgtk->bgst", q_BxGxSxK, k_BxGxTxK)
    if cap is not None:
        scores_BxGxSxT = cap * jnp.tanh(scores_BxGxSxT / cap)
    # Mask later tokens, tokens outside the window, and padding.
    at_Q, at_T = start + jnp.arange(queries), jnp.arange(keys)
    seen_QxT = at_T <= at_Q[:, None] if causal else jnp.ones((queries, keys), bool)
    if window is not None:
        seen_QxT &= at_T > at_Q[:, None] - window
    seen = jnp.tile(seen_QxT, (heads // groups, 1))
    if valid_BxT is not None:
        seen = seen & valid_BxT[:, None, None]
    scores_BxGxSxT = jnp.where(seen, scores_BxGxSxT, MASKED_SCORE)
    # The maximum cancels in the quotient, so it needs no gradient.
    top_BxGxSx1 = jax.lax.stop_gradient(scores_BxGxSxT.max(-1, keepdims=True))
    weights_BxGxSxT = jnp.exp(scores_BxGxSxT - top_BxGxSx1)
    # Normalize after the product, where the array is T / K times smaller.
    y_BxGxSxK = dot("bgst,bgtk->bgsk", weights_BxGxSxT.astype(v_BxGxTxK.dtype), v_BxGxTxK)
    y_BxGxSxK = (y_BxGxSxK / weights_BxGxSxT.sum(-1, keepdims=True)).astype(v_BxGxTxK.dtype)
    return y_BxGxSxK.reshape(batch, heads, queries, width)
