"""Criteria of `cut`: scores of weights, of activations, of whole blocks, and redundancy."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import calibration, importance, interop, recipe, structured, tree
from swe_prune.errors import InputError, check_choice
from swe_prune.layout import layout as trace_layout
from swe_prune.models import phi3v
from swe_prune.pretrained import tracked
from swe_prune.pretrained.request import NO_OPTIMIZER, options_of
from swe_prune.pretrained.settings import CutSettings
from swe_prune.recipe import Recipe
from swe_prune.structured import Group, activations, depth, refit
from swe_prune.training import step
from swe_prune.trajectory import BUFFERS

REDUNDANT = "mutual_information"
CRITERIA = (*importance.names(), *activations.OF_UNITS, *depth.DEPTH, REDUNDANT)
"""Names of all criteria: those of the registry, whose scores are of weights, and of units."""

Partners = dict[str, list[dict[str, Any]]]
"""For each group the units in the order in which they go, each with what makes it redundant."""


def checked(given: CutSettings) -> Recipe | None:
    """Returns the recipe of the scores of weights; None of a criterion that scores units.

    Raises:
        InputError: An unknown name, or a criterion of other units.
    """
    check_choice(given.criterion, CRITERIA, "criterion")
    if given.criterion in importance.names():
        request = Recipe(
            criterion=given.criterion,
            options=options_of(given.options),
            sparsity=0.0 if given.sparsity is None else given.sparsity,
            seed=given.seed,
            zeros="free",
        )
        recipe.check(request, unavailable=NO_OPTIMIZER)
        return request
    if given.options:
        raise InputError(f"criterion {given.criterion!r} has no options; leave out --option")
    if given.reduce != CutSettings.reduce:
        raise InputError(
            f"criterion {given.criterion!r} scores units and not their weights; leave out --reduce"
        )
    able = ("neurons", "heads", "query_heads")
    if given.criterion in depth.DEPTH:
        able = ("layers",)
    elif given.criterion == REDUNDANT:
        able = ("neurons",)
    if given.units not in able:
        raise InputError(
            f"criterion {given.criterion!r} scores {', '.join(able)}, not {given.units}; use "
            "another criterion or other units"
        )
    return None


def reads_batches(given: CutSettings, request: Recipe | None) -> bool:
    """Returns whether calibration batches are needed."""
    by_units = request is None and given.criterion != "weight_norm"
    return given.restore or by_units or (request is not None and request.reads_batches)


def unit_scores(
    given: CutSettings,
    request: Recipe | None,
    model: interop.Pretrained,
    groups: dict[str, Group],
    batches: list[Any],
) -> tuple[dict[str, Any], Partners | None]:
    """Returns the scores of the units, and the partners of redundant ones.

    Raises:
        InputError: What the criterion reads is missing or says nothing.
    """
    module = phi3v.build(model.config, model.vocab_size)
    if request is not None:
        return _of_weights(given, request, model, module, groups, batches), None
    if given.criterion in depth.DEPTH:
        states = depth.residual_states(module, phi3v.blocks(model.config))
        scores = depth.depth_scores(states, model.params, batches, given.criterion)
        return dict.fromkeys(groups, scores), None
    layout = layout_of(module, model.params)
    if given.criterion == REDUNDANT:
        return _redundancy(model, module, groups, batches, layout, given.seed)
    moments = None
    if given.criterion != "weight_norm":
        moments = _moments(model, module, groups, batches, layout)
    scores = activations.activation_scores(
        groups, model.params, given.criterion, moments, layout=layout
    )
    return scores, None


def restored(
    model: interop.Pretrained,
    groups: dict[str, Group],
    keep: structured.Keep,
    batches: list[Any],
) -> tuple[PyTree, tuple[refit.RefitReport, ...]]:
    """Returns the parameters whose projections make up for what goes, before the cut."""
    module = phi3v.build(model.config, model.vocab_size)
    layout = layout_of(module, model.params)
    moments = _moments(model, module, groups, batches, layout, gram=True)
    return refit.refit(model.params, groups, keep, moments, layout=layout)


def layout_of(module: nn.Module, params: PyTree) -> PyTree:
    """Returns the layout of a decoder's parameters."""
    return trace_layout(module, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))


def _of_weights(
    given: CutSettings,
    request: Recipe,
    model: interop.Pretrained,
    module: nn.Module,
    groups: dict[str, Group],
    batches: list[Any],
) -> dict[str, Any]:
    """Returns scores of units from scores of their prunable weights."""
    everything = {name: np.broadcast_to(np.arange(g.units), g.shape) for name, g in groups.items()}
    inside = structured.unit_mask(model.params, groups, everything)
    prunable = tree.map_leaves(
        lambda _, chosen, mask: chosen and mask is not None, tree.prunable(model.params), inside
    )
    stats = None
    if request.needs & set(BUFFERS):
        prunable = tracked.narrowed(model.path, model.params, prunable)
        stats = tracked.read(model.path, model.params)
    evidence = recipe.measure(
        [request],
        module,
        model.params,
        batches,
        loss=step.loss_fn(module),
        prunable=prunable,
        stats=stats,
        at_once=1,
    )
    layout = layout_of(module, model.params)
    scores = recipe.score(request, model.params, evidence, prunable, layout)
    return structured.unit_scores(groups, scores, given.reduce)


def _moments(
    model: interop.Pretrained,
    module: nn.Module,
    groups: dict[str, Group],
    batches: list[Any],
    layout: PyTree,
    gram: bool = False,
) -> dict[str, calibration.Moments]:
    leaves = activations.readers(groups, model.params, layout).values()
    rules = [f"^{re.escape(name)}$" for name in leaves]
    return calibration.moments(module, model.params, batches, leaves=rules, gram=gram)


def _redundancy(
    model: interop.Pretrained,
    module: nn.Module,
    groups: dict[str, Group],
    batches: list[Any],
    layout: PyTree,
    seed: int,
) -> tuple[dict[str, Any], Partners]:
    """Returns the places in the order of removal, of arXiv 2406.00030, and the partners."""
    if any(group.copies is not None for group in groups.values()):
        raise InputError(
            f"criterion {REDUNDANT!r} compares the neurons of one MLP, and the model has experts; "
            "use another criterion"
        )
    of_group = activations.readers(groups, model.params, layout)
    rules = [f"^{re.escape(name)}$" for name in of_group.values()]
    drawn = calibration.samples(module, model.params, batches, leaves=rules, seed=seed)
    found = structured.redundant_units(groups, model.params, drawn, layout=layout)
    partners = {name: one.as_json()["removed"] for name, one in found.items()}
    return structured.redundancy_scores(groups, found), partners
