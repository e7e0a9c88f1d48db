"""The phase that prunes: masks of every cell, and what the pruned model is worth as it is."""

import time
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import masks as masks_lib
from swe_prune.errors import InputError
from swe_prune.runtime.locks import lock_for_run
from swe_prune.study import histograms, samples, scoring
from swe_prune.study.calibration_text import calibrated
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.saved import finite, load_dense, save
from swe_prune.study.workdir import exists, result_of, results_of, write_result
from swe_prune.training.progress import Progress


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


def sources(experiment: Experiment, seed: int, cells: list[Cell]) -> scoring.Source:
    """Returns the dense model of a seed, with the calibration that these cells need."""
    return scoring.source(experiment, load_dense(experiment, seed), cells)


def prune_seed(experiment: Experiment, seed: int, cells: list[Cell], progress: Progress) -> None:
    """Prunes and evaluates cells of one seed, which share its calibration."""
    source = sources(experiment, seed, cells)
    dense_result = result_of(experiment.workdir.dense(seed) / "result.json")
    with progress.phase(f"pruning, seed {seed}", len(cells)) as advance:
        for done, cell in enumerate(cells, start=1):
            folder = experiment.workdir.cell(cell)
            with lock_for_run(folder, f"cell {cell.name} of seed {seed}", progress.say):
                if not exists(folder / "result.json"):
                    _prune_cell(experiment, cell, source, dense_result)
            advance(done, {})


def _prune_cell(
    experiment: Experiment, cell: Cell, source: scoring.Source, dense_result: dict[str, Any]
) -> None:
    begun = time.perf_counter()
    folder = experiment.workdir.cell(cell)
    dense = source.state
    try:
        if cell.blockwise is None:
            start, masks = source.start, scoring.cell_masks(source, cell)
        else:
            start, masks = scoring.pruned_blocks(source, cell)
    except InputError as error:
        raise InputError(f"cell {cell.name!r} of seed {cell.seed}: {error}") from error
    params = masks_lib.apply(start, masks)
    loss = finite(experiment.validation_loss(params), cell.name)
    seconds = time.perf_counter() - begun
    if cell.blockwise is not None:
        save(folder / "start", start, cell)
    save(folder / "masks", masks, cell)
    edges = histograms.histogram_edges(dense.params, masks)
    result = {
        "seed": cell.seed,
        "criterion": cell.criterion,
        "rule": cell.rule,
        "requested": cell.requested,
        "options": cell.option_text,
        "allocation": cell.allocation or "",
        "pattern": cell.pattern or "",
        "schedule": cell.schedule,
        "recovery": cell.recovery.label,
        "steps": experiment.tuning_steps(cell),
        "dense_loss": dense_result["dense_loss"],
        "dense_train_loss": dense_result.get("dense_train_loss", ""),
        "seconds": seconds,
        **(_calibration(experiment) if calibrated(cell) else {}),
        **described(experiment, masks, params, dense_result, loss),
        **samples.sampled(experiment, "pruned", params, dense.params),
        "histogram": {
            "edges": edges,
            "dense": histograms.histogram(dense.params, masks, edges, kept_only=False),
            "pruned": histograms.histogram(params, masks, edges, kept_only=True),
        },
    }
    write_result(folder / "result.json", result)


def described(
    experiment: Experiment,
    masks: PyTree,
    params: PyTree,
    dense_result: dict[str, Any],
    loss: float,
) -> dict[str, Any]:
    """Returns what a result says of masks and of the pruned, not yet recovered model."""
    tally = masks_lib.summary(masks)
    return {
        "sparsity_prunable": tally.sparsity,
        "sparsity_total": tally.pruned / dense_result["params"],
        "nonzero_params": dense_result["params"] - tally.pruned,
        "pruned_loss": loss,
        "pruned_train_loss": experiment.training_loss(params),
        "tensors": {n: {"kept": t.kept, "total": t.total} for n, t in tally.tensors.items()},
        "sample_kept": jax.jit(histograms.sampled, out_shardings=experiment.everywhere)(masks),
    }


def _calibration(experiment: Experiment) -> dict[str, Any]:
    settings = experiment.config.calibration
    return {"calibration": {"windows": settings.windows, "seed": settings.seed}}
