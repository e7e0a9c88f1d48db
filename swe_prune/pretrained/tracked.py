"""The trajectory of a tracked fine-tuning, kept beside the model for the criteria that read it."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import trajectory
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import DamagedError, InputError, shown
from swe_prune.interop.stranger_files import inside, read_json, write_json
from swe_prune.pretrained import choice
from swe_prune.trajectory import TrajectoryStats

FOLDER = "trajectory"
ABOUT = "about.json"
_FIELDS = ("measures", "include", "exclude", "blocks")


def write(folder: Path, stats: TrajectoryStats, about: Mapping[str, Any]) -> None:
    """Writes the statistics into a model's folder.

    Args:
        folder: Folder of the model.
        stats: Statistics with their measures.
        about: Origin of the statistics: text, steps, cadence, and the rules of the weights.
    """
    place = folder / FOLDER
    with contextlib.closing(Checkpoints(place, keep=1)) as store:
        store.save(0, stats, {})
    write_json(place / ABOUT, {"measures": list(stats.measures), **about})


def there(folder: Path) -> bool:
    """Returns whether a trajectory lies beside a model; a file has none beside it."""
    return folder.is_dir() and os.path.lexists(folder / FOLDER / ABOUT)


def narrowed(folder: Path, params: PyTree, chosen: PyTree) -> PyTree:
    """Returns those of the chosen weights that the trajectory beside a model tracks.

    Args:
        folder: Folder of the model.
        params: Parameters of the model, which may be abstract.
        chosen: Bool pytree, as `choice.prunable` returns it.

    Raises:
        InputError: It tracks none of them.
    """
    rules = _about(folder)["rules"]
    both = jax.tree.map(lambda one, two: one and two, chosen, choice.prunable(params, **rules))
    if not any(jax.tree.leaves(both)):
        raise InputError(
            f"the trajectory of {folder} tracks none of the chosen weights, but those of "
            f"{choice.shown(rules)}; choose among them, or track the fine-tuning again"
        )
    return both


def read(folder: Path, params: PyTree) -> TrajectoryStats | None:
    """Returns the statistics beside a model; None where there are none.

    Args:
        folder: Folder of the model, or a file, which has no statistics next to it.
        params: Parameters of the model, for the shapes.

    Raises:
        InputError: They are damaged, or of another model.
    """
    if not there(folder):
        return None
    place = folder / FOLDER
    about = _about(folder)
    measures = tuple(about["measures"])
    chosen = choice.prunable(params, **about["rules"])
    like = jax.eval_shape(lambda p: trajectory.init(p, measures, chosen), params)
    try:
        with contextlib.closing(Checkpoints(place, reading=True)) as store:
            return store.restore(like)[0]
    except DamagedError as error:
        raise DamagedError(f"{error.fault}; track the fine-tuning again") from None


def _about(folder: Path) -> dict[str, Any]:
    path = folder / FOLDER / ABOUT
    place = folder / FOLDER
    for file in place.rglob("*"):  # all that a checkpoint is read from
        if not file.is_dir() or file.is_symlink():
            inside(place, str(file.relative_to(place)), None)
    about = read_json(path)
    rules = about.get("rules") or {}
    found = {"measures": about.get("measures")} | (rules if isinstance(rules, dict) else {"": 0})
    for name, value in found.items():
        kind = str if name == "blocks" else list
        texts = value if isinstance(value, list) else []
        if (
            name not in _FIELDS
            or not isinstance(value, kind)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise InputError(
                f"{path} is damaged: it has {name!r} = {shown(value)}; track the fine-tuning again"
            )
    return {"measures": found.pop("measures"), "rules": found}
