"""Characters to token ids and back."""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt

from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token per character; the ids number the symbols in code point order.

    Attributes:
        symbols: every symbol once, in code point order.

    >>> tokenizer = CharTokenizer.from_texts(["abba", "cab"])
    >>> tokenizer.encode("cab"), tokenizer.decode([2, 0, 1])
    (array([2, 0, 1], dtype=uint8), 'cab')
    """

    symbols: str

    def __post_init__(self):
        if not self.symbols or list(self.symbols) != sorted(set(self.symbols)):
            raise InputError(
                f"tokenizer symbols {self.symbols!r} are not sorted and unique; "
                "make them with CharTokenizer.from_texts"
            )

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Returns the tokenizer of all the symbols of all the texts.

        Give it every split that will be encoded. A symbol that only the validation split has is
        then an id that training never meets: the model scores it as unlikely, as it should, and
        nothing fails. The alternative, an "unknown" token, would flatter the loss by merging
        symbols, and could not be decoded.

        Raises:
            InputError: the texts have no symbol at all.
        """
        return cls("".join(sorted(set().union(*texts))))

    @property
    def vocab_size(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> UInt[np.ndarray, " N"]:
        """Returns the ids of the characters in `dtype`.

        Raises:
            InputError: a symbol the tokenizer does not have.
        """
        symbols, points = _code_points(self.symbols), _code_points(text)
        ids = np.searchsorted(symbols, points)
        known = symbols[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            position = int(np.argmin(known))
            raise InputError(
                f"symbol {text[position]!r} at character {position} of the text is none of the "
                f"tokenizer's {self.vocab_size}; remove it, or train with a text that has it"
            )
        return ids.astype(self.dtype)

    def decode(self, ids) -> str:
        """Returns the text of token ids, given as a sequence or an integer array (N,).

        Raises:
            InputError: an id outside [0, vocab_size).
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()} do not fit the tokenizer's "
                f"{self.vocab_size} symbols; decode with the tokenizer that the model trained with"
            )
        return "".join(self.symbols[i] for i in ids)

    def to_json(self) -> str:
        """Returns the tokenizer as JSON text; `from_json` reads it back."""
        return json.dumps({"type": "char", "symbols": self.symbols})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        """Returns the tokenizer that `to_json` wrote.

        Raises:
            InputError: the text is not such JSON.
        """
        try:
            value = json.loads(text)
            if value["type"] != "char" or not isinstance(value["symbols"], str):
                raise KeyError("type")
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "the tokenizer file is no JSON of a character tokenizer; write it with to_json()"
            ) from None
        return cls(value["symbols"])


def _code_points(text: str) -> np.ndarray:
    # One array operation in place of a Python loop over millions of characters. Lone surrogates
    # are code points like others here.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
