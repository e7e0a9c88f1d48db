"""Under which conditions a perplexity was measured: named protocols, so that figures compare.

The same model on the same text differs by a tenth and more with the window, the stride, the
beginning-of-sequence token and the way the documents are joined; a figure without them is none.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from swe_prune.errors import InputError, check_choice

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
        check_choice(self.bos, BOS, f"bos of protocol {self.name!r}")
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
    check_choice(name, _BY_NAME, "protocol")
    known = _BY_NAME[name]
    given = {"window": window, "stride": stride, "bos": bos}
    asked = {key: value for key, value in given.items() if value is not None}
    changes: dict[str, Any] = {k: v for k, v in asked.items() if v != getattr(known, k)}
    described = "".join(f", {key} {value}" for key, value in changes.items())
    if stride is None and changes:
        of_text = (window or known.window) - ((bos or known.bos) == "window")
        changes["stride"] = max(1, known.stride * of_text // known.of_text)
    return dataclasses.replace(known, name=name + described, **changes)
