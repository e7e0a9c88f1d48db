"""Text to token ids and back, by the tokenizer that a pretrained model comes with.

Three places have one: a tokenizer.json; vocab.json with merges.txt, which is GPT-2's; and the
vocabulary inside a GGUF file. All become a tokenizer of the `tokenizers` package, so that they cut
text as transformers does. `tokenizer_folder` and `tokenizer_gguf` read them.

Source: https://github.com/huggingface/tokenizers.
"""

import base64
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from swe_prune.errors import InputError, reading
from swe_prune.interop.stranger_files import reading_in_rust, write_json

GROWTH = 100
"""Largest factor by which a normalizer or decoder may lengthen a text."""

_OTHER = "give the tokenizer that belongs to the model with --tokenizer=PATH (tokenizer= in Python)"


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a pretrained model.

    Attributes:
        backend: `tokenizers.Tokenizer` that does the work.
        bos_id: Id of the token that begins a text; None: the model has none.
        eos_ids: Ids of the tokens that end a text; there may be several, or none.
        chat_template: Chat template as Jinja text, for `save` to write; None: none.
        folder: Folder whose files it was read from, for an export to copy; None: `save` writes it.
    """

    backend: Any
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    folder: Path | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model may have more, which no text becomes."""
        return self._ids

    @functools.cached_property
    def _ids(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int | None:
        """The first of the tokens that end a text."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the token ids."""
        return np.dtype(np.int32)

    def encode(
        self, text: str, *, special: bool = False, template: bool = False
    ) -> Int32[np.ndarray, " N"]:
        """Returns the ids of a text.

        Args:
            text: Any text.
            special: Whether `<|endoftext|>` and the like in the text are read as the tokens they
                name. False: as the characters they are, as text from elsewhere should be.
            template: Whether to add what the tokenizer puts around every text, such as a first
                token.
        """
        self.backend.encode_special_tokens = not special
        with reading_in_rust("the text", _OTHER):
            ids = self.backend.encode(text, add_special_tokens=template).ids
        return np.asarray(ids, self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = True) -> str:
        """Returns the text of token ids, given as a sequence or an integer array (N,).

        Args:
            ids: Token ids.
            special: Whether special tokens are written by their names; False: left out.

        Raises:
            InputError: An id outside [0, vocab_size).
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()} do not fit the tokenizer's "
                f"{self.vocab_size}; decode with the tokenizer of the model they are from"
            )
        with reading_in_rust("the token ids", _OTHER):
            return self.backend.decode(ids.tolist(), skip_special_tokens=not special)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers loads."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None:
                config[key] = self.backend.id_to_token(token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config)


def checked(made: PretrainedTokenizer, vocab_size: int, where: str) -> PretrainedTokenizer:
    """Returns a tokenizer after checking that its ids are in the model's vocabulary.

    Raises:
        InputError: An id is beyond it.
    """
    if made.vocab_size > vocab_size:
        last = made.backend.id_to_token(made.vocab_size - 1)
        raise InputError(
            f"the tokenizer of {where} has ids up to {made.vocab_size - 1} and the model a "
            f"vocabulary of {vocab_size}, without {last!r}; give the tokenizer that belongs to the "
            "model with --tokenizer=PATH (tokenizer= in Python)"
        )
    return made


def check_growth(backend: Any, where: str) -> None:
    """Checks that a tokenizer does not lengthen a text without bound.

    Raises:
        InputError: The replacements of its normalizer or decoder multiply to more than `GROWTH`.
    """
    for part in ("normalizer", "decoder"):
        with reading(where):
            state = getattr(backend, part)
            steps = {} if state is None else json.loads(state.__getstate__())
            growth = _growth(steps)
        if growth > GROWTH:
            raise InputError(
                f"the {part} of {where} may lengthen a text more than {GROWTH}-fold; {_OTHER}"
            )


def _growth(step: Mapping[str, Any]) -> int:
    """Returns the largest factor by which one step, or a sequence of steps, lengthens a text."""
    inner = step.get("normalizers") or step.get("decoders") or ()
    growth = math.prod(map(_growth, inner))
    for key in ("content", "prepend"):
        growth *= max(1, len(step.get(key) or ""))
    charsmap = base64.b64decode(step.get("precompiled_charsmap") or "")
    if charsmap:  # four bytes of length, a trie, and the replacements with a NUL after each
        trie = int.from_bytes(charsmap[:4], "little")
        growth *= max(map(len, charsmap[4 + trie :].split(b"\0")))
    return growth
