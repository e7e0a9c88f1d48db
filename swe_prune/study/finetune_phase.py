"""The phase that recovers: training on with masks held, or while pruning goes on."""

from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import masks as masks_lib
from swe_prune import sparse_training
from swe_prune.errors import RunError
from swe_prune.study import gradual, histograms, prune_phase, samples, timing
from swe_prune.study.experiment import Experiment
from swe_prune.study.fitting import tune
from swe_prune.study.grid import Cell
from swe_prune.study.saved import finite, load_masks, save, starting_values
from swe_prune.study.scoring import Source
from swe_prune.study.workdir import remove, result_of, write_result
from swe_prune.training.progress import Progress

_revived = jax.jit(masks_lib.revived)


def finetune_cell(
    experiment: Experiment, cell: Cell, source: Source, progress: Progress, name: str
) -> None:
    """Trains one pruned cell by its recovery and adds what comes of it to its result.

    Of a gradual cell the masks are those it ends with, and `pruned_loss` is what the dense model
    loses under them without any recovery.
    """
    folder = experiment.workdir.cell(cell)
    result = result_of(folder / "result.json")
    if "finetuned_loss" in result:  # by another process, while this one waited
        return
    tuning = experiment.tunings[cell.recovery]
    start = starting_values(experiment, source.state, cell)
    step = None
    if cell.gradual:
        masks = sparse_training.all_kept(start, experiment.prunable)
        plan, renew = timing.schedule(cell, tuning.steps), gradual.renewal(source, cell)
        step = gradual.pruning_step(tuning.step, plan, renew)
    else:
        masks = load_masks(experiment, cell)
    state = experiment.tuning_state(tuning, start, cell.seed, masks)
    state, seconds = tune(experiment, progress, tuning, name, folder, state, cell.seed, step)
    masks = state.masks  # those given to the step were donated
    revived = int(_revived(state.params, masks))
    if revived:
        raise RunError(f"{revived} pruned weights of {cell.name!r} are not 0 after fine-tuning")
    if cell.gradual:
        _replace_masks(experiment, cell, source, masks, start, result)
    result["finetuned_loss"] = finite(experiment.validation_loss(state.params), name)
    result["finetuned_train_loss"] = experiment.training_loss(state.params)
    result["seconds"] += seconds
    result |= samples.sampled(experiment, "finetuned", state.params, source.state.params)
    edges = result["histogram"]["edges"]
    result["histogram"]["finetuned"] = histograms.histogram(
        state.params, masks, edges, kept_only=True
    )
    if experiment.config.keep_finetuned:
        save(folder / "finetuned", state.params, cell, tuning.steps)
    write_result(folder / "result.json", result)
    remove(folder / "checkpoints")
    progress.say(
        f"{name}: sparsity {result['sparsity_prunable']:.3f}, loss {result['pruned_loss']:.4f} "
        f"pruned, {result['finetuned_loss']:.4f} fine-tuned"
    )


def _replace_masks(
    experiment: Experiment,
    cell: Cell,
    source: Source,
    masks: PyTree,
    start: PyTree,
    result: dict[str, Any],
) -> None:
    folder = experiment.workdir.cell(cell)
    dense_result = result_of(experiment.workdir.dense(cell.seed) / "result.json")
    params = masks_lib.apply(start, masks)
    loss = finite(experiment.validation_loss(params), cell.name)
    result |= prune_phase.described(experiment, masks, params, dense_result, loss)
    result["histogram"]["pruned"] = histograms.histogram(
        params, masks, result["histogram"]["edges"], kept_only=True
    )
    remove(folder / "masks")
    save(folder / "masks", masks, cell)
