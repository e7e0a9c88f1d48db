"""The windows that cells are calibrated on: of the training text, chosen by a seed of their own."""

from typing import Any

import numpy as np
from jaxtyping import Integer

from swe_prune import allocation, importance
from swe_prune import data as data_lib
from swe_prune.calibration.measures import MEASURES
from swe_prune.config import CalibrationConfig
from swe_prune.study.grid import Cell


def calibrated(cell: Cell) -> bool:
    """Returns whether a cell reads the calibration windows."""
    if cell.allocation is not None and "batches" in allocation.get(cell.allocation).needs:
        return True
    if cell.blockwise is not None:
        return True
    return bool(MEASURES & set(importance.get(cell.criterion).measured))


def windows(
    tokens: Integer[np.ndarray, " N"], context: int, settings: CalibrationConfig
) -> list[dict[str, Any]]:
    """Returns random windows of a text, in batches; the same for the same seed.

    Args:
        tokens: of the training text, so that none is ever evaluated on.
        context: L.
        settings: how many, in which batches, and the seed of the choice.

    Returns:
        {"inputs": int32 (B, L), "targets": int32 (B, L)} each; the last batch may be smaller.

    Raises:
        InputError: the text has not so many windows.
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
