"""Batches of an experiment: windows of a text, or pictures with their texts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from swe_prune import data as data_lib
from swe_prune.config import CalibrationConfig, Config
from swe_prune.data import image_text
from swe_prune.data.image_text import ImageTextData
from swe_prune.models import phi3v

Data = data_lib.TextData | ImageTextData

EXAMPLE_LENGTH = 8  # tokens; no parameter depends on it


def load(config: Config, tokenizer: data_lib.Tokenizer | None = None) -> Data:
    """Returns the data of a model of text, or of images and text."""
    if config.model.vision is None:
        return data_lib.load(config.data, config.window, tokenizer)
    return image_text.load(config.data, config.model, tokenizer)


def example(config: Config) -> Any:
    """Returns zeros as inputs of the model, for initialization and traces."""
    length = config.window if config.model.vision is None else EXAMPLE_LENGTH
    return phi3v.example(config.model, length)


def steps_per_epoch(config: Config, data: Data) -> int:
    """Returns how many steps one pass over the training data takes."""
    batch = config.data.batch
    if isinstance(data, ImageTextData):
        return image_text.steps_per_epoch(data.train, batch)
    return max(1, len(data.train) // (batch * config.window))


def training(config: Config, data: Data, seed: int, rows: np.ndarray) -> Iterator[Any]:
    """Returns the training iterator for one seed of the data order.

    Args:
        config: Settings.
        data: Data of the experiment.
        seed: Seed of the order.
        rows: Rows of each batch to return, as in `data.train_iterator`.
    """
    batch = config.data.batch
    if isinstance(data, ImageTextData):
        return image_text.train_iterator(data.train, batch=batch, seed=seed, rows=rows)
    return data_lib.train_iterator(
        data.train, context=config.window, batch=batch, seed=seed, rows=rows
    )


def fixed(config: Config, data: Data) -> tuple[list[Any], list[Any]]:
    """Returns fixed batches of the validation data, and as many of the training data."""
    count, batch = config.data.eval_windows, config.data.eval_batch
    if isinstance(data, ImageTextData):
        validation, training = (
            image_text.fixed_batches(split, image_text.chosen(split, count), batch)
            for split in (data.validation, data.train)
        )
        return validation, training
    validation, training = (
        data_lib.eval_batches(tokens, context=config.window, windows=count, batch=batch)
        for tokens in (data.validation, data.train)
    )
    return list(validation), list(training)


def calibration(config: Config, data: Data) -> list[dict[str, Any]]:
    """Returns random examples of the training data in batches; none is evaluated on."""
    settings = config.calibration
    if not isinstance(data, ImageTextData):
        return calibration_windows(data.train, config.window, settings)
    count = image_text.chosen(data.train, settings.windows).size
    numbers = np.random.default_rng(settings.seed).choice(len(data.train), count, replace=False)
    return image_text.fixed_batches(data.train, numbers, settings.batch)


def calibration_windows(
    tokens: Integer[np.ndarray, " N"], context: int, settings: CalibrationConfig
) -> list[dict[str, Any]]:
    """Returns random windows of a text in batches, the same for the same seed.

    Args:
        tokens: Tokens of the training text.
        context: L, the tokens of a window.
        settings: Number of windows, batch size and seed.

    Returns:
        {"inputs": int32 (B, L), "targets": int32 (B, L)} each; the last batch may be smaller.

    Raises:
        InputError: The text has fewer windows.
    """
    found = data_lib.random_batches(
        tokens,
        context=context,
        windows=settings.windows,
        batch=settings.batch,
        seed=settings.seed,
        setting="config.calibration.windows",
    )
    return [dict(batch) for batch in found]
