"""Character-level tokenizer."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt

from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """Tokenizer with one token per character; ids follow the code point order of the symbols.

    Attributes:
        symbols: All symbols, each once, in code point order.

    >>> tokenizer = CharTokenizer.from_texts(["abba", "cab"])
    >>> tokenizer.encode("cab"), tokenizer.decode([2, 0, 1])
    (array([2, 0, 1], dtype=uint8), 'cab')
    """

    symbols: str

    def __post_init__(self):
        if not self.symbols or list(self.symbols) != sorted(set(self.symbols)):
            raise InputError(
                f"tokenizer symbols must be sorted and unique, got {self.symbols!r}; create the "
                "tokenizer with CharTokenizer.from_texts"
            )

    @classmethod
    @checked
    def from_texts(cls, texts: Iterable[str] | str) -> "CharTokenizer":
        """Returns the tokenizer for all symbols of the texts.

        Pass every split that will be encoded. A symbol that occurs only in the validation split is
        then an id that is never trained on, which the model correctly scores as unlikely. An
        "unknown" token instead would lower the loss by merging symbols, and could not be decoded.

        Args:
            texts: Texts to collect the symbols from.

        Raises:
            InputError: If the texts contain no symbol.
        """
        return cls("".join(sorted(set().union(*texts))))

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned integer dtype for all ids."""
        return np.min_scalar_type(self.vocab_size - 1)

    @checked
    def encode(self, text: str) -> UInt[np.ndarray, " N"]:
        """Returns the ids of the characters, of dtype `dtype`.

        Raises:
            InputError: If the text contains a symbol that the tokenizer does not have.
        """
        symbols, points = _code_points(self.symbols), _code_points(text)
        ids = np.searchsorted(symbols, points)
        known = symbols[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            position = int(np.argmin(known))
            raise InputError(
                f"symbol {text[position]!r} at character {position} of the text is not one of the "
                f"tokenizer's {self.vocab_size}; remove it, or train with a text that has it"
            )
        return ids.astype(self.dtype)

    @checked
    def decode(self, ids: Int[np.ndarray, " N"]) -> str:
        """Returns the text of token ids.

        Args:
            ids: Sequence or integer array (N,) of token ids.

        Raises:
            InputError: If an id is outside [0, vocab_size).
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()} do not fit the tokenizer's "
                f"{self.vocab_size} symbols; decode with the tokenizer that the model trained with"
            )
        return "".join(self.symbols[i] for i in ids)


def _code_points(text: str) -> np.ndarray:
    # One array operation instead of a Python loop over millions of characters. Lone surrogates are
    # treated like other code points.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
