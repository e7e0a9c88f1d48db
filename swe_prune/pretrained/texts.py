"""The texts of one command: each read by its name, and those that must not overlap kept apart."""

import dataclasses

import numpy as np
from jaxtyping import Int

from swe_prune import data as data_lib
from swe_prune import interop
from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and its tokens.

    Attributes:
        name: as it was given.
        tokens: int32 (N,), without special tokens.
        size: bytes of its UTF-8.
        content: itself.
    """

    name: str
    tokens: Int[np.ndarray, " N"]
    size: int
    content: str = dataclasses.field(repr=False)


def read(name: str, model: interop.Pretrained | interop.PretrainedSource) -> Text:
    """Returns a text in a model's tokens.

    Raises:
        InputError: no such text, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.path} has no tokenizer, without which no text can be read; give the folder "
            "its tokenizer.json"
        )
    content = data_lib.read_named(name)
    return Text(name, model.tokenizer.encode(content), len(content.encode()), content)


def keep_apart(used: Text, evaluation: Text) -> None:
    """Raises InputError where a text that is calibrated or trained on has what is evaluated on."""
    data_lib.check_disjoint(used.content, evaluation.content)
