"""The trajectory of a tracked fine-tuning, kept beside the model for the criteria that read it."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import trajectory
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import InputError
from swe_prune.trajectory import TrajectoryStats

FOLDER = "trajectory"
ABOUT = "about.json"


def write(folder: Path, stats: TrajectoryStats, about: Mapping[str, Any]) -> None:
    """Writes the statistics into a model's folder.

    Args:
        folder: of the model.
        stats: with their measures.
        about: how they came to be: text, steps, cadence.
    """
    place = folder / FOLDER
    with contextlib.closing(Checkpoints(place, keep=1)) as store:
        store.save(0, stats, {})
    described = {"measures": list(stats.measures), **about}
    (place / ABOUT).write_text(json.dumps(described, indent=2) + "\n")


def there(folder: Path) -> bool:
    """Returns whether a trajectory lies beside a model; a file has none beside it."""
    return (folder / FOLDER / ABOUT).is_file()


def read(folder: Path, params: PyTree) -> TrajectoryStats | None:
    """Returns the statistics beside a model; None where there are none.

    Args:
        folder: of the model, or a file, which has none beside it.
        params: of the model, for the shapes.

    Raises:
        InputError: they are damaged, or of another model.
    """
    if not there(folder):
        return None
    place = folder / FOLDER
    try:
        about = json.loads((place / ABOUT).read_text())
        measures = tuple(about["measures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{place / ABOUT} is damaged ({error}); track the fine-tuning again"
        ) from None
    like = jax.eval_shape(lambda p: trajectory.init(p, measures), params)
    with contextlib.closing(Checkpoints(place, keep=1)) as store:
        return store.restore(like)[0]
