"""What is done, phase by phase. Each leaves a result.json and is skipped when that is there."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import masks as masks_lib
from swe_prune import trajectory, tree
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import InputError, RunError
from swe_prune.experiment import artifacts, grid, results
from swe_prune.experiment.setup import Experiment
from swe_prune.experiment.workdir import read_json, remove
from swe_prune.training import loop
from swe_prune.training.metrics import write_json
from swe_prune.training.phase import Phase
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState
from swe_prune.training.step import prune_step

FINETUNE_DATA = 1 << 16  # added to the seed, so that fine-tuning sees the text in another order


def run(experiment: Experiment, progress: Progress) -> None:
    """Runs every phase, seed by seed; all cells of a seed are pruned before one is fine-tuned."""
    train(experiment, progress)
    prune(experiment, progress)
    control(experiment, progress)
    finetune(experiment, progress)


def train(experiment: Experiment, progress: Progress) -> None:
    """Trains the dense model of every seed while tracking its weights."""
    for seed in grid.seeds(experiment.config):
        folder = experiment.workdir.dense(seed)
        if (folder / "result.json").exists():
            progress.say(f"dense model, seed {seed}: done before")
            continue
        phase = experiment.phase(
            f"dense, seed {seed}", folder, experiment.config.train, experiment.train_steps
        )
        state, seconds = _fit(
            experiment,
            progress,
            phase,
            experiment.fresh_state(seed),
            experiment.train_step,
            data_seed=seed,
            sample=artifacts.sampler(experiment.prunable),
        )
        loss = _finite(experiment.validation_loss(state.params), phase.name)
        result = {
            "dense_loss": loss,
            "seconds": seconds,
            "steps": phase.steps,
            "params": _size(state.params),
            "prunable": experiment.prunable_weights(),
        }
        write_json(folder / "result.json", result)
        progress.say(f"dense model, seed {seed}: validation loss {loss:.4f} nats per token")


def control(experiment: Experiment, progress: Progress) -> None:
    """Trains the dense model of every seed on, as long and by the schedule of fine-tuning."""
    for seed in grid.seeds(experiment.config):
        folder = experiment.workdir.control(seed)
        if (folder / "result.json").exists():
            continue
        state = experiment.finetune_state(load_dense(experiment, seed).params, seed, None)
        name = f"control, seed {seed}"
        state, seconds = _tune(experiment, progress, name, folder, state, seed)
        loss = _finite(experiment.validation_loss(state.params), name)
        write_json(folder / "result.json", {"control_loss": loss, "seconds": seconds})
        remove(folder / "checkpoints")
        progress.say(f"control, seed {seed}: validation loss {loss:.4f} nats per token")
    results.write(experiment.workdir, grid.cells(experiment.config))


def prune(experiment: Experiment, progress: Progress) -> None:
    """Scores and prunes every cell from its dense checkpoint, and evaluates it as it is."""
    for seed, cells in _todo(experiment, "pruned_loss"):
        dense = load_dense(experiment, seed)
        dense_result = read_json(experiment.workdir.dense(seed) / "result.json")
        with progress.phase(f"pruning, seed {seed}", len(cells)) as advance:
            for done, cell in enumerate(cells, start=1):
                _prune_cell(experiment, cell, dense, dense_result)
                advance(done, {})
        results.write(experiment.workdir, grid.cells(experiment.config))


def _prune_cell(
    experiment: Experiment, cell: grid.Cell, dense: TrainState, dense_result: dict[str, Any]
) -> None:
    begun = time.perf_counter()
    try:
        masks = prune_step(
            dense.params,
            dense.stats,
            experiment.prunable,
            criterion=cell.criterion,
            rule=cell.rule,
            level=cell.requested,
            seed=cell.seed,
            opt_state=dense.opt_state,
            options=dict(cell.options),
            pattern=cell.pattern,
        )
    except InputError as error:
        raise InputError(f"cell {cell.name!r} of seed {cell.seed}: {error}") from error
    params = masks_lib.apply(starting_values(experiment, dense), masks)
    loss = _finite(experiment.validation_loss(params), cell.name)
    seconds = time.perf_counter() - begun
    tally = masks_lib.summary(masks)
    edges = artifacts.histogram_edges(dense.params, masks)
    folder = experiment.workdir.cell(cell)
    with contextlib.closing(Checkpoints(folder / "masks", keep=1)) as store:
        store.save(0, masks, {"cell": cell.name})
    result = {
        "seed": cell.seed,
        "criterion": cell.criterion,
        "rule": cell.rule,
        "requested": cell.requested,
        "sparsity_prunable": tally.sparsity,
        "sparsity_total": tally.pruned / dense_result["params"],
        "nonzero_params": dense_result["params"] - tally.pruned,
        "dense_loss": dense_result["dense_loss"],
        "pruned_loss": loss,
        "steps": experiment.finetune_steps,
        "seconds": seconds,
        "tensors": {n: {"kept": t.kept, "total": t.total} for n, t in tally.tensors.items()},
        "histogram": {
            "edges": edges,
            "dense": artifacts.histogram(dense.params, masks, edges, kept_only=False),
            "pruned": artifacts.histogram(params, masks, edges, kept_only=True),
        },
        "sample_kept": artifacts.sampled(masks),
    }
    write_json(folder / "result.json", result)


def finetune(experiment: Experiment, progress: Progress) -> None:
    """Fine-tunes every pruned cell with its mask fixed, and evaluates it."""
    todo = _todo(experiment, "finetuned_loss")
    count, total = 0, sum(len(cells) for _, cells in todo)
    for seed, cells in todo:
        dense = load_dense(experiment, seed)
        for cell in cells:
            count += 1
            _finetune_cell(experiment, cell, dense, progress, f"cell {count}/{total} {cell.name}")
            results.write(experiment.workdir, grid.cells(experiment.config))


def _finetune_cell(
    experiment: Experiment, cell: grid.Cell, dense: TrainState, progress: Progress, name: str
) -> None:
    folder = experiment.workdir.cell(cell)
    result = read_json(folder / "result.json")
    start = starting_values(experiment, dense)
    state = experiment.finetune_state(start, cell.seed, load_masks(experiment, cell))
    state, seconds = _tune(experiment, progress, name, folder, state, cell.seed)
    masks = state.masks  # those given to the step were donated
    revived = int(_revived(state.params, masks))
    if revived:
        raise RunError(f"{revived} pruned weights of {cell.name!r} are not 0 after fine-tuning")
    result["finetuned_loss"] = _finite(experiment.validation_loss(state.params), name)
    result["seconds"] += seconds
    edges = result["histogram"]["edges"]
    result["histogram"]["finetuned"] = artifacts.histogram(
        state.params, masks, edges, kept_only=True
    )
    if experiment.config.keep_finetuned:
        with contextlib.closing(Checkpoints(folder / "finetuned", keep=1)) as store:
            store.save(experiment.finetune_steps, state.params, {"cell": cell.name})
    write_json(folder / "result.json", result)
    remove(folder / "checkpoints")
    progress.say(
        f"{name}: sparsity {result['sparsity_prunable']:.3f}, loss {result['pruned_loss']:.4f} "
        f"pruned, {result['finetuned_loss']:.4f} fine-tuned"
    )


def evaluate(experiment: Experiment, progress: Progress) -> list[dict[str, Any]]:
    """Returns the losses computed again from what is on disk, beside the recorded ones.

    Dense and pruned models are rebuilt from the dense checkpoint and the masks, fine-tuned ones
    from their parameters where `keep_finetuned` kept them.
    """
    compared = []
    for seed, cells in _todo(experiment, None):
        dense = load_dense(experiment, seed)
        recorded = read_json(experiment.workdir.dense(seed) / "result.json")["dense_loss"]
        computed = experiment.validation_loss(dense.params)
        compared.append({"model": f"seed {seed} dense", "recorded": recorded, "computed": computed})
        start = starting_values(experiment, dense)
        with progress.phase(f"evaluating, seed {seed}", len(cells)) as advance:
            for done, cell in enumerate(cells, start=1):
                result = read_json(experiment.workdir.cell(cell) / "result.json")
                name = f"seed {seed} {cell.name}"
                params = masks_lib.apply(start, load_masks(experiment, cell))
                row = {"model": f"{name} pruned", "recorded": result["pruned_loss"]}
                compared.append(row | {"computed": experiment.validation_loss(params)})
                kept = experiment.workdir.cell(cell) / "finetuned"
                if kept.exists() and "finetuned_loss" in result:
                    params, _ = _restore(kept, experiment.abstract_params)
                    row = {"model": f"{name} fine-tuned", "recorded": result["finetuned_loss"]}
                    compared.append(row | {"computed": experiment.validation_loss(params)})
                advance(done, {})
    return compared


def load_dense(experiment: Experiment, seed: int) -> TrainState:
    """Returns the dense phase's final state.

    Raises:
        InputError: that phase has not finished.
    """
    folder = experiment.workdir.dense(seed)
    if not (folder / "result.json").exists():
        raise InputError(
            f"the dense model of seed {seed} is not trained yet; run the command 'train' first"
        )
    like = jax.eval_shape(lambda p: experiment.dense_state(p, seed), experiment.abstract_params)
    return _restore(folder / "checkpoints", like)[0]


def load_masks(experiment: Experiment, cell: grid.Cell) -> PyTree:
    """Returns the masks of a pruned cell."""
    like = tree.map_named(
        lambda _, leaf, chosen: jax.ShapeDtypeStruct(leaf.shape, jnp.bool_) if chosen else None,
        experiment.abstract_params,
        experiment.prunable,
    )
    return _restore(experiment.workdir.cell(cell) / "masks", like)[0]


def starting_values(experiment: Experiment, dense: TrainState) -> PyTree:
    """Returns the weights that go on after pruning: the final ones, or the late mean."""
    if experiment.config.prune.values_from == "final":
        return dense.params
    assert dense.stats is not None
    late_mean = trajectory.read(dense.stats, "late_mean")
    return tree.map_leaves(
        lambda _, mean, weight: weight if mean is None else mean.astype(weight.dtype),
        late_mean,
        dense.params,
    )


def _tune(
    experiment: Experiment, progress: Progress, name: str, folder: Any, state: Any, seed: int
) -> tuple[TrainState, float]:
    phase = experiment.phase(name, folder, experiment.config.finetune, experiment.finetune_steps)
    step = experiment.finetune_step
    return _fit(experiment, progress, phase, state, step, data_seed=seed + FINETUNE_DATA)


def _fit(
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
            checkpoints = stack.enter_context(
                contextlib.closing(Checkpoints(phase.folder / "checkpoints"))
            )
        advance = stack.enter_context(progress.phase(phase.name, phase.steps))
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


def _todo(experiment: Experiment, missing: str | None) -> list[tuple[int, list[grid.Cell]]]:
    """Returns per seed the cells whose result lacks an entry; None: all that have been pruned."""
    todo: dict[int, list[grid.Cell]] = {}
    for cell in grid.cells(experiment.config):
        path = experiment.workdir.cell(cell) / "result.json"
        result = read_json(path) if path.exists() else None
        if missing == "finetuned_loss" and result is None:
            raise InputError(f"cell {cell.name!r} is not pruned yet; run the command 'prune' first")
        if (result is not None) if missing is None else (result is None or missing not in result):
            todo.setdefault(cell.seed, []).append(cell)
    return sorted(todo.items())


def _restore(folder: Any, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    with contextlib.closing(Checkpoints(folder)) as store:
        return store.restore(like)


def _finite(loss: float, name: str) -> float:
    if not math.isfinite(loss):
        raise RunError(
            f"the validation loss of {name!r} is {loss}; lower the learning rate or the sparsity; "
            "what was finished before is kept"
        )
    return loss


def _size(params: PyTree) -> int:
    return sum(map(tree.size, jax.tree.leaves(params)))


@jax.jit
def _revived(params: PyTree, masks: PyTree) -> Any:
    revived = tree.map_tracked(lambda mask, weight: ~mask & (weight != 0), masks, params)
    return tree.count_true(jax.tree.leaves(revived))
