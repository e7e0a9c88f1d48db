"""What is done, phase by phase. Each leaves a result.json and is skipped when that is there."""

import math
from typing import Any

from jaxtyping import PyTree

from swe_prune import ledger, resumable, tree
from swe_prune import masks as masks_lib
from swe_prune.errors import InputError
from swe_prune.runtime.locks import lock_for_run
from swe_prune.study import (
    finetune_phase,
    grid,
    histograms,
    prune_phase,
    results,
    samples,
)
from swe_prune.study.cuts import cuts
from swe_prune.study.experiment import Experiment
from swe_prune.study.finetune_phase import recover
from swe_prune.study.mend import mend_cells, mend_dense
from swe_prune.study.saved import (
    finite,
    load_dense,
    load_finetuned,
    load_masks,
    recovery_start,
    starting_values,
)
from swe_prune.study.workdir import exists, remove, result_of, write_result
from swe_prune.training.progress import Progress


def run(experiment: Experiment, progress: Progress) -> None:
    """Runs every phase, seed by seed; all cells of a seed are pruned before one is fine-tuned."""
    train(experiment, progress)
    prune(experiment, progress)
    control(experiment, progress)
    finetune(experiment, progress)
    cuts(experiment, progress)


def mend(experiment: Experiment, progress: Progress) -> None:
    """Clears what was damaged after it had finished, and makes the dense models of it again."""
    for seed in experiment.seeds:
        folder = experiment.workdir.dense(seed)
        with lock_for_run(folder, f"dense model of seed {seed}", progress.say):
            if not exists(folder / "result.json"):
                continue
            mend_dense(experiment, seed, progress)
            if not exists(folder / "result.json"):
                _train_seed(experiment, seed, progress)
    mend_cells(experiment, progress)


def train(experiment: Experiment, progress: Progress) -> None:
    """Trains the dense model of every seed while tracking its weights."""
    for seed in experiment.seeds:
        folder = experiment.workdir.dense(seed)
        with lock_for_run(folder, f"dense model of seed {seed}", progress.say):
            mend_dense(experiment, seed, progress)
            if exists(folder / "result.json"):
                progress.say(f"dense model, seed {seed}: done before")
            else:
                with ledger.measure("train", cell=f"seed_{seed}") as entry:
                    _train_seed(experiment, seed, progress)
                    entry.tokens = experiment.tokens(experiment.train_steps)


def _train_seed(experiment: Experiment, seed: int, progress: Progress) -> None:
    folder = experiment.workdir.dense(seed)
    phase = experiment.phase(
        f"dense, seed {seed}", folder, experiment.config.train, experiment.train_steps
    )
    start = experiment.fresh_state(seed)
    result: dict[str, Any] = {}
    if experiment.checkpoint is not None:
        result["pretrained_loss"] = _pretrained_loss(experiment, start.params)
        progress.say(f"pretrained: validation loss {result['pretrained_loss']:.4f} nats per token")
    state, seconds = resumable.fit(
        phase,
        start,
        experiment.dense_step(),
        experiment.batches(seed),
        progress,
        evaluate=experiment.validation_loss,
        sample=histograms.sampler(experiment.prunable, experiment.everywhere),
    )
    loss = finite(experiment.validation_loss(state.params), phase.name)
    result |= {
        "dense_loss": loss,
        "dense_train_loss": experiment.training_loss(state.params),
        "seconds": seconds,
        "steps": phase.steps,
        "params": tree.size(state.params),
        "prunable": experiment.prunable_weights(),
        **samples.sampled(experiment, "dense", state.params),
    }
    write_result(folder / "result.json", result)
    progress.say(f"dense model, seed {seed}: validation loss {loss:.4f} nats per token")


def _pretrained_loss(experiment: Experiment, params: PyTree) -> float:
    """Returns the loss of the checkpoint as it came, in nats per token on the validation windows.

    Args:
        experiment: Experiment that starts from a checkpoint.
        params: Weights of the checkpoint.

    Raises:
        InputError: It is no better than guessing, so nothing pruned from it could be judged.
    """
    assert experiment.checkpoint is not None
    guess = math.log(experiment.checkpoint.vocab_size)
    loss = experiment.validation_loss(params)
    if not loss < guess:
        raise InputError(
            f"config.model.pretrained = {experiment.config.model.pretrained!r} has a loss of "
            f"{loss:.4g} nats per token on the validation text, and guessing among its symbols has "
            f"{guess:.4g}; use a text of its language, or look whether its weights are whole"
        )
    return loss


def control(experiment: Experiment, progress: Progress) -> None:
    """Trains the dense model of every seed on, as long and by the schedule of each recovery."""
    wanted = dict.fromkeys(
        (cell.seed, cell.recovery) for cell in experiment.cells if cell.recovery.kind != "none"
    )
    for seed, recovery in sorted(wanted, key=lambda pair: pair[0]):
        folder = experiment.workdir.control(seed, recovery)
        name = f"{folder.name}, seed {seed}"
        with lock_for_run(folder, name, progress.say):
            if not exists(folder / "result.json"):
                with ledger.measure("control", cell=f"seed_{seed}/{folder.name}") as entry:
                    _control(experiment, seed, recovery, name, progress)
                    entry.tokens = experiment.tokens(experiment.tunings[recovery].steps)
    results.write(experiment.workdir, grid.cells(experiment.config))


def _control(
    experiment: Experiment, seed: int, recovery: grid.Recovery, name: str, progress: Progress
) -> None:
    folder = experiment.workdir.control(seed, recovery)
    tuning = experiment.tunings[recovery]
    start = recovery_start(experiment, seed, recovery, load_dense(experiment, seed).params)
    state = experiment.tuning_state(tuning, start, seed, None)
    state, seconds = recover(experiment, progress, tuning, name, folder, state, seed)
    loss = finite(experiment.validation_loss(state.params), name)
    result = {
        "control_loss": loss,
        "control_train_loss": experiment.training_loss(state.params),
        "seconds": seconds,
        **samples.sampled(experiment, "control", state.params),
    }
    write_result(folder / "result.json", result)
    remove(folder / "checkpoints")
    progress.say(f"{name}: validation loss {loss:.4f} nats per token")


def prune(experiment: Experiment, progress: Progress) -> None:
    """Scores and prunes every cell from its dense checkpoint, and evaluates it as it is."""
    mend(experiment, progress)
    for seed, cells in prune_phase.todo(experiment, "pruned_loss"):
        prune_phase.prune_seed(experiment, seed, cells, progress)
        results.write(experiment.workdir, grid.cells(experiment.config))


def finetune(experiment: Experiment, progress: Progress) -> None:
    """Trains every pruned cell with its masks held, or pruned further, and evaluates it."""
    todo = prune_phase.todo(experiment, "finetuned_loss")
    count, total = 0, sum(len(cells) for _, cells in todo)
    for seed, cells in todo:
        gradual = [cell for cell in cells if cell.gradual]
        dense = prune_phase.load_and_measure(experiment, seed, gradual)
        for cell in cells:
            count += 1
            name = f"cell {count}/{total} {cell.name}"
            with lock_for_run(experiment.workdir.cell(cell), name, progress.say):
                finetune_phase.finetune_cell(experiment, cell, dense, progress, name)
            results.write(experiment.workdir, grid.cells(experiment.config))


def evaluate(experiment: Experiment, progress: Progress) -> list[dict[str, Any]]:
    """Returns the losses computed again from what is on disk, beside the recorded ones.

    Dense and pruned models are rebuilt from the dense checkpoint and the masks, fine-tuned ones
    from their parameters where `keep_finetuned` kept them.
    """
    compared = []
    for seed, cells in prune_phase.todo(experiment, None):
        dense = load_dense(experiment, seed)
        result = result_of(experiment.workdir.dense(seed) / "result.json")
        recorded = result["dense_loss"]
        computed = experiment.validation_loss(dense.params)
        compared.append({"model": f"seed {seed} dense", "recorded": recorded, "computed": computed})
        with progress.phase(f"evaluating, seed {seed}", len(cells)) as advance:
            for done, cell in enumerate(cells, start=1):
                result = result_of(experiment.workdir.cell(cell) / "result.json")
                name = f"seed {seed} {cell.name}"
                start = starting_values(experiment, dense, cell)
                params = masks_lib.apply(start, load_masks(experiment, cell))
                row = {"model": f"{name} pruned", "recorded": result["pruned_loss"]}
                compared.append(row | {"computed": experiment.validation_loss(params)})
                params = load_finetuned(experiment, cell)
                if params is not None and "finetuned_loss" in result:
                    row = {"model": f"{name} fine-tuned", "recorded": result["finetuned_loss"]}
                    compared.append(row | {"computed": experiment.validation_loss(params)})
                advance(done, {})
    return compared
