"""Under which conditions a perplexity was measured: named protocols, so that figures compare.

The same model on the same text differs by a tenth and more with the window, the stride, the
beginning-of-sequence token and the way the documents are joined; a figure without them is none.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from swe_prune.errors import InputError, did_you_mean

BOS = ("none", "text", "window")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a text becomes windows, and which of their tokens are scored.

    The first window scores all of its tokens that have one before them; each later one starts
    `stride` tokens after the one before and scores its last `stride`, or all but its first where
    stride = window.

    Attributes:
        name: what a table calls it.
        window: tokens that the model is given at once, BOS included.
        stride: tokens between the starts of two windows; at most as many as a window has of the
            text.
        bos: "none"; "text", one at the very start of the text, as a tokenizer that adds it does;
            "window", one at the start of every window, which thereby scores its first token too.
        join: stands between the documents of the text.
        partial: whether the end of the text that fills no window is scored.
        limit: windows scored, from the first; None: all.
    """

    name: str
    window: int
    stride: int
    bos: str = "none"
    join: str = "\n\n"
    partial: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise InputError(
                f"bos = {self.bos!r} of protocol {self.name!r} is unknown; "
                f"{did_you_mean(self.bos, BOS)}"
            )
        if self.window < 2 or not 1 <= self.stride <= self.of_text:
            raise InputError(
                f"protocol {self.name!r} cannot have windows of {self.window} tokens and a stride "
                f"of {self.stride}; give a window of 2 or more and a stride from 1 to the "
                f"{self.of_text} tokens of the text in it"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(
                f"limit = {self.limit} of protocol {self.name!r} leaves no window; give 1 or more, "
                "or None for all"
            )

    @property
    def of_text(self) -> int:
        """Tokens of the text in a full window: all but its BOS."""
        return self.window - (self.bos == "window")

    def joined(self, documents: Iterable[str]) -> str:
        """Returns the documents as the one text that is encoded and scored."""
        return self.join.join(documents)


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a text, W of them.

    Attributes:
        tokens_WxL: int32; the last may be padded with 0 on its right.
        scored_WxL: bool, which tokens count; never a window's first.
    """

    tokens_WxL: Int32[np.ndarray, "W L"]
    scored_WxL: Bool[np.ndarray, "W L"]


_PROTOCOLS = (
    Protocol("wikitext2", 2048, 2048, bos="text"),
    Protocol("c4", 2048, 2048, bos="text", join=" ", limit=256),
    Protocol("sliding", 2048, 512, partial=True),
    Protocol("bos_windows", 2048, 2047, bos="window", partial=True),
)
_BY_NAME = {protocol.name: protocol for protocol in _PROTOCOLS}


def names() -> tuple[str, ...]:
    """Returns the names of the protocols.

    `wikitext2` and `c4` are those of the pruning literature (SparseGPT, arXiv 2301.00774, and
    Wanda, arXiv 2306.11695, in their published code): the raw test documents joined, encoded once,
    cut into windows that do not overlap, the rest dropped. `sliding` gives every token at least
    window - stride tokens before it; `bos_windows` are windows that do not overlap, each with a BOS
    of its own.

    >>> names()
    ('wikitext2', 'c4', 'sliding', 'bos_windows')
    """
    return tuple(_BY_NAME)


def get(
    name: str, *, window: int | None = None, stride: int | None = None, bos: str | None = None
) -> Protocol:
    """Returns the protocol of a name; what is changed about it shows in its name.

    Args:
        name: one of `names()`.
        window: instead of its own, with the stride in proportion unless that is given.
        stride: instead of its own.
        bos: instead of its own.

    Raises:
        InputError: an unknown name, or a window, stride or bos that cannot be.

    >>> get("wikitext2", window=1024, bos="none").name
    'wikitext2, window 1024, bos none'
    """
    if name not in _BY_NAME:
        raise InputError(f"protocol {name!r} is unknown; {did_you_mean(name, _BY_NAME)}")
    known = _BY_NAME[name]
    given = {"window": window, "stride": stride, "bos": bos}
    asked = {key: value for key, value in given.items() if value is not None}
    changes: dict[str, Any] = {k: v for k, v in asked.items() if v != getattr(known, k)}
    described = "".join(f", {key} {value}" for key, value in changes.items())
    if stride is None and changes:
        of_text = (window or known.window) - ((bos or known.bos) == "window")
        changes["stride"] = max(1, known.stride * of_text // known.of_text)
    return dataclasses.replace(known, name=name + described, **changes)


def cut(
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    *,
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
    bos_first, of_text, stride = protocol.bos == "window", protocol.of_text, protocol.stride
    needed = 2 - bos_first if protocol.partial else of_text
    if len(tokens) < needed:
        raise InputError(
            f"the text has {len(tokens)} tokens and protocol {protocol.name!r} needs {needed} for "
            "one window; give more text or a protocol with a smaller window"
        )
    further = max(0, len(tokens) - of_text)
    count = 1 + (-(-further // stride) if protocol.partial else further // stride)
    count = min(count, protocol.limit or count)
    at_WxT = np.arange(count)[:, None] * stride + np.arange(of_text)
    there_WxT = at_WxT < len(tokens)
    text_WxT = np.where(there_WxT, tokens[np.minimum(at_WxT, len(tokens) - 1)], 0)
    scored_WxT = there_WxT.copy()
    scored_WxT[1:, : of_text - stride] = False
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
