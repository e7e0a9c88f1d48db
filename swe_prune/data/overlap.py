"""Whether two texts share a passage: calibration must not have seen what evaluation measures on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from swe_prune.arguments import checked
from swe_prune.errors import InputError

CHARACTERS = 200
"""Minimum length of a shared passage: a few sentences, not a phrase."""
TOKENS = 50
"""Minimum length of a shared passage in token ids."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_SHOWN = 60  # characters or, a fifth as many, tokens of a passage that the error quotes

Text = str | Int[np.ndarray, "N ..."] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The first passage of `first` that `second` has too.

    Attributes:
        unit: "characters" or "tokens".
        length: Length of the passage, runs of white space counted as one character.
        first: (number of the text, from 0, position in it) where it starts.
        second: (number of the text, from 0, position in it) where it starts in the other.
        passage: Beginning of the passage, as characters or token ids.
        share: Share of all n-grams of `second` that `first` has too.
    """

    unit: str
    length: int
    first: tuple[int, int]
    second: tuple[int, int]
    passage: str
    share: float


def overlap(first: Text, second: Text, *, n: int | None = None) -> Overlap | None:
    """Returns the first passage of n characters or tokens that both texts have; None without one.

    Every run of n of one side is looked up among those of the other by a hash, and what is found is
    compared as it is, so nothing is missed and nothing reported wrongly. White space of any kind
    and length counts as one space, so a text that is wrapped otherwise is the same text. A text
    that is shorter than n, but not than n / 4, overlaps where the other side has the same one,
    whole. The time is linear in the texts but for one sort of the n-grams of the shorter side.

    Args:
        first: String, token ids in one row, or several of either: a list of strings, a list of
            rows, a 2-dimensional array of windows.
        second: Text of the same kind.
        n: Minimum number of characters or tokens in a row; None: 200 characters or 50 tokens.

    Raises:
        InputError: One is text and the other tokens, or n is below 1.

    >>> overlap("to be or not to be", ["I said: or  not to be."], n=8).passage
    ' or not to be'
    """
    ours, of_text = _texts(first)
    theirs, theirs_of_text = _texts(second)
    if ours and theirs and of_text != theirs_of_text:
        raise InputError(
            "one of the two is text and the other token ids, which cannot be compared; "
            "give both as text or both as ids of one tokenizer"
        )
    if n is None:
        n = CHARACTERS if of_text else TOKENS
    if n < 1:
        raise InputError(f"passages of n = {n} cannot be compared; give 1 or more")
    ours, theirs = [_Text.of(text) for text in ours], [_Text.of(text) for text in theirs]
    found = _shared(ours, theirs, n) or _same(ours, theirs, n)
    if found is None:
        return None
    (i, at), (j, to), share = found
    length = _run(ours[i].symbols, at, theirs[j].symbols, to)
    symbols = ours[i].symbols[at : at + length]
    if of_text:
        passage = "".join(map(chr, symbols[:_SHOWN]))
    else:
        passage = " ".join(str(token) for token in symbols[: _SHOWN // 5])
    unit = "characters" if of_text else "tokens"
    return Overlap(unit, length, (i, ours[i].place(at)), (j, theirs[j].place(to)), passage, share)


@checked
def check_disjoint(calibration: Text, evaluation: Text, *, n: int | None = None) -> None:
    """Refuses to calibrate and to evaluate on texts that share a passage; see `overlap`.

    Raises:
        InputError: They do; the sentence says what and where. Or they cannot be compared.
    """
    found = overlap(calibration, evaluation, n=n)
    if found is None:
        return

    def place(at: tuple[int, int], texts: Text) -> str:
        several = not isinstance(texts, str) and len(_texts(texts)[0]) > 1
        return f"position {at[1]}" + (f" of text {at[0]}" if several else "")

    raise InputError(
        f"{found.length} {found.unit} of the calibration text from "
        f"{place(found.first, calibration)} are in the evaluation text too, from "
        f"{place(found.second, evaluation)} "
        f"({found.passage!r} …), and calibration has {found.share:.2%} of what is evaluated on; "
        "calibrate on other text, or evaluate on text held out of it"
    )


@dataclasses.dataclass(frozen=True)
class _Text:
    """Symbols to compare, and where each was before white space was joined; None: at its place."""

    symbols: np.ndarray
    places: np.ndarray | None

    @classmethod
    def of(cls, text: str | np.ndarray) -> "_Text":
        if not isinstance(text, str):
            return cls(text, None)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        kinds, kind = np.unique(points, return_inverse=True)
        white = np.array([chr(c).isspace() for c in kinds], bool)[kind] if len(kinds) else kind > 0
        again = white & np.concatenate([[False], white[:-1]])
        places = np.flatnonzero(~again)
        return cls(np.where(white, ord(" "), points)[places], places)

    def place(self, at: int) -> int:
        return int(at if self.places is None else self.places[at])


def _texts(given: Text) -> tuple[list[Any], bool]:
    """Returns the strings or the rows of token ids that were given, and whether it is strings."""
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, np.ndarray):
        given = list(given)
        if all(isinstance(text, str) for text in given):
            return given, True
        if any(isinstance(text, str) for text in given):
            raise InputError("strings and token ids are mixed in one text; give either alone")
        if any(np.ndim(text) for text in given):
            return [np.asarray(text).reshape(-1) for text in given], False
    rows = np.asarray(given)
    return list(rows.reshape(-1, rows.shape[-1]) if rows.ndim > 1 else [rows]), False


def _shared(
    ours: list[_Text], theirs: list[_Text], n: int
) -> tuple[tuple[int, int], tuple[int, int], float] | None:
    """Returns the first n-gram that both sides have, and the share of theirs that ours has."""
    mine = [_hashes(text.symbols, n) for text in ours]
    other = [_hashes(text.symbols, n) for text in theirs]
    hashes = np.concatenate([*mine, np.zeros(0, np.uint64)])
    others = np.concatenate([*other, np.zeros(0, np.uint64)])
    both = np.intersect1d(hashes, others)
    hits = int(np.isin(others, both).sum())
    for position in np.flatnonzero(np.isin(hashes, both)).tolist():
        i, at = _located(mine, position)
        for candidate in np.flatnonzero(others == hashes[position]).tolist():
            j, to = _located(other, candidate)
            if np.array_equal(ours[i].symbols[at : at + n], theirs[j].symbols[to : to + n]):
                return (i, at), (j, to), hits / len(others)
    return None


def _same(
    ours: list[_Text], theirs: list[_Text], n: int
) -> tuple[tuple[int, int], tuple[int, int], float] | None:
    """Returns the first of our short texts that is one of theirs, and the share of theirs."""

    def short(texts: list[_Text]) -> dict[bytes, int]:
        keyed = {
            text.symbols.astype(np.int64).tobytes(): number
            for number, text in reversed(list(enumerate(texts)))
            if n / 4 <= len(text.symbols) < n
        }
        return keyed

    mine, other = short(ours), short(theirs)
    both = sorted(mine[key] for key in mine.keys() & other.keys())
    if not both:
        return None
    key = ours[both[0]].symbols.astype(np.int64).tobytes()
    return (both[0], 0), (other[key], 0), len(both) / len(theirs)


def _hashes(symbols: np.ndarray, n: int) -> UInt64[np.ndarray, " M"]:
    """Returns a hash of every n symbols in a row, Σ mixed(symbol j) · base^j modulo 2^64.

    The hash of a window is the difference of two running sums, moved back to its beginning.
    """
    count = len(symbols) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    powers = np.full(len(symbols), _BASE)
    powers[0] = 1
    powers = np.cumprod(powers, dtype=np.uint64)
    back = np.full(count, _INVERSE)
    back[0] = 1
    back = np.cumprod(back, dtype=np.uint64)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(_mixed(symbols) * powers, dtype=np.uint64)])
    return _mixed((sums[n:] - sums[:count]) * back)


def _mixed(values: np.ndarray) -> UInt64[np.ndarray, "..."]:
    """Returns the values with their bits spread over all 64, as splitmix64 ends; one to one."""
    x = values.astype(np.uint64) + _BASE
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _located(hashes: list[np.ndarray], position: int) -> tuple[int, int]:
    """Returns the text, and the position in it, of a position in the hashes of all texts."""
    ends = np.cumsum([len(of_text) for of_text in hashes])
    text = int(np.searchsorted(ends, position, side="right"))
    return text, position - int(ends[text] - len(hashes[text]))


def _run(ours: np.ndarray, at: int, theirs: np.ndarray, to: int) -> int:
    """Returns how many symbols from two places on are the same."""
    length = min(len(ours) - at, len(theirs) - to)
    differ = ours[at : at + length] != theirs[to : to + length]
    return int(np.argmax(differ)) if differ.any() else length
