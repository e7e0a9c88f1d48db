"""The models of an experiment on disk, and what their losses must be."""

import contextlib
import math

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree

from swe_prune import trajectory, tree
from swe_prune.checkpoint import Checkpoints
from swe_prune.config import CutConfig
from swe_prune.errors import DamagedError, InputError, RunError
from swe_prune.runtime import processes
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell, Recovery
from swe_prune.study.workdir import exists, remove
from swe_prune.training.state import TrainState


def load_dense(experiment: Experiment, seed: int, step: int | None = None) -> TrainState:
    """Returns the dense phase's final state, or that of an earlier step that was retained.

    Raises:
        InputError: The phase has not finished.
    """
    folder = experiment.workdir.dense(seed)
    if not exists(folder / "result.json"):
        raise InputError(
            f"the dense model of seed {seed} is not trained yet; run the command 'train' first"
        )
    like = jax.eval_shape(lambda p: experiment.dense_state(p, seed), experiment.abstract_params)
    like = experiment.place(like)
    # The last one or none: from an earlier one other masks would come.
    step = experiment.train_steps if step is None else step
    return restored(
        folder / "checkpoints", like, step, "run the command 'train', which makes it again"
    )


def recovery_start(experiment: Experiment, seed: int, recovery: Recovery, params: PyTree) -> PyTree:
    """Returns the weights that a recovery starts from: those given, or early ones.

    Args:
        experiment: Settings and workdir.
        seed: Seed of the dense model.
        recovery: Recovery that is to run.
        params: Weights after pruning.
    """
    if recovery.kind != "rewind_weights":
        return params
    early = experiment.train_steps - experiment.tunings[recovery].steps
    return load_dense(experiment, seed, early).params


def load_masks(experiment: Experiment, cell: Cell) -> PyTree:
    """Returns the masks of a pruned cell."""
    like = experiment.abstract_prunable(jnp.bool_)
    return restored(experiment.workdir.cell(cell) / "masks", like)


def load_finetuned(experiment: Experiment, cell: Cell) -> PyTree | None:
    """Returns the parameters after a cell's recovery, or None where they were not kept."""
    folder = experiment.workdir.cell(cell) / "finetuned"
    return restored(folder, experiment.abstract_params) if exists(folder) else None


def starting_values(experiment: Experiment, dense: TrainState, cell: Cell | None = None) -> PyTree:
    """Returns the weights that go on after pruning: the final ones, or the late mean.

    Args:
        experiment: Experiment with the settings.
        dense: Last state of the dense phase.
        cell: Cell of the study; one that was pruned block after block goes on with what that left.
    """
    if cell is not None and cell.recipe.updates_weights:
        return restored(experiment.workdir.cell(cell) / "start", experiment.abstract_params)
    if experiment.config.prune.values_from == "final":
        return dense.params
    assert dense.stats is not None
    late_mean = trajectory.read(dense.stats, "late_mean")
    return tree.map_leaves(
        lambda _, mean, weight: weight if mean is None else mean.astype(weight.dtype),
        late_mean,
        dense.params,
    )


def save(folder: epath.Path, values: PyTree, cell: Cell | CutConfig, step: int = 0) -> None:
    """Writes one pytree of a cell, or of a cut, in a folder of its own."""
    if processes.count() > 1:
        # In jax 0.10 a result of a process with one device may hold itself as its only shard, which
        # cannot be asked for then; a copy does not.
        places = jax.tree.map(lambda value: value.sharding, values)
        values = jax.jit(lambda values: values, out_shardings=places)(values)
    remove(folder)  # of a run that was killed here, or what was damaged later
    with contextlib.closing(Checkpoints(folder, keep=1)) as store:
        store.save(step, values, {"cell": cell.name})


def restored(
    folder: epath.Path, like: PyTree, step: int | None = None, advice: str | None = None
) -> PyTree:
    """Returns the pytree of a folder with a number, or the newest.

    Raises:
        InputError: It is damaged; the sentence ends with the advice, by default to remove the cell.
    """
    try:
        with contextlib.closing(Checkpoints(folder, reading=True)) as store:
            return store.restore(like, step)[0]
    except DamagedError as error:
        advice = advice or f"remove {folder.parent} and run the command 'run' to make it again"
        raise DamagedError(f"{error.fault}; {advice}") from None


def finite(loss: float, name: str) -> float:
    """Returns a loss.

    Raises:
        RunError: It is not finite.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"the validation loss of {name!r} is {loss}; lower the learning rate or the sparsity; "
            "what was finished before is kept"
        )
    return loss
