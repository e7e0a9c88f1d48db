"""A text as token ids, ready to train on: `load`."""

import dataclasses

import numpy as np
from jaxtyping import UInt

from swe_prune.config import DataConfig
from swe_prune.data import sources
from swe_prune.data.tokenizer import CharTokenizer
from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextData:
    """A dataset as token ids.

    Attributes:
        name: the dataset as the config names it.
        tokenizer: of the symbols of both splits.
        train: token ids (N,), in the tokenizer's dtype.
        validation: token ids (M,), in the tokenizer's dtype.
    """

    name: str
    tokenizer: CharTokenizer
    train: UInt[np.ndarray, " N"]
    validation: UInt[np.ndarray, " M"]


def load(config: DataConfig, context: int) -> TextData:
    """Returns the text that the config names, checked to be enough for windows of `context` tokens.

    `config.dataset` is a path to a text file, whose last `validation_fraction` is for validation,
    or the name of a TFDS dataset with its own splits. `shakespeare_plays` is prepared on its first
    use; any other must have been prepared in array_record. The examples of a TFDS split are joined
    by a blank line. `config.train_chars` and `config.validation_chars` keep the first so many
    characters.

    Args:
        config: which text.
        context: tokens of a window, L.

    Raises:
        InputError: the text cannot be found, read or prepared, or is too short, with the mend.
    """
    train, validation = sources.read(config)
    for split, text in (("training", train), ("validation", validation)):
        if len(text) <= context:
            raise InputError(
                f"the {split} text of {config.dataset!r} has {len(text)} characters and a window "
                f"of model.context = {context} needs {context + 1}; lower it or give more text"
            )
    if config.eval_windows > len(validation) - context:
        raise InputError(
            f"data.eval_windows = {config.eval_windows} is more than the "
            f"{len(validation) - context} windows of {context} characters that the validation text "
            f"of {config.dataset!r} has; lower it or give more text"
        )
    tokenizer = CharTokenizer.from_texts((train, validation))
    return TextData(
        config.dataset, tokenizer, tokenizer.encode(train), tokenizer.encode(validation)
    )
