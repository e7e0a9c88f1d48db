"""From a dense model to the scores and masks of its cells."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import allocation, blockwise, calibration, importance, parallel, tree
from swe_prune.models import gpt
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.saved import starting_values
from swe_prune.training import step as step_lib
from swe_prune.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Source:
    """What the cells of one seed are scored by.

    Attributes:
        experiment: settings and model.
        state: the dense phase's last.
        measured: by need, on the calibration windows.
        start: the weights that block-after-block pruning begins with.
        dense_scores: of these, for allocations of blockwise cells; None where no cell needs them.
    """

    experiment: Experiment
    state: TrainState
    measured: dict[str, PyTree]
    start: PyTree
    dense_scores: PyTree | None


def source(experiment: Experiment, state: TrainState, cells: Sequence[Cell]) -> Source:
    """Returns a dense model with all the calibration that its cells need, measured once.

    Args:
        experiment: settings and model.
        state: the dense phase's last.
        cells: of its seed.
    """
    registered = [cell.criterion for cell in cells if cell.blockwise is None]
    measured = calibration.measure(
        {need for name in registered for need in importance.get(name).measured},
        experiment.model,
        {"params": state.params},
        experiment.calibration,
        loss=_loss(experiment),
        prunable=experiment.prunable,
    )
    start, dense_scores = starting_values(experiment, state), None
    if any(cell.blockwise is not None and _shared_by_scores(cell) for cell in cells):
        dense_scores = blockwise.dense_scores(
            experiment.model,
            {"params": start},
            experiment.calibration,
            prunable=experiment.prunable,
        )
    return Source(experiment, state, measured, start, dense_scores)


def _shared_by_scores(cell: Cell) -> bool:
    """Returns whether a cell has an allocation that reads scores."""
    return cell.allocation is not None and "scores" in allocation.get(cell.allocation).needs


def from_weights_alone(cell: Cell) -> bool:
    """Returns whether a cell can be scored anew while its model trains on."""
    needs = importance.get(cell.criterion).needs
    return not set(needs) - {"weight", "key", "inputs"}


def scores(source: Source, cell: Cell, params: PyTree | None = None) -> PyTree:
    """Returns the scores of a cell's criterion for the dense weights, or for others."""
    return step_lib.score_step(
        source.state.params if params is None else params,
        source.state.stats,
        source.experiment.prunable,
        criterion=cell.criterion,
        seed=cell.seed,
        opt_state=source.state.opt_state,
        measured=source.measured,
        options=dict(cell.options),
    )


def level(source: Source, cell: Cell, of: PyTree, sparsity: float, params: PyTree) -> Any:
    """Returns a sparsity, shared out over the tensors where the cell has an allocation.

    Args:
        source: of the cell.
        cell: what is pruned.
        of: the scores, None for rules that need none.
        sparsity: over all tensors.
        params: the weights to be pruned.
    """
    if cell.allocation is None:
        return sparsity
    return allocation.allocate(
        cell.allocation,
        sparsity,
        scores=of,
        params=params,
        loss=_loss(source.experiment),
        batches=source.experiment.calibration,
        prunable=source.experiment.prunable,
    )


def cell_masks(source: Source, cell: Cell) -> PyTree:
    """Returns the masks of a cell of a registered criterion, at once and from the dense model."""
    of = scores(source, cell)
    share = level(source, cell, of, cell.requested, source.state.params)
    return select(source, cell, of, share)


def select(source: Source, cell: Cell, of: PyTree, share: Any) -> PyTree:
    """Returns masks of every prunable tensor by a cell's scope and pattern.

    A pattern may leave tensors dense, as "neuron" does with attention: theirs keep everything, and
    count in the sparsity of the whole.
    """
    found = step_lib.select_step(
        of, criterion=cell.criterion, rule=cell.rule, level=share, pattern=cell.pattern
    )
    return _whole(source, found)


def pruned_blocks(source: Source, cell: Cell) -> tuple[PyTree, PyTree]:
    """Returns the parameters that block-after-block pruning leaves, and their masks.

    Args:
        source: of the cell.
        cell: with a blockwise method.
    """
    params = source.start
    share = level(source, cell, source.dense_scores, cell.requested, params)
    pruned, kept, _ = blockwise.prune_blocks(
        source.experiment.model,
        {"params": params},
        source.experiment.calibration,
        blocks=gpt.BLOCKS,
        sparsity=share,
        method=str(cell.blockwise),
        pattern=cell.pattern,
        prunable=source.experiment.prunable,
        **dict(cell.options),
    )
    pruned = parallel.shard_like(pruned, source.experiment.abstract_params)
    return pruned, _whole(source, kept)


def _whole(source: Source, found: PyTree) -> PyTree:
    whole = tree.map_leaves(
        lambda _, mask, chosen, weight: (
            jnp.ones_like(weight, bool) if mask is None and chosen else mask
        ),
        found,
        source.experiment.prunable,
        source.state.params,
    )
    return parallel.shard_like(whole, source.experiment.abstract_params)


def _loss(experiment: Experiment) -> Any:
    def loss(params: PyTree, batch: dict[str, Any]) -> Any:
        summed = step_lib.eval_step(params, batch, model=experiment.model)
        return summed / batch["targets"].size

    return loss
