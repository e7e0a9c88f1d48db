"""The phase that recovers: training on with masks held, or while pruning goes on."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from swe_prune import masks as masks_lib
from swe_prune import recipe, schedules, sparse_training, tree
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import RunError
from swe_prune.runtime.preemption import NOTICE
from swe_prune.sparse_training.ranking import among
from swe_prune.study import histograms, prune_phase, samples
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.prune_phase import DenseModel
from swe_prune.study.recovery import Tuning, check_long_enough
from swe_prune.study.saved import finite, load_masks, save, starting_values
from swe_prune.study.workdir import remove, result_of, write_result
from swe_prune.training import loop
from swe_prune.training.phase import Phase
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState

FINETUNE_SEED_OFFSET = 1 << 16  # added to the seed, so that fine-tuning sees another text order
RAMP = 0.6  # share of the recovery in which pruning goes on; the rest has fixed masks
UPDATES = 10  # largest number of mask updates on a cubic ramp
ROUNDS = 5  # largest number of rounds of iterative pruning

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
    tuning = experiment.tunings[cell.recovery]
    start = starting_values(experiment, dense.state, cell)
    step = None
    if cell.gradual:
        masks = sparse_training.all_kept(start, experiment.prunable)
        plan, update = schedule(cell, tuning.steps), mask_updater(experiment, cell, dense)
        step = pruning_step(tuning.step, plan, update)
    else:
        masks = load_masks(experiment, cell)
    state = experiment.tuning_state(tuning, start, cell.seed, masks)
    state, seconds = recover(experiment, progress, tuning, name, folder, state, cell.seed, step)
    masks = state.masks  # those given to the step were donated
    revived = int(_revived(state.params, masks))
    if revived:
        raise RunError(f"{revived} pruned weights of {cell.name!r} are not 0 after fine-tuning")
    if cell.gradual:
        _replace_masks(experiment, cell, dense, masks, start, result)
    result["finetuned_loss"] = finite(experiment.validation_loss(state.params), name)
    result["finetuned_train_loss"] = experiment.training_loss(state.params)
    result["seconds"] += seconds
    result |= samples.sampled(experiment, "finetuned", state.params, dense.state.params)
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
    dense: DenseModel,
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


def recover(
    experiment: Experiment,
    progress: Progress,
    tuning: Tuning,
    name: str,
    folder: epath.Path,
    state: TrainState,
    seed: int,
    step: Callable[..., Any] | None = None,
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
    """
    phase = experiment.phase(name, folder, tuning.settings, tuning.steps)
    data_seed = seed + FINETUNE_SEED_OFFSET
    return fit(experiment, progress, phase, state, step or tuning.step, data_seed=data_seed)


def fit(
    experiment: Experiment,
    progress: Progress,
    phase: Phase,
    state: TrainState,
    step: Callable[..., Any],
    *,
    data_seed: int,
    sample: Callable[[PyTree], dict[str, Any]] | None = None,
) -> tuple[TrainState, float]:
    """Returns the state after a phase and its seconds, resuming from its own checkpoints."""
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if phase.checkpoint_every:
            folder = phase.folder / "checkpoints"
            store = Checkpoints(folder, phase.keep_latest, phase.keep_every)
            checkpoints = stack.enter_context(contextlib.closing(store))
        advance = stack.enter_context(progress.phase(phase.name, phase.steps))
        stack.enter_context(NOTICE.deferred())
        return loop.fit(
            phase,
            state,
            step,
            experiment.batches(data_seed),
            checkpoints=checkpoints,
            evaluate=experiment.validation_loss,
            sample=sample,
            progress=advance,
        )


def schedule(cell: Cell, steps: int) -> schedules.Schedule:
    """Returns the schedule of a gradual cell within the steps of its recovery.

    Cubic: from nothing at step 0 to the sparsity at 60 % of the recovery, in ten updates.
    Iterative: five rounds in the same time, the first at step 0, each removing the same share of
    what is left. Shorter recoveries have fewer updates.

    Raises:
        InputError: The recovery has fewer than two steps.
    """
    check_long_enough(cell.schedule, steps)
    target = cell.recipe.target
    assert target is not None
    end = max(1, min(steps - 1, round(RAMP * steps)))
    if cell.schedule == "cubic":
        return schedules.Cubic(target, begin=0, end=end, every=-(-end // UPDATES))
    every = max(1, end // (ROUNDS - 1))
    return schedules.Iterative(target, rounds=min(ROUNDS, 1 + end // every), every=every)


def pruning_step(
    step: Callable[..., Any],
    plan: schedules.Schedule,
    update: Callable[[TrainState, float], TrainState],
) -> Callable[..., Any]:
    """Returns a train step that first updates the masks when that is due.

    Only the first call waits for the device, to learn at which step a resumed phase goes on.

    Args:
        step: Compiled train step.
        plan: Steps at which to prune, and the sparsity at each.
        update: Function from a state and a sparsity to the state with new masks.
    """
    number: int | None = None

    def counted(state: TrainState, batch: Any) -> Any:
        nonlocal number
        number = int(state.step) if number is None else number
        if plan.is_due(number) and plan.sparsity(number) > 0:
            state = update(state, float(plan.sparsity(number)))
        number += 1
        return step(state, batch)

    return counted


def mask_updater(
    experiment: Experiment, cell: Cell, dense: DenseModel
) -> Callable[[TrainState, float], TrainState]:
    """Returns the function that prunes a training state further, to a sparsity.

    A criterion that reads the weights alone scores the current ones; every other keeps the scores
    of the dense model, whose trajectory, moments or calibration it has read. What is pruned stays
    pruned, unless an allocation gives its tensor more weights than before.
    """

    def score(params: PyTree) -> PyTree:
        return recipe.score(cell.recipe, params, dense.evidence, experiment.prunable)

    fixed = None if cell.recipe.scores_follow_weights else score(dense.state.params)

    def update(state: TrainState, sparsity: float) -> TrainState:
        scores = score(state.params) if fixed is None else fixed
        request = dataclasses.replace(cell.recipe, sparsity=sparsity)
        amount = recipe.allocate(
            request,
            scores,
            params=state.params,
            loss=experiment.loss,
            batches=experiment.calibration,
            prunable=experiment.prunable,
        )
        # Among the weights that are left, so that none comes back.
        left = tree.map_named(lambda name, s, keep: among(s, keep, name), scores, state.masks)
        masks = prune_phase.whole(experiment, recipe.select(request, left, amount))
        params = masks_lib.apply(state.params, masks)
        return dataclasses.replace(state, params=params, masks=masks)

    return update
