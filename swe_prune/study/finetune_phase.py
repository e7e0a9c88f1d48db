"""The phase that recovers: training on with masks held, or while pruning goes on."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from swe_prune import ledger, resumable
from swe_prune import masks as masks_lib
from swe_prune.errors import RunError
from swe_prune.study import gradual, histograms, prune_phase, samples
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.prune_phase import DenseModel
from swe_prune.study.recovery import Tuning
from swe_prune.study.saved import finite, load_masks, recovery_start, save, starting_values
from swe_prune.study.workdir import remove, result_of, write_result
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState

FINETUNE_SEED_OFFSET = 1 << 16  # added to the seed, so that fine-tuning sees another text order

_revived = jax.jit(masks_lib.revived)


def finetune_cell(
    experiment: Experiment, cell: Cell, dense: DenseModel, progress: Progress, name: str
) -> None:
    """Trains one pruned cell by its recovery and adds what comes of it to its result.

    Of a gradual cell the masks are those it ends with, and `pruned_loss` is what the dense model
    loses under them without any recovery.
    """
    folder = experiment.workdir.cell(cell)
    result = result_of(folder / "result.json")
    if "finetuned_loss" in result:  # by another process, while this one waited
        return
    with ledger.measure("finetune", cell=f"seed_{cell.seed}/{cell.name}") as entry:
        _finetune(experiment, cell, dense, progress, name, result)
        entry.tokens = experiment.tokens(experiment.tuning_steps(cell))
    progress.say(
        f"{name}: sparsity {result['sparsity_prunable']:.3f}, loss {result['pruned_loss']:.4f} "
        f"pruned, {result['finetuned_loss']:.4f} fine-tuned"
    )


def _finetune(
    experiment: Experiment,
    cell: Cell,
    dense: DenseModel,
    progress: Progress,
    name: str,
    result: dict[str, Any],
) -> None:
    folder = experiment.workdir.cell(cell)
    tuning = experiment.tunings[cell.recovery]
    start = starting_values(experiment, dense.state, cell)
    begin = recovery_start(experiment, cell.seed, cell.recovery, start)
    if cell.gradual:
        regime = gradual.regime(experiment, cell, dense, begin)
        state, seconds = recover(
            experiment,
            progress,
            tuning,
            name,
            folder,
            regime.state,
            cell.seed,
            step=regime.step,
            weights=regime.weights,
        )
        params, masks = regime.finish(state)
    else:
        masks = load_masks(experiment, cell)
        state = experiment.tuning_state(tuning, begin, cell.seed, masks)
        state, seconds = recover(experiment, progress, tuning, name, folder, state, cell.seed)
        params, masks = state.params, state.masks  # those given to the step were donated
    revived = int(_revived(params, masks))
    if revived:
        raise RunError(f"{revived} pruned weights of {cell.name!r} are not 0 after fine-tuning")
    if cell.gradual:
        _replace_masks(experiment, cell, dense, masks, start, result)
    result["finetuned_loss"] = finite(experiment.validation_loss(params), name)
    result["finetuned_train_loss"] = experiment.training_loss(params)
    result["seconds"] += seconds
    result |= samples.sampled(experiment, "finetuned", params, dense.state.params)
    edges = result["histogram"]["edges"]
    result["histogram"]["finetuned"] = histograms.histogram(params, masks, edges, kept_only=True)
    if experiment.config.keep_finetuned:
        save(folder / "finetuned", params, cell, tuning.steps)
    write_result(folder / "result.json", result)
    remove(folder / "checkpoints")


def _replace_masks(
    experiment: Experiment,
    cell: Cell,
    dense: DenseModel,
    masks: PyTree,
    start: PyTree,
    result: dict[str, Any],
) -> None:
    folder = experiment.workdir.cell(cell)
    dense_result = result_of(experiment.workdir.dense(cell.seed) / "result.json")
    params = masks_lib.apply(start, masks)
    loss = finite(experiment.validation_loss(params), cell.name)
    result |= prune_phase.described(experiment, cell, masks, params, dense_result, loss)
    result["histogram"]["pruned"] = histograms.histogram(
        params, masks, result["histogram"]["edges"], kept_only=True
    )
    remove(folder / "masks")
    save(folder / "masks", masks, cell)


def recover(
    experiment: Experiment,
    progress: Progress,
    tuning: Tuning,
    name: str,
    folder: epath.Path,
    state: TrainState,
    seed: int,
    step: Callable[..., Any] | None = None,
    weights: Callable[[PyTree, Any], PyTree] = lambda params, step: params,
) -> tuple[TrainState, float]:
    """Returns the state after a recovery, or its control, and the seconds it took.

    Args:
        experiment: Settings and data.
        progress: Display of the steps.
        tuning: Recovery to run.
        name: Name to show.
        folder: Folder of its metrics and checkpoints.
        state: State at step 0; donated.
        seed: Seed of the dense model.
        step: Train step that also prunes. None: the recovery's own.
        weights: Function from the trained parameters and a step to the weights to evaluate.
    """
    return resumable.fit(
        experiment.phase(name, folder, tuning.settings, tuning.steps),
        state,
        step or tuning.step,
        experiment.batches(seed + FINETUNE_SEED_OFFSET),
        progress,
        evaluate=lambda params: experiment.validation_loss(weights(params, tuning.steps)),
    )
