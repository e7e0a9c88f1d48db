"""From a request to pruned parameters: all tensors at once, or one block after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import blockwise, importance, masks
from swe_prune.arguments import checked
from swe_prune.blockwise import KernelReport
from swe_prune.errors import InputError
from swe_prune.recipe.checks import check
from swe_prune.recipe.evidence import Evidence, Loss
from swe_prune.recipe.request import Recipe
from swe_prune.recipe.scores import score
from swe_prune.recipe.selection import allocate, select


@checked
def prune(
    recipe: Recipe,
    params: PyTree,
    evidence: Evidence | None = None,
    *,
    values: PyTree | None = None,
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    batches: Sequence[PyTree] = (),
    loss: Loss | None = None,
    offload: bool = False,
    progress: Callable[[KernelReport], None] | None = None,
    accepted: bool = False,
) -> tuple[PyTree, PyTree]:
    """Returns the parameters with exact zeros, and the masks.

    Args:
        recipe: Request, as `check` accepts it.
        params: Weights to score.
        evidence: What the criterion reads besides the weights.
        values: Weights that the masks are applied to, or that a block-by-block method prunes and
            updates. None: `params`.
        prunable: Bool pytree like the parameters. None: the weights that the statistics track, or
            `tree.prunable(params, layout=layout)` without statistics.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.
        model: Linen module whose blocks a method prunes or `restore` updates.
        blocks: Rule that matches the paths of the blocks, for these.
        batches: Calibration batches, for a method and for allocations that read them.
        loss: Function of (params, batch), for allocations that read it.
        offload: Whether a method keeps weights and activations in host memory.
        progress: Function called with the report of each kernel that a method has pruned.
        accepted: Whether `check` has accepted the recipe already; it is not called again.

    Returns:
        Parameters of the same dtypes; bool masks like them, None where dense.

    Raises:
        InputError: Missing evidence, NaN scores, or shapes that do not fit.
        RunError: A Hessian that no damping makes positive definite.

    >>> import jax.numpy as jnp
    >>> weights = {"up": {"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]])}}
    >>> pruned, _ = prune(Recipe("magnitude", sparsity=0.5), weights)
    >>> pruned["up"]["kernel"].tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
    if not accepted:
        check(recipe)
    evidence = Evidence() if evidence is None else evidence
    values = params if values is None else values
    context: dict[str, Any] = {"params": values, "loss": loss, "batches": batches}
    context |= {"prunable": prunable, "curvature": None}
    if recipe.allocates_by("curvature"):
        context["curvature"] = _curvature(recipe, values, evidence, prunable, layout)
    if recipe.method is None:
        # All tensors at once, by their scores.
        scores = score(recipe, params, evidence, prunable, layout)
        amount = allocate(recipe, scores, layout=layout, **context | {"params": params})
        mask = select(recipe, scores, amount, layout)
        if recipe.restore is None:
            return masks.apply(values, mask), mask
        amount = None
    else:
        mask = None
    # One block after the other, each on what the pruned blocks before it give.
    if model is None or blocks is None:
        what = f"method {recipe.method!r}" if recipe.method else f"restore {recipe.restore!r}"
        raise InputError(f"{what} goes block by block; give model= and blocks=")
    scores = None
    if recipe.method is not None and recipe.allocates_by("scores"):
        scores = importance.score(
            "wanda",
            values,
            measured=evidence.measured,
            prunable=prunable,
            layout=layout,
            zeros=recipe.zeros,
        )
    if recipe.method is not None:
        amount = allocate(recipe, scores, **context)
    if offload:
        values = jax.tree.map(np.asarray, values)
    how: dict[str, Any] = {"mask": mask}
    if recipe.method is not None:
        how = {"sparsity": amount, "method": recipe.method, "pattern": recipe.pattern}
        how |= recipe.options
    pruned, found, _ = blockwise.prune_blocks(
        model,
        {"params": values},
        batches,
        blocks=blocks,
        restore=recipe.restore,
        prunable=prunable,
        offload=offload,
        progress=progress,
        zeros=recipe.zeros,
        **how,
    )
    mask = found if mask is None else mask  # which may have tensors outside of the blocks
    return masks.apply(pruned, mask), mask


def _curvature(
    recipe: Recipe,
    values: PyTree,
    evidence: Evidence,
    prunable: PyTree | None,
    layout: PyTree | None,
) -> PyTree:
    """Returns scores that say what a weight costs the loss, for the allocation by curvature."""
    name, options = "magnitude_curvature", {}
    if "gradient_square" in recipe.needs:  # the measured one, as without a criterion
        best = importance.best(values, None, None, measured=("gradient_square",))
        name, options = best.criterion, best.options
    ranked = Recipe(name, options, sparsity=recipe.target, zeros=recipe.zeros)
    return score(ranked, values, evidence, prunable, layout)
