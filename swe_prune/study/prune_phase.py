"""The phase that prunes: masks of every cell, and the loss of the pruned model as it is."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import ledger, parallel, recipe, tree
from swe_prune import masks as masks_lib
from swe_prune.errors import InputError
from swe_prune.models import phi3v
from swe_prune.recipe import Evidence
from swe_prune.runtime.locks import lock_for_run
from swe_prune.study import histograms, samples
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.saved import finite, load_dense, save, starting_values
from swe_prune.study.workdir import exists, result_of, results_of, write_result
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class DenseModel:
    """A dense model, and everything measured on it that its cells read.

    Attributes:
        state: Last state of the dense phase.
        start: Weights that the masks are applied to; see `config.PruneConfig.values_from`.
        evidence: Evidence for criteria, measured on the weights of `state`.
        block_evidence: Evidence for block-by-block methods, measured on `start`.
    """

    state: TrainState
    start: PyTree
    evidence: Evidence
    block_evidence: Evidence


def todo(experiment: Experiment, missing: str | None) -> list[tuple[int, list[Cell]]]:
    """Returns per seed the cells whose result lacks an entry; None: all that have been pruned."""
    found: dict[int, list[Cell]] = {}
    paths = [experiment.workdir.cell(cell) / "result.json" for cell in experiment.cells]
    for cell, result in zip(experiment.cells, results_of(paths), strict=True):
        if missing == "finetuned_loss" and result is None:
            raise InputError(f"cell {cell.name!r} is not pruned yet; run the command 'prune' first")
        if missing == "finetuned_loss" and cell.recovery.kind == "none":
            continue
        if (result is not None) if missing is None else (result is None or missing not in result):
            found.setdefault(cell.seed, []).append(cell)
    return sorted(found.items())


def load_and_measure(experiment: Experiment, seed: int, cells: list[Cell]) -> DenseModel:
    """Returns the dense model of a seed, with the calibration that these cells need."""
    with ledger.measure("calibrate", cell=f"seed_{seed}"):
        return _load_and_measure(experiment, seed, cells)


def _load_and_measure(experiment: Experiment, seed: int, cells: list[Cell]) -> DenseModel:
    state = load_dense(experiment, seed)
    start = starting_values(experiment, state)
    requests = [cell.recipe for cell in cells]

    def measure(methods: bool, params: PyTree) -> Evidence:
        return recipe.measure(
            [request for request in requests if (request.method is not None) == methods],
            experiment.model,
            params,
            experiment.calibration,
            loss=experiment.loss,
            prunable=experiment.prunable,
            stats=state.stats,
            opt_state=state.opt_state,
        )

    evidence = measure(False, state.params)
    if any("learned" in request.needs for request in requests):
        # Nothing is learned before the recovery, so its masks start from the magnitudes.
        learned = {"learned": jax.tree.map(jnp.abs, state.params)}
        evidence = dataclasses.replace(evidence, measured={**evidence.measured, **learned})
    return DenseModel(state, start, evidence, measure(True, start))


def pruned(experiment: Experiment, cell: Cell, dense: DenseModel) -> tuple[PyTree, PyTree]:
    """Returns the pruned parameters of a cell and the masks of every prunable tensor.

    Raises:
        InputError: Evidence or shapes that do not fit, by the name of the cell.
    """
    request = cell.recipe
    try:
        params, masks = recipe.prune(
            request,
            dense.state.params,
            dense.evidence if request.method is None else dense.block_evidence,
            values=dense.start,
            prunable=cell.chosen(experiment.prunable),
            layout=experiment.layout,
            model=experiment.model,
            blocks=phi3v.blocks(experiment.config.model),
            batches=experiment.calibration,
            loss=experiment.loss,
        )
    except InputError as error:
        raise InputError(f"cell {cell.name!r} of seed {cell.seed}: {error}") from error
    params = parallel.shard_like(params, experiment.abstract_params)
    return params, whole(experiment, masks)


def whole(experiment: Experiment, masks: PyTree) -> PyTree:
    """Returns masks of every prunable tensor, where its weight is.

    A pattern may leave tensors dense, as "neuron" does with attention, and a cell those that its
    rules do not include: they retain everything and count in the sparsity of the whole.
    """
    found = tree.map_leaves(
        lambda _, mask, chosen, weight: (
            jnp.ones(weight.shape, bool) if mask is None and chosen else mask
        ),
        masks,
        experiment.prunable,
        experiment.abstract_params,
    )
    return parallel.shard_like(found, experiment.abstract_params)


def prune_seed(experiment: Experiment, seed: int, cells: list[Cell], progress: Progress) -> None:
    """Prunes and evaluates cells of one seed, which share its calibration."""
    dense = load_and_measure(experiment, seed, cells)
    dense_result = result_of(experiment.workdir.dense(seed) / "result.json")
    with progress.phase(f"pruning, seed {seed}", len(cells)) as advance:
        for done, cell in enumerate(cells, start=1):
            folder = experiment.workdir.cell(cell)
            with lock_for_run(folder, f"cell {cell.name} of seed {seed}", progress.say):
                if not exists(folder / "result.json"):
                    with ledger.measure("prune", cell=f"seed_{seed}/{cell.name}"):
                        _prune_cell(experiment, cell, dense, dense_result)
            advance(done, {})


def _prune_cell(
    experiment: Experiment, cell: Cell, dense: DenseModel, dense_result: dict[str, Any]
) -> None:
    begun = time.perf_counter()
    folder = experiment.workdir.cell(cell)
    params, masks = pruned(experiment, cell, dense)
    loss = finite(experiment.validation_loss(params), cell.name)
    seconds = time.perf_counter() - begun
    # The weights that stay may have changed, so recovery starts from these.
    if cell.recipe.updates_weights:
        save(folder / "start", params, cell)
    save(folder / "masks", masks, cell)
    edges = histograms.histogram_edges(dense.state.params, masks)
    result = {
        **_asked(experiment, cell),
        "steps": experiment.tuning_steps(cell),
        "dense_loss": dense_result["dense_loss"],
        "dense_train_loss": dense_result.get("dense_train_loss", ""),
        "dense_mae": dense_result.get("dense_mae", ""),
        "seconds": seconds,
        **described(experiment, cell, masks, params, dense_result, loss),
        **samples.sampled(experiment, "pruned", params, dense.state.params),
        "histogram": {
            "edges": edges,
            "dense": histograms.histogram(dense.state.params, masks, edges, kept_only=False),
            "pruned": histograms.histogram(params, masks, edges, kept_only=True),
        },
    }
    write_result(folder / "result.json", result)


def _asked(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Returns what a result says of the request; see `results.Row`."""
    request = cell.recipe
    asked = {
        "seed": cell.seed,
        "criterion": request.criterion or "",
        "method": request.method or "",
        "options": request.option_text,
        "allocation": request.allocation or "",
        "scope": request.scope,
        "sparsity": "" if request.target is None else request.target,
        "rate": "" if request.rate is None else request.rate,
        "pattern": request.pattern or "",
        "restore": request.restore or "",
        "include": cell.include_text,
        "schedule": cell.schedule_text,
        "recovery": cell.recovery.label,
    }
    if request.reads_batches:
        settings = experiment.config.calibration
        asked["calibration"] = {"windows": settings.windows, "seed": settings.seed}
    return asked


def described(
    experiment: Experiment,
    cell: Cell,
    masks: PyTree,
    params: PyTree,
    dense_result: dict[str, Any],
    loss: float,
) -> dict[str, Any]:
    """Returns what a result says of masks and of the pruned, not yet recovered model."""
    tally = masks_lib.summary(masks)
    chosen = {name for name, mark in tree.named_leaves(cell.chosen(experiment.prunable)) if mark}
    total = sum(found.total for name, found in tally.tensors.items() if name in chosen)
    return {
        "sparsity_prunable": tally.pruned / total,
        "sparsity_total": tally.pruned / dense_result["params"],
        "nonzero_params": dense_result["params"] - tally.pruned,
        "pruned_loss": loss,
        "pruned_train_loss": experiment.training_loss(params),
        "tensors": {n: {"kept": t.kept, "total": t.total} for n, t in tally.tensors.items()},
        "sample_kept": jax.jit(histograms.sampled, out_shardings=experiment.everywhere)(masks),
    }
