"""From scores to masks: the sparsity of each tensor, and what stays."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import PyTree

from swe_prune import allocation, importance, masks
from swe_prune.allocation import Allocation
from swe_prune.arguments import checked
from swe_prune.recipe.evidence import Loss
from swe_prune.recipe.request import Recipe


@checked
def allocate(
    recipe: Recipe,
    scores: PyTree | None,
    *,
    params: PyTree,
    curvature: PyTree | None = None,
    loss: Loss | None = None,
    batches: Sequence[PyTree] = (),
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
) -> float | Allocation:
    """Returns the rate, the sparsity, or the sparsity distributed by the recipe's allocation.

    Args:
        recipe: Request.
        scores: Scores of the weights, for allocations that read them.
        params: Weights to be pruned.
        curvature: Scores of a criterion with curvature, for allocations that read them.
        loss: Function of (params, batch), for allocations that read it.
        batches: Calibration batches, for allocations that read them.
        prunable: Bool pytree like the parameters. None: the tensors that have scores.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.

    Raises:
        InputError: Something that the allocation needs and that is missing.
    """
    if recipe.rate is not None:
        return recipe.rate
    target = recipe.target
    assert target is not None
    if recipe.allocation is None:
        return target
    options: dict[str, Any] = {}
    if recipe.max_sparsity is not None:
        options["max_sparsity"] = recipe.max_sparsity
    return allocation.allocate(
        recipe.allocation,
        target,
        **options,
        scores=scores,
        curvature=curvature,
        params=params,
        loss=loss,
        batches=batches,
        prunable=prunable,
        layout=layout,
    )


@checked
def select(recipe: Recipe, scores: PyTree, amount: Any, layout: PyTree | None = None) -> PyTree:
    """Returns the masks that the recipe makes of scores.

    Args:
        recipe: Request with a criterion.
        scores: Float32 pytree, None where dense.
        amount: Rate, sparsity or allocation, as `allocate` returns it.
        layout: Pytree of `layout.Axes` like the scores. None: Flax's naming convention.

    Raises:
        InputError: NaN scores, or an amount that the shapes do not admit.
    """
    if recipe.rate is not None:
        spread = importance.get(str(recipe.criterion)).spread
        return masks.by_std(scores, amount, spread=spread, layout=layout)
    return masks.by_sparsity(
        scores,
        amount,
        recipe.scope,
        pattern=recipe.pattern,
        max_sparsity=recipe.max_sparsity if recipe.scope == "global" else None,
        layout=layout,
    )
