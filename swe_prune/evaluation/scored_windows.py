"""Windows of a text that a protocol scores, and running a model over them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from swe_prune.errors import InputError
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.token_losses import check_tokens, context_of


@dataclasses.dataclass(frozen=True)
class Windows:
    """The W windows of a text.

    Attributes:
        tokens_WxL: Int32 tokens; the last window may be padded with 0 on the right.
        scored_WxL: Whether each token is scored; False for the first token of every window.
    """

    tokens_WxL: Int32[np.ndarray, "W L"]
    scored_WxL: Bool[np.ndarray, "W L"]


def of_text(
    model: Any,
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    bos_id: int | None = None,
) -> Windows:
    """Returns the windows of a text, checked against a model's context and vocabulary.

    Args:
        model: Model to check against; models that do not state context or vocabulary pass.
        tokens: Token ids of the whole text, without special tokens.
        protocol: Protocol that determines the windows.
        bos_id: Id of the tokenizer's BOS token, required if the protocol has a BOS.

    Raises:
        InputError: If the windows exceed the model's context, there are too few tokens or tokens
            outside the vocabulary, or the BOS is missing or already in the text.
    """
    context = context_of(model)
    if context is not None and protocol.window > context:
        raise InputError(
            f"the windows of protocol {protocol.name!r} have {protocol.window} tokens and the "
            f"model has a context of {context}; use the protocol with window={context} or less"
        )
    windows = cut(tokens, protocol, bos_id)
    check_tokens(model, np.append(tokens, windows.tokens_WxL[0, 0]), "the text")
    return windows


def in_batches(
    function: Callable[[Int32[np.ndarray, "B L"]], Any], windows: Windows, batch: int
) -> Any:
    """Applies a function to all windows, in batches of one shape.

    The last batch is padded with copies of the last window, whose results are dropped.

    Args:
        function: Function from tokens_BxL to a pytree of arrays whose first axis runs over windows.
        windows: The W windows.
        batch: Number of windows B per batch, 1 or more.

    Returns:
        A pytree like the result of `function`, on the host, for all W windows.
    """
    count = len(windows.tokens_WxL)
    batch = min(batch, count)
    fill = np.repeat(windows.tokens_WxL[-1:], -count % batch, axis=0)
    filled = np.concatenate([windows.tokens_WxL, fill])
    results = [function(filled[at : at + batch]) for at in range(0, count, batch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(results))


def mean_of_scored(values_WxM: np.ndarray, windows: Windows) -> tuple[float, float | None]:
    """Returns the mean over the scored tokens, in float64, and its standard error.

    The standard error is that of a ratio of two sums over the windows, by linearization (Cochran
    1977, section 6.3), or None with one window.

    Args:
        values_WxM: Values of all tokens but the first of each window, W x (L - 1).
        windows: Windows that the values belong to.
    """
    scored_WxM = windows.scored_WxL[:, 1:]
    sum_W = np.where(scored_WxM, values_WxM, 0).astype(np.float64).sum(axis=1)
    count_W = scored_WxM.sum(axis=1)
    mean = sum_W.sum() / count_W.sum()
    if len(sum_W) < 2:
        return float(mean), None
    with np.errstate(invalid="ignore"):  # inf - inf, for a broken model
        off_W = sum_W - mean * count_W
    of_sum = np.sqrt(len(sum_W) / (len(sum_W) - 1) * (off_W**2).sum())
    return float(mean), float(of_sum / count_W.sum())


def cut(
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    bos_id: int | None = None,
) -> Windows:
    """Cuts a text into the windows of a protocol.

    Args:
        tokens: Token ids of the whole text, without BOS.
        protocol: Protocol that determines the windows.
        bos_id: Id of the tokenizer's BOS token, required if the protocol has a BOS.

    Raises:
        InputError: If there are too few tokens, or the BOS is missing or already in the text.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise InputError(f"the text's tokens must be one-dimensional, got shape {tokens.shape}")
    first = 0 if protocol.bos == "none" else _checked_bos(tokens, protocol, bos_id)
    if protocol.bos == "text":
        tokens = np.concatenate([[first], tokens])
    bos_first, size, stride = protocol.bos == "window", protocol.of_text, protocol.stride
    needed = 2 - bos_first if protocol.partial else size
    if len(tokens) < needed:
        raise InputError(
            f"the text has {len(tokens)} tokens and protocol {protocol.name!r} needs {needed} for "
            "one window; give more text or a protocol with a smaller window"
        )
    # Windows start every `stride` tokens; the last one may be partial.
    further = max(0, len(tokens) - size)
    count = 1 + (-(-further // stride) if protocol.partial else further // stride)
    count = min(count, protocol.limit or count)
    at_WxT = np.arange(count)[:, None] * stride + np.arange(size)
    inside_WxT = at_WxT < len(tokens)
    text_WxT = np.where(inside_WxT, tokens[np.minimum(at_WxT, len(tokens) - 1)], 0)
    # Score the text tokens that the previous window has not scored.
    scored_WxT = inside_WxT.copy()
    scored_WxT[1:, : size - stride] = False
    if bos_first:
        text_WxT = np.concatenate([np.full((count, 1), first), text_WxT], axis=1)
        scored_WxT = np.concatenate([np.zeros((count, 1), bool), scored_WxT], axis=1)
    scored_WxT[:, 0] = False
    filled = scored_WxT.any(axis=1)  # a last window with a single token has nothing to score
    return Windows(text_WxT.astype(np.int32)[filled], scored_WxT[filled])


def _checked_bos(tokens: np.ndarray, protocol: Protocol, bos_id: int | None) -> int:
    if bos_id is None:
        raise InputError(
            f"protocol {protocol.name!r} has a beginning-of-sequence token (bos = "
            f"{protocol.bos!r}) and no bos_id was given; give the tokenizer's, or use the "
            "protocol with bos='none' if the model was trained without"
        )
    if len(tokens) and tokens[0] == bos_id:
        raise InputError(
            f"the text's tokens already start with the beginning-of-sequence token {bos_id}, which "
            f"protocol {protocol.name!r} adds; encode the text without special tokens"
        )
    return bos_id
