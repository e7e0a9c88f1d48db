"""Finished phases whose files were damaged later: found, and cleared so that they are made again.

A phase is made again from its last whole checkpoint, with the same numbers, since a resumed run is
bit-identical to an uninterrupted one.
"""

import contextlib
import warnings

from etils import epath

from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import DamagedError
from swe_prune.runtime import processes, storage
from swe_prune.runtime.locks import lock_for_run
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.workdir import exists, remove, result_of
from swe_prune.training.progress import Progress


def mend_dense(experiment: Experiment, seed: int, progress: Progress) -> None:
    """Clears the dense phase of a seed if it is finished and damaged; hold its lock."""
    folder = experiment.workdir.dense(seed)
    if not exists(folder / "result.json"):
        return
    steps = [experiment.train_steps]
    for cell in experiment.cells:
        if cell.seed == seed and cell.recovery.kind == "rewind_weights":
            steps.append(experiment.train_steps - experiment.tunings[cell.recovery].steps)
    with warnings.catch_warnings():  # of what is renamed or removed; it is said below
        warnings.simplefilter("ignore", UserWarning)
        store = Checkpoints(folder / "checkpoints")
    with contextlib.closing(store):
        found = {step: store.fault(step) for step in sorted(set(steps))}
        step, why = next(((at, one) for at, one in found.items() if one), (None, None))
        left = None if step is None else store.set_aside_from(step)
    if step is not None:
        start = "from the start" if left is None else f"from checkpoint {left}"
        progress.say(f"dense model, seed {seed}: damaged ({why}); it is made again {start}")
    elif _unreadable(folder / "result.json"):
        progress.say(f"dense model, seed {seed}: its result is damaged; it is made again")
    else:
        return
    _discard(folder, ("result.json",))


def mend_cells(experiment: Experiment, progress: Progress) -> None:
    """Clears the cells, and the controls, whose results or masks are damaged.

    The masks of a cell that is fine-tuned are not read again, so only `evaluate` finds a fault.
    """
    for cell in experiment.cells:
        folder = experiment.workdir.cell(cell)
        if not exists(folder / "result.json"):
            continue
        with lock_for_run(folder, f"cell {cell.name} of seed {cell.seed}", progress.say):
            why = _fault_of(folder, cell)
            if why is not None:
                progress.say(f"cell {cell.name}: damaged ({why}); it is made again")
                _discard(folder, ("result.json", "masks", "start", "finetuned"))
        control = experiment.workdir.control(cell.seed, cell.recovery)
        if exists(control / "result.json") and _unreadable(control / "result.json"):
            _discard(control, ("result.json",))


def mend_cut(folder: epath.Path, name: str, progress: Progress) -> None:
    """Clears what is damaged of a cut: a result, or the model that is to be served; hold its lock.

    Args:
        folder: Folder of the cut.
        name: Name of the cut.
        progress: Display of what is said.
    """
    results = [one for one in ("result.json", "serving.json") if exists(folder / one)]
    damaged = {one: "it cannot be read" for one in results if _unreadable(folder / one)}
    if {*results} - {*damaged} == {"result.json"} and (why := _fault(folder / "recovered", None)):
        damaged["result.json"] = why
    for one, why in damaged.items():
        progress.say(f"cut {name}: {one} or its model is damaged ({why}); it is made again")
    _discard(folder, tuple(damaged))


def _fault_of(folder: epath.Path, cell: Cell) -> str | None:
    if _unreadable(folder / "result.json"):
        return "its result cannot be read"
    result = result_of(folder / "result.json")
    if cell.recovery.kind == "none" or "finetuned_loss" in result:
        return None
    names = ("masks", "start") if cell.recipe.updates_weights else ("masks",)
    return next((why for name in names if (why := _fault(folder / name, None))), None)


def _fault(folder: epath.Path, step: int | None) -> str | None:
    try:
        with contextlib.closing(Checkpoints(folder, reading=True)) as store:
            return store.fault(step)
    except DamagedError as error:
        return error.fault


def _unreadable(path: epath.Path) -> bool:
    def look() -> bool:
        try:
            storage.read_json(path, sealed=True)
        except (OSError, ValueError):
            return True
        return False

    return processes.first(look)


def _discard(folder: epath.Path, names: tuple[str, ...]) -> None:
    for name in names:
        if name.endswith(".json"):
            processes.first(lambda: storage.discard(folder / name))  # noqa: B023, called now
        else:
            remove(folder / name)
