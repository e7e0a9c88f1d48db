"""Named protocols for measuring perplexity, so that figures are comparable.

The perplexity of the same model on the same text varies by a tenth and more with the window, the
stride, the beginning-of-sequence token and the way documents are joined. A figure is meaningless
without them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice

BOS = ("none", "text", "window")


@checked
@dataclasses.dataclass(frozen=True)
class Protocol:
    """Windows of a text, and the tokens in them that are scored.

    The first window scores all its tokens except the first. Each later window starts `stride`
    tokens after the previous one and scores its last `stride` tokens, or all but the first if
    stride = window.

    Attributes:
        name: Name in tables.
        window: Number of tokens per window, BOS included.
        stride: Number of tokens between the starts of two windows, at most the number of text
            tokens in a window.
        bos: Position of BOS tokens: "none"; "text", one at the start of the text, as some
            tokenizers add it; "window", one at the start of every window, so that the first text
            token of every window is scored too.
        join: Separator between the documents of the text.
        partial: Whether the end of the text that does not fill a window is scored.
        limit: Number of windows to score, from the first. If None, all.
    """

    name: str
    window: int
    stride: int
    bos: str = "none"
    join: str = "\n\n"
    partial: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.bos, BOS, f"bos of protocol {self.name!r}")
        if self.window < 2 or not 1 <= self.stride <= self.of_text:
            raise InputError(
                f"protocol {self.name!r} has windows of {self.window} tokens and a stride of "
                f"{self.stride}; give a window of 2 or more and a stride from 1 to the "
                f"{self.of_text} tokens of the text in it"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(
                f"limit of protocol {self.name!r} must be 1 or more windows, or None for all, got "
                f"{self.limit}"
            )

    @property
    def of_text(self) -> int:
        """Number of text tokens in a full window, without its BOS."""
        return self.window - (self.bos == "window")

    def joined(self, documents: Iterable[str]) -> str:
        """Joins documents to the text that is encoded and scored."""
        return self.join.join(documents)


_PROTOCOLS = (
    Protocol("wikitext2", 2048, 2048, bos="text"),
    Protocol("c4", 2048, 2048, bos="text", join=" ", limit=256),
    Protocol("sliding", 2048, 512, partial=True),
    Protocol("bos_windows", 2048, 2047, bos="window", partial=True),
)
_BY_NAME = {protocol.name: protocol for protocol in _PROTOCOLS}


def names() -> tuple[str, ...]:
    """Returns the names of the protocols.

    `wikitext2` and `c4` are the protocols of the pruning literature (the published code of
    SparseGPT, arXiv 2301.00774, and Wanda, arXiv 2306.11695): the raw test documents are joined,
    encoded once, and cut into windows without overlap, and the rest is dropped. `sliding` gives
    every scored token after the first window at least window - stride tokens of context.
    `bos_windows` has windows without overlap, each starting with a BOS.

    >>> names()
    ('wikitext2', 'c4', 'sliding', 'bos_windows')
    """
    return tuple(_BY_NAME)


@checked
def get(
    name: str, *, window: int | None = None, stride: int | None = None, bos: str | None = None
) -> Protocol:
    """Returns a protocol by name, with changes that are appended to its name.

    Args:
        name: Name of the protocol, one of `names()`.
        window: Window that replaces the protocol's; the stride changes in proportion if it is not
            given.
        stride: Stride that replaces the protocol's.
        bos: Position of BOS tokens that replaces the protocol's.

    Raises:
        InputError: If the name is unknown, or window, stride or bos is invalid.

    >>> get("wikitext2", window=1024, bos="none").name
    'wikitext2, window 1024, bos none'
    """
    check_choice(name, _BY_NAME, "protocol")
    known = _BY_NAME[name]
    given = {"window": window, "stride": stride, "bos": bos}
    # Only actual changes appear in the name.
    asked = {key: value for key, value in given.items() if value is not None}
    changes: dict[str, Any] = {k: v for k, v in asked.items() if v != getattr(known, k)}
    described = "".join(f", {key} {value}" for key, value in changes.items())
    # Scale the stride with the window unless it is given.
    if stride is None and changes:
        of_text = (window or known.window) - ((bos or known.bos) == "window")
        changes["stride"] = max(1, known.stride * of_text // known.of_text)
    return dataclasses.replace(known, name=name + described, **changes)
