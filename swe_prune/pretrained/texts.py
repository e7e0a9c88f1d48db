"""The texts of one command: each read by its name, and those that must not overlap kept apart."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from swe_prune import data as data_lib
from swe_prune import interop
from swe_prune.errors import InputError
from swe_prune.pretrained.settings import CalibrationSettings
from swe_prune.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Text:
    """A text and its tokens.

    Attributes:
        name: Name of the text as given.
        tokens: Token ids, int32 (N,), without special tokens.
        size: Number of bytes of its UTF-8.
        content: Text as a string.
    """

    name: str
    tokens: Int[np.ndarray, " N"]
    size: int
    content: str = dataclasses.field(repr=False)


def read(name: str, model: interop.Pretrained | interop.PretrainedSource) -> Text:
    """Returns a text in a model's tokens.

    Raises:
        InputError: No such text, or the model has no tokenizer.
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


def calibration(
    given: CalibrationSettings,
    checkpoint: interop.PretrainedSource,
    evaluation: Text,
    progress: Progress,
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the calibration batches, and what the record says of them.

    Raises:
        InputError: No such text, windows that do not fit it or the model, or the evaluation text.
    """
    used = read(given.calibration, checkpoint)
    keep_apart(used, evaluation)
    window = given.calibration_window or min(2048, checkpoint.config.context)
    check_window("--calibration-window", window, checkpoint)
    batches = data_lib.random_batches(
        used.tokens,
        context=window,
        windows=given.calibration_windows,
        batch=given.calibration_batch,
        seed=given.seed,
        setting="--calibration-windows",
    )
    progress.say(
        f"Calibrating on {given.calibration_windows} windows of {window} tokens of {used.name}."
    )
    about = {"text": used.name, "windows": given.calibration_windows, "window": window}
    return batches, about | {"seed": given.seed}


def say_unread(given: CalibrationSettings, criterion: str, progress: Progress) -> None:
    """Says that the options of the calibration have no effect, as a criterion reads no text."""
    fields = dataclasses.fields(CalibrationSettings)
    names = [field.name for field in fields if field.name.startswith("calibration")]
    changed = [one for one in names if getattr(given, one) != getattr(CalibrationSettings, one)]
    if changed:
        options = ", ".join("--" + name.replace("_", "-") for name in changed)
        are = "has" if len(changed) == 1 else "have"
        progress.say(
            f"Calibrating on no text, which {criterion} does not read: {options} {are} no effect."
        )


def check_window(name: str, window: int, checkpoint: interop.PretrainedSource) -> None:
    """Raises InputError for windows that do not fit the context of a model."""
    context = checkpoint.config.context
    if not 1 <= window <= context:
        raise InputError(
            f"{name}={window} does not fit the {context} tokens of {checkpoint.path}; give 1 to "
            f"{context}"
        )
