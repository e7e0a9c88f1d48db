"""Pruning that goes on during the recovery: masks renewed between two steps of training."""

import dataclasses
from collections.abc import Callable
from typing import Any

from swe_prune import masks as masks_lib
from swe_prune import schedules, tree
from swe_prune.sparse_training.ranking import among
from swe_prune.study import scoring
from swe_prune.study.grid import Cell
from swe_prune.training.state import TrainState


def pruning_step(
    step: Callable[..., Any],
    plan: schedules.Schedule,
    renew: Callable[[TrainState, float], TrainState],
) -> Callable[..., Any]:
    """Returns a train step that first renews the masks when that is due.

    Only the first call waits for the device, to learn at which step a resumed phase goes on.

    Args:
        step: the compiled train step.
        plan: when, and to what sparsity.
        renew: from a state and a sparsity to the state with other masks.
    """
    number: int | None = None

    def counted(state: TrainState, batch: Any) -> Any:
        nonlocal number
        number = int(state.step) if number is None else number
        if plan.is_due(number) and plan.sparsity(number) > 0:
            state = renew(state, float(plan.sparsity(number)))
        number += 1
        return step(state, batch)

    return counted


def renewal(source: scoring.Source, cell: Cell) -> Callable[[TrainState, float], TrainState]:
    """Returns the function that prunes a training state further, to a sparsity.

    A criterion that needs the weights alone scores the current ones; every other keeps the scores
    it gave the dense model, whose trajectory, moments or calibration it has read. What is pruned
    stays so, unless an allocation gives its tensor more weights than before.
    """
    fixed = None if scoring.from_weights_alone(cell) else scoring.scores(source, cell)

    def renew(state: TrainState, sparsity: float) -> TrainState:
        of = scoring.scores(source, cell, state.params) if fixed is None else fixed
        share = scoring.level(source, cell, of, sparsity, state.params)
        last = tree.map_named(lambda name, s, keep: among(s, keep, name), of, state.masks)
        masks = scoring.select(source, cell, last, share)
        params = masks_lib.apply(state.params, masks)
        return dataclasses.replace(state, params=params, masks=masks)

    return renew
