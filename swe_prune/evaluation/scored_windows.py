"""The windows of a text that a protocol scores, and how a model is run over them."""

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
    """The windows of a text, W of them.

    Attributes:
        tokens_WxL: int32; the last may be padded with 0 on its right.
        scored_WxL: bool, which tokens count; never a window's first.
    """

    tokens_WxL: Int32[np.ndarray, "W L"]
    scored_WxL: Bool[np.ndarray, "W L"]


def of_text(
    model: Any,
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    bos_id: int | None = None,
) -> Windows:
    """Returns the windows of a text for a model, checked to be what it can take.

    Args:
        model: whose context and vocabulary have to do, where it says them.
        tokens: of the whole text, without special tokens.
        protocol: which windows.
        bos_id: of the tokenizer; needed where the protocol has a BOS.

    Raises:
        InputError: windows beyond the model's context, too few tokens, tokens that the model does
            not have, or a BOS that is missing or there already.
    """
    context = context_of(model)
    if context is not None and protocol.window > context:
        raise InputError(
            f"the windows of protocol {protocol.name!r} have {protocol.window} tokens and the "
            f"model a context of {context}; take the protocol with window={context} or less"
        )
    windows = cut(tokens, protocol, bos_id)
    check_tokens(model, np.append(tokens, windows.tokens_WxL[0, 0]), "the text")
    return windows


def in_batches(
    function: Callable[[Int32[np.ndarray, "B L"]], Any], windows: Windows, batch: int
) -> Any:
    """Returns function(tokens_BxL) of all windows, run over batches of one shape.

    The last batch is filled up with copies of the last window, whose results are dropped.

    Args:
        function: to a pytree of arrays whose first axis are the windows.
        windows: W of them.
        batch: windows at a time.

    Returns:
        The same pytree on the host, of W windows.

    Raises:
        InputError: a batch below 1.
    """
    if batch < 1:
        raise InputError(f"batch = {batch} windows at a time cannot be run; give 1 or more")
    count = len(windows.tokens_WxL)
    batch = min(batch, count)
    fill = np.repeat(windows.tokens_WxL[-1:], -count % batch, axis=0)
    filled = np.concatenate([windows.tokens_WxL, fill])
    results = [function(filled[at : at + batch]) for at in range(0, count, batch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(results))


def mean_of_scored(values_WxM: np.ndarray, windows: Windows) -> tuple[float, float | None]:
    """Returns the mean over the scored tokens, in float64, and its standard error.

    The error is that of a ratio of two sums over the windows, by linearization (Cochran 1977,
    section 6.3); None with one window.

    Args:
        values_WxM: of every token but the windows' first, W x (L - 1).
        windows: whose tokens they are of.
    """
    scored_WxM = windows.scored_WxL[:, 1:]
    sum_W = np.where(scored_WxM, values_WxM, 0).astype(np.float64).sum(axis=1)
    count_W = scored_WxM.sum(axis=1)
    mean = sum_W.sum() / count_W.sum()
    if len(sum_W) < 2:
        return float(mean), None
    with np.errstate(invalid="ignore"):  # inf - inf, of a model that is broken
        off_W = sum_W - mean * count_W
    of_sum = np.sqrt(len(sum_W) / (len(sum_W) - 1) * (off_W**2).sum())
    return float(mean), float(of_sum / count_W.sum())


def cut(
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    bos_id: int | None = None,
) -> Windows:
    """Returns the windows of a text that a protocol scores.

    Args:
        tokens: of the whole text, without BOS.
        protocol: which windows.
        bos_id: of the tokenizer; needed where the protocol has a BOS.

    Raises:
        InputError: too few tokens, or a BOS that is missing or there already.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise InputError(
            f"the text's tokens have shape {tokens.shape}; give those of the whole text in one row"
        )
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
    further = max(0, len(tokens) - size)
    count = 1 + (-(-further // stride) if protocol.partial else further // stride)
    count = min(count, protocol.limit or count)
    at_WxT = np.arange(count)[:, None] * stride + np.arange(size)
    there_WxT = at_WxT < len(tokens)
    text_WxT = np.where(there_WxT, tokens[np.minimum(at_WxT, len(tokens) - 1)], 0)
    scored_WxT = there_WxT.copy()
    scored_WxT[1:, : size - stride] = False
    if bos_first:
        text_WxT = np.concatenate([np.full((count, 1), first), text_WxT], axis=1)
        scored_WxT = np.concatenate([np.zeros((count, 1), bool), scored_WxT], axis=1)
    scored_WxT[:, 0] = False
    filled = scored_WxT.any(axis=1)  # a window of one token left over has nothing before it
    return Windows(text_WxT.astype(np.int32)[filled], scored_WxT[filled])


def _checked_bos(tokens: np.ndarray, protocol: Protocol, bos_id: int | None) -> int:
    if bos_id is None:
        raise InputError(
            f"protocol {protocol.name!r} has a beginning-of-sequence token (bos = "
            f"{protocol.bos!r}) and no bos_id was given; give the tokenizer's, or take the "
            "protocol with bos='none' where the model was trained without"
        )
    if len(tokens) and tokens[0] == bos_id:
        raise InputError(
            f"the text's tokens start with the beginning-of-sequence token {bos_id} already, which "
            f"protocol {protocol.name!r} adds; encode the text without special tokens"
        )
    return bos_id
