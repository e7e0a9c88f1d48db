"""Cells that prune while they recover: what each schedule trains, and when it changes the masks.

cubic, iterative   the sparsity rises; the weights with the lowest scores are removed
rigl, set          the sparsity is constant; weak weights are exchanged for new ones
ste                dense weights are trained through masks of their magnitude
movement           scores are trained next to the weights, and pick the masks
elsa               dense weights are drawn towards sparse ones, and pruned at the end
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from swe_prune import masks as masks_lib
from swe_prune import parallel, recipe, schedules, sparse_training
from swe_prune.sparse_training import movement
from swe_prune.study import prune_phase
from swe_prune.study.experiment import Experiment
from swe_prune.study.grid import Cell
from swe_prune.study.prune_phase import DenseModel
from swe_prune.study.recovery import Tuning, check_long_enough
from swe_prune.training import state as state_lib
from swe_prune.training.state import TrainState

_rigl = jax.jit(sparse_training.rigl_update)
_set = jax.jit(sparse_training.set_update)


@dataclasses.dataclass(frozen=True)
class Regime:
    """A recovery that prunes.

    Attributes:
        state: State at step 0.
        step: Train step of (state, batch), which also changes the masks.
        weights: Function from the trained parameters and a step to the weights that the model
            computes with.
        finish: Function from the last state to the pruned weights and their masks.
    """

    state: TrainState
    step: Callable[..., Any]
    weights: Callable[[PyTree, Any], PyTree]
    finish: Callable[[TrainState], tuple[PyTree, PyTree]]


def regime(experiment: Experiment, cell: Cell, dense: DenseModel, start: PyTree) -> Regime:
    """Returns how a gradual cell is trained and pruned at once.

    Args:
        experiment: Settings, model and data.
        cell: Cell whose schedule is not "one_shot".
        dense: Dense model and what was measured on it.
        start: Weights to start from.
    """
    tuning = experiment.tunings[cell.recovery]
    if cell.schedule == "ste":
        return _straight_through(experiment, cell, tuning, start)
    if cell.schedule == "movement":
        return _movement(experiment, cell, tuning, start)
    if cell.schedule == "elsa":
        return _elsa(experiment, cell, tuning, start)
    # In the others the state holds the masks, and the recovery's own step holds the zeros.
    if cell.schedule in ("rigl", "set"):
        _, masks = prune_phase.pruned(experiment, cell, dense)
        update = _exchange(experiment, cell, tuning.steps)
    else:
        masks = sparse_training.all_kept(start, experiment.prunable)
        update = _further(experiment, cell, dense, ramp(cell, tuning.steps))
    return Regime(
        state=experiment.tuning_state(tuning, start, cell.seed, masks),
        step=updating_step(tuning.step, update),
        weights=lambda params, step: params,
        finish=lambda state: (state.params, state.masks),
    )


Update = Callable[[int, TrainState, Any], TrainState]
"""(step, state, batch) -> the state with new masks, or the same one when none are due."""


def updating_step(step: Callable[..., Any], update: Update) -> Callable[..., Any]:
    """Returns a train step that first updates the masks when that is due.

    Only the first call waits for the device, to learn at which step a resumed phase goes on.

    Args:
        step: Compiled train step.
        update: Change of the masks before a step.
    """
    number: int | None = None

    def counted(state: TrainState, batch: Any) -> Any:
        nonlocal number
        number = int(state.step) if number is None else number
        state = update(number, state, batch)
        number += 1
        return step(state, batch)

    return counted


def ramp(cell: Cell, steps: int) -> schedules.Schedule:
    """Returns the schedule by which the sparsity of a cell rises within the steps of its recovery.

    Cubic: from nothing at step 0 to the sparsity at the end of the ramp, in `updates` updates.
    Iterative: `rounds` rounds in the same time, the first at step 0, each removing the same share
    of what is left. Shorter recoveries have fewer updates.

    Raises:
        InputError: The recovery has fewer than two steps.
    """
    check_long_enough(cell.schedule, steps)
    target, options = cell.sparsity, cell.schedule_options
    end = max(1, min(steps - 1, round(options.ramp_end * steps)))
    if cell.schedule == "iterative":
        every = max(1, end // max(1, options.rounds - 1))
        rounds = min(options.rounds, 1 + end // every)
        return schedules.Iterative(target, rounds=rounds, every=every)
    return schedules.Cubic(target, begin=0, end=end, every=-(-end // options.updates))


def _further(
    experiment: Experiment, cell: Cell, dense: DenseModel, plan: schedules.Schedule
) -> Update:
    """Returns the update that prunes further.

    A criterion that reads the weights alone scores the current ones; every other keeps the scores
    of the dense model, whose trajectory, moments or calibration it has read. What is pruned stays
    pruned, unless an allocation gives its tensor more weights than before.
    """
    request = dataclasses.replace(cell.recipe, zeros="free")  # the masks say what stays pruned

    def score(params: PyTree) -> PyTree:
        return recipe.score(request, params, dense.evidence, experiment.prunable, experiment.layout)

    fixed = None if request.scores_follow_weights else score(dense.state.params)

    def allocate(scores: PyTree, sparsity: float, params: PyTree) -> Any:
        return recipe.allocate(
            dataclasses.replace(request, sparsity=sparsity),
            scores,
            params=params,
            loss=experiment.loss,
            batches=experiment.calibration,
            prunable=experiment.prunable,
            layout=experiment.layout,
        )

    prune = sparse_training.prune_on_schedule(
        plan,
        lambda params: score(params) if fixed is None else fixed,
        scope=request.scope,
        pattern=request.pattern,
        layout=experiment.layout,
        allocate=None if request.allocation is None else allocate,
    )

    def update(number: int, state: TrainState, batch: Any) -> TrainState:
        if not plan.is_due(number) or plan.sparsity(number) == 0:
            return state
        masks = prune(number, state.masks, state.params)
        masks = parallel.shard_like(masks, experiment.abstract_params)
        params = masks_lib.apply(state.params, masks)
        return dataclasses.replace(state, params=params, masks=masks)

    return update


def _exchange(experiment: Experiment, cell: Cell, steps: int) -> Update:
    """Returns the update of RigL, which grows where the gradient is large, or of SET, at random."""
    check_long_enough(cell.schedule, steps)
    options = cell.schedule_options
    end = max(1, round(options.exchange_end * steps))
    plan = schedules.Constant(cell.sparsity, begin=0, end=end, every=-(-end // options.updates))
    key = jax.random.key(cell.seed)

    def update(number: int, state: TrainState, batch: Any) -> TrainState:
        fraction = schedules.cosine_drop_fraction(number, options.drop_fraction, end)
        # At step 0 the masks are new and the moments empty, so there is nothing to exchange by.
        if number == 0 or not plan.is_due(number) or fraction == 0:
            return state
        given = (state.params, state.masks, state.opt_state, jnp.float32(fraction))
        if cell.schedule == "rigl":
            exchanged = _rigl(*given, experiment.loss_gradient(state.params, batch))
        else:
            exchanged = _set(*given, jax.random.fold_in(key, number))
        params, masks, opt_state = exchanged
        return dataclasses.replace(state, params=params, masks=masks, opt_state=opt_state)

    return update


def _straight_through(experiment: Experiment, cell: Cell, tuning: Tuning, start: PyTree) -> Regime:
    request = cell.recipe

    def weights(params: PyTree, step: Any) -> PyTree:
        return sparse_training.ste_magnitude(
            params,
            experiment.prunable,
            cell.sparsity,
            scope=request.scope,
            layout=experiment.layout,
        )

    def finish(state: TrainState) -> tuple[PyTree, PyTree]:
        return recipe.prune(
            request, state.params, prunable=experiment.prunable, layout=experiment.layout
        )

    return Regime(
        state=experiment.tuning_state(tuning, start, cell.seed, None),
        step=tuning.compile(tuning.optimizer, forward=weights),
        weights=weights,
        finish=finish,
    )


def _elsa(experiment: Experiment, cell: Cell, tuning: Tuning, start: PyTree) -> Regime:
    where = {"scope": cell.recipe.scope, "layout": experiment.layout}
    optimizer = sparse_training.elsa(
        tuning.optimizer,
        cell.sparsity,
        penalty=cell.schedule_options.penalty,
        prunable=experiment.prunable,
        **where,
    )
    place = functools.partial(parallel.shard_state, params=experiment.abstract_params)

    def begin(params: PyTree) -> TrainState:
        return place(state_lib.create(jax.tree.map(jnp.copy, params), optimizer, cell.seed))

    def finish(state: TrainState) -> tuple[PyTree, PyTree]:
        masks = sparse_training.elsa_masks(state.opt_state, state.params, cell.sparsity, **where)
        return masks_lib.apply(state.params, masks), masks

    return Regime(
        state=jax.jit(begin)(start),
        step=tuning.compile(optimizer, place=place),
        weights=lambda params, step: params,
        finish=finish,
    )


def _movement(experiment: Experiment, cell: Cell, tuning: Tuning, start: PyTree) -> Regime:
    request, prunable = cell.recipe, experiment.prunable
    plan = ramp(cell, tuning.steps)
    # The paper's rate. The scores start at 0 and Adam's steps scale with its rate, so any rate
    # gives the same ranks.
    optimizer = optax.multi_transform(
        {"weights": tuning.optimizer, "scores": optax.adam(1e-2)},
        {"weights": "weights", "scores": "scores"},
    )
    scores = experiment.abstract_prunable(jnp.float32)
    abstract = {"weights": experiment.abstract_params, "scores": scores}
    place = functools.partial(parallel.shard_state, params=abstract)

    def begin(params: PyTree) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        trained = {"weights": params, "scores": movement.init(params, prunable)}
        return place(state_lib.create(trained, optimizer, cell.seed))

    def masks(params: PyTree, sparsity: Any) -> PyTree:
        return movement.hard_masks(
            params["scores"], sparsity, scope=request.scope, layout=experiment.layout
        )

    def weights(params: PyTree, step: Any) -> PyTree:
        found = masks(params, plan.sparsity(step))
        return movement.forward(params["weights"], params["scores"], found)

    def finish(state: TrainState) -> tuple[PyTree, PyTree]:
        found = masks(state.params, cell.sparsity)
        return masks_lib.apply(state.params["weights"], found), found

    return Regime(
        state=jax.jit(begin)(start),
        step=tuning.compile(optimizer, forward=weights, place=place),
        weights=weights,
        finish=finish,
    )
