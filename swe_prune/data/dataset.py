"""A text as token ids, ready to train on: `load`."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Integer

from swe_prune.arguments import checked
from swe_prune.config import DataConfig
from swe_prune.data import sources
from swe_prune.data.char_tokenizer import CharTokenizer
from swe_prune.errors import InputError


class Tokenizer(Protocol):
    """Text to ids and back: a `CharTokenizer`, or the one that a pretrained model comes with."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str, /) -> Integer[np.ndarray, " N"]:
        """Returns the ids of a text."""
        ...

    def decode(self, ids: Any, /) -> str:
        """Returns the text of ids."""
        ...


@dataclasses.dataclass(frozen=True)
class TextData:
    """A dataset as token ids.

    Attributes:
        name: Name of the dataset in the config.
        tokenizer: Tokenizer that was given, or one of the characters of both splits.
        train: Token ids (N,), in the tokenizer's dtype.
        validation: Token ids (M,), in the tokenizer's dtype.
        texts: Both splits as they were read.
    """

    name: str
    tokenizer: Tokenizer
    train: Integer[np.ndarray, " N"]
    validation: Integer[np.ndarray, " M"]
    texts: tuple[str, str] = dataclasses.field(repr=False)


@checked
def load(config: DataConfig, context: int, tokenizer: Tokenizer | None = None) -> TextData:
    """Returns the text that the config names, checked to be enough for windows of `context` tokens.

    `config.dataset` is a path to a text file, whose last `validation_fraction` is for validation,
    or the name of a TFDS dataset with its own splits. `shakespeare_plays` is prepared on its first
    use; any other must have been prepared in array_record. The examples of a TFDS split are joined
    by a blank line. `config.train_chars` and `config.validation_chars` keep the first so many
    characters.

    Args:
        config: Config of the dataset.
        context: Number L of tokens in a window.
        tokenizer: Tokenizer of a pretrained model; None: one of the text's own characters.

    Raises:
        InputError: The text cannot be found, read or prepared, or is too short.
    """
    texts = sources.read(config)
    unit, setting = "tokens", "data.window"
    if tokenizer is None:
        unit, setting = "characters", "model.context"
        tokenizer = CharTokenizer.from_texts(texts)
    train, validation = map(tokenizer.encode, texts)
    for split, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= context:
            raise InputError(
                f"the {split} text of {config.dataset!r} has {len(tokens)} {unit} and a window "
                f"of {setting} = {context} needs {context + 1}; lower it or give more text"
            )
    if config.eval_windows > len(validation) - context:
        raise InputError(
            f"data.eval_windows = {config.eval_windows} is more than the "
            f"{len(validation) - context} windows of {context} {unit} that the validation text "
            f"of {config.dataset!r} has; lower it or give more text"
        )
    return TextData(config.dataset, tokenizer, train, validation, texts)
