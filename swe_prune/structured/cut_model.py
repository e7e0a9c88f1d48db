"""One request to cut: the units are scored and chosen, their readers refitted, the arrays cut.

`cut --model` and every cut of a study hold a `recipe.CutRecipe` and call `cut_model`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from swe_prune import calibration, importance
from swe_prune.arguments import checked
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, check_choice
from swe_prune.recipe import CutRecipe, measure, score
from swe_prune.recipe import check as check_recipe
from swe_prune.structured.activations import OF_UNITS, activation_scores, readers
from swe_prune.structured.budget import Budget
from swe_prune.structured.choice import Keep, choose
from swe_prune.structured.cutting import cut
from swe_prune.structured.decoder import LAYERS, VISION_NEURONS, cut_config, groups
from swe_prune.structured.depth import DEPTH, depth_scores, residual_states
from swe_prune.structured.group import Group
from swe_prune.structured.redundancy import Redundancy
from swe_prune.structured.redundant_units import redundancy_scores, redundant_units
from swe_prune.structured.refit import RefitReport, refit
from swe_prune.structured.unit_scores import unit_scores
from swe_prune.trajectory import TrajectoryStats

OF_ACTIVATIONS = tuple(kind for kind in OF_UNITS if kind != "weight_norm")
REDUNDANT = "mutual_information"
CRITERIA = (*importance.names(), *OF_UNITS, *DEPTH, REDUNDANT)
"""Names of all criteria: those of the registry, whose scores are of weights, and of units."""
SINGLE = ("neurons", VISION_NEURONS)
"""Units that are one activation each, which redundancy compares."""


@dataclasses.dataclass(frozen=True)
class CutResult:
    """A cut model, and how it came to be.

    Attributes:
        params: Parameters of the cut model.
        config: Config of the cut model.
        keep: Indices of the kept units by group.
        refits: Reports of the refit, one for each weight; empty without it.
        redundant: Order of removal by group with each unit's partner; empty of other criteria.
    """

    params: PyTree
    config: ModelConfig
    keep: Keep
    refits: tuple[RefitReport, ...]
    redundant: Mapping[str, Redundancy]


@checked
def check_cut(
    recipe: CutRecipe,
    config: ModelConfig | None = None,
    *,
    unavailable: Mapping[str, str] | None = None,
) -> None:
    """Refuses everything about a cut that cannot work, before any work is done.

    Args:
        recipe: Request to check.
        config: Config of the model, to check the criterion against. None: only names and values
            are checked.
        unavailable: Sentence on what to do instead, by need that cannot be provided.

    Raises:
        InputError: The first fault, in one sentence that says how to fix it.
    """
    criterion, units = recipe.criterion, recipe.units
    check_choice(criterion, CRITERIA, "criterion")
    if recipe.restore and units == LAYERS:
        raise InputError(
            "restore refits the projections that read what goes, and whole layers have none; leave "
            "it out"
        )
    if recipe.recipe is not None:
        check_recipe(recipe.recipe, unavailable=unavailable)
        return
    if recipe.options:
        raise InputError(f"criterion {criterion!r} has no options; leave them out")
    if recipe.reduce != CutRecipe.reduce:
        raise InputError(
            f"criterion {criterion!r} scores units and not their weights; leave out reduce"
        )
    fits, what = units != LAYERS, "units within a layer"
    if criterion in DEPTH:
        fits, what = units == LAYERS, "layers"
    elif criterion == REDUNDANT:
        fits, what = units in SINGLE, "neurons"
    if not fits:
        raise InputError(
            f"criterion {criterion!r} scores {what}, not {units}; use another criterion or other "
            "units"
        )
    if criterion == REDUNDANT and config is not None and config.experts is not None:
        raise InputError(
            f"criterion {criterion!r} compares the neurons of one MLP, and the model has experts; "
            "use another criterion"
        )


@checked
def cut_model(
    recipe: CutRecipe,
    config: ModelConfig,
    model: Any,
    params: PyTree,
    batches: Sequence[PyTree],
    *,
    loss: Callable[[PyTree, PyTree], Any],
    budget: Budget | None = None,
    used: Mapping[str, Group] | None = None,
    blocks: str | None = None,
    layout: PyTree | None = None,
    prunable: PyTree | None = None,
    scored: PyTree | None = None,
    stats: TrajectoryStats | None = None,
    opt_state: PyTree | None = None,
    at_once: int | None = None,
) -> CutResult:
    """Cuts a decoder by a request: scores its units, chooses, refits what reads them, and cuts.

    Args:
        recipe: Request.
        config: Config of the model before the cut.
        model: Module or function of (params, batch), run on the batches.
        params: Parameters before the cut.
        batches: Calibration batches; not touched unless `recipe.reads_batches`.
        loss: Function of (params, batch), for criteria that read gradients.
        budget: Limit of what the cut model costs, in place of the request's sparsity.
        used: Groups whose units are computed. None: all of the model. Of the others as many units
            go, whichever they are.
        blocks: Rule that matches the blocks' whole paths, for criteria of layers.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.
        prunable: Bool pytree like the parameters, of the weights that a criterion of weights
            scores. None: `tree.prunable(params)`.
        scored: Weights that a criterion of weights scores, where the cut starts from others. None:
            the parameters.
        stats: Trajectory statistics, for criteria that read them.
        opt_state: Optimizer state, for criteria that read it.
        at_once: Sequences per gradient; see `calibration.gradients`.

    Raises:
        InputError: A request, evidence or a budget that does not fit the model; errors of
            `check_cut`, `recipe.measure`, `choose` and `refit`.
    """
    check_cut(recipe, config)
    every = groups(config, recipe.units)
    own = dict(every if used is None else used)
    of_weights, redundant = recipe.recipe, {}
    rules: list[str] = []
    if recipe.restore or recipe.criterion in (*OF_UNITS, REDUNDANT):
        rules = [f"^{re.escape(name)}$" for name in readers(own, params, layout).values()]
    # 1. Measure in one pass what the scores and the refit read.
    moments = None
    if recipe.restore or recipe.criterion in OF_ACTIVATIONS:
        moments = calibration.moments(model, params, batches, leaves=rules, gram=recipe.restore)
    # 2. Score the units.
    if of_weights is not None:
        weights = params if scored is None else scored
        evidence = measure(
            [of_weights],
            model,
            weights,
            batches,
            loss=loss,
            prunable=prunable,
            stats=stats,
            opt_state=opt_state,
            at_once=at_once,
        )
        scores = score(of_weights, weights, evidence, prunable, layout)
        units = unit_scores(own, scores, recipe.reduce)
    elif recipe.criterion in DEPTH:
        if blocks is None:
            raise InputError(
                f"criterion {recipe.criterion!r} scores whole blocks; give blocks=, the rule that "
                "matches their paths"
            )
        turns = depth_scores(residual_states(model, blocks), params, batches, recipe.criterion)
        units = dict.fromkeys(own, turns)
    elif recipe.criterion == REDUNDANT:
        drawn = calibration.samples(model, params, batches, leaves=rules, seed=recipe.seed)
        redundant = redundant_units(own, params, drawn, layout=layout)
        units = redundancy_scores(own, redundant)
    else:
        units = activation_scores(own, params, recipe.criterion, moments, layout=layout)
    # 3. Choose; scores of 0 stand in for units that nothing computes.
    nothing = {name: np.zeros(group.shape) for name, group in every.items()}
    keep = choose(
        every,
        {**nothing, **units},
        sparsity=recipe.sparsity,
        budget=budget,
        multiple=recipe.multiple,
        params=params,
        config=config,
    )
    # 4. Refit what reads the units, and cut.
    refits: tuple[RefitReport, ...] = ()
    if recipe.restore:
        assert moments is not None
        params, refits = refit(params, own, {n: keep[n] for n in own}, moments, layout=layout)
    return CutResult(cut(params, every, keep), cut_config(config, keep), keep, refits, redundant)
