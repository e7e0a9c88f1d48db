"""Opening of the models of a command, with a line for what lies next to them and is not read."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from swe_prune import interop
from swe_prune.errors import InputError
from swe_prune.pretrained.settings import ModelSettings, WeightsSettings
from swe_prune.recipe import Recipe, check
from swe_prune.training.progress import Progress

T = TypeVar("T")


def opened(given: WeightsSettings, progress: Progress) -> interop.PretrainedSource:
    """Opens the model of a command, and says what lies next to it and is not read."""
    tokenizer: bool | str = False
    if isinstance(given, ModelSettings):
        tokenizer = True if given.tokenizer is None else given.tokenizer
    return said(
        progress,
        lambda: interop.open_pretrained(
            given.model,
            compute_dtype=given.compute_dtype,
            tokenizer=tokenizer,
            prefix=given.prefix,
        ),
    )


def said(progress: Progress, run: Callable[[], T]) -> T:
    """Runs a function and prints its warnings for the user as lines, one of each special kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = run()
    for at, one in enumerate(caught):
        if one.category is UserWarning:
            progress.say(f"Note: {one.message}.")
        elif issubclass(one.category, UserWarning):
            alike = [
                number for number, other in enumerate(caught) if other.category is one.category
            ]
            more = f" ({len(alike) - 1} more such warnings)" if len(alike) > 1 else ""
            if at == alike[0]:
                progress.say(f"Note: {one.message}{more}.")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result


def of_same_text(
    model: interop.PretrainedSource, name: str, prefix: str | None, progress: Progress
) -> interop.PretrainedSource:
    """Opens another model whose predictions can be compared: its tokens are the same.

    Raises:
        InputError: Its vocabulary is of another size.
    """
    other = said(progress, lambda: interop.open_pretrained(name, tokenizer=False, prefix=prefix))
    if other.vocab_size != model.vocab_size:
        raise InputError(
            f"{name} has {other.vocab_size:,} tokens and {model.path} has {model.vocab_size:,}, so "
            "they cannot be compared; give the model that it was made from"
        )
    return other


def has_masks(path: Path) -> bool:
    """Returns whether a model has a file of masks."""
    return path.is_dir() and os.path.lexists(path / interop.MASKS)


def record_of(path: Path) -> dict[str, Any]:
    """Returns how a model was pruned, as arguments of `interop.PruningRecord`.

    Raises:
        InputError: Its record does not say it.
    """
    before = interop.read_record(path)
    try:
        request = Recipe(**before["recipe"])
        check(request)
        if not isinstance(before.get("rules"), dict | None) or not isinstance(
            before.get("calibration"), dict | None
        ):
            raise TypeError("its rules or its calibration are none")
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{path / 'pruning.json'} does not say how the model was pruned ({error}); prune it "
            "again with this version"
        ) from None
    return {
        "recipe": request,
        "calibration": before.get("calibration"),
        "rules": before.get("rules"),
    }
