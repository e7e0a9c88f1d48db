"""The scores of a request's criterion, compiled once per criterion."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from swe_prune import importance, trajectory, tree
from swe_prune.arguments import checked
from swe_prune.layout import axes_of
from swe_prune.recipe.evidence import Evidence
from swe_prune.recipe.request import Recipe


@checked
def score(
    recipe: Recipe,
    params: PyTree,
    evidence: Evidence,
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the scores of the recipe's criterion: float32 like the parameters, None where dense.

    Compiled once per criterion, whatever the sparsity. Where a leaf of the parameters is not an
    array, such as a function in an Equinox module, the same computation runs eagerly.

    Args:
        recipe: Request with a criterion.
        params: Weights to score.
        evidence: What the criterion reads besides the weights.
        prunable: Bool pytree like the parameters. None: the weights that the statistics track, or
            `tree.prunable(params, layout=layout)` without statistics.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.

    Raises:
        InputError: Evidence that the criterion needs and that is missing or of another shape.
    """
    criterion = importance.get(str(recipe.criterion))
    if prunable is not None:
        tree.check_marks(prunable)
    axes_of(layout)  # checks it
    # Only what the criterion reads becomes an argument of the compiled program.
    reads_moment = "second_moment" in criterion.needs
    opt_state = evidence.opt_state if reads_moment else None
    measured = {need: evidence.measured[need] for need in recipe.needs & set(evidence.measured)}
    # The compiled program cannot look at values, so what says nothing is refused before it.
    moments = measured.get("second_moment")
    if moments is None and opt_state is not None:
        moments = importance.second_moment(opt_state, params)
    if moments is not None and prunable is not None:
        moments = tree.map_leaves(lambda _, chosen, v: v if chosen else None, prunable, moments)
    stats = None if evidence.stats is None else trajectory.restored(evidence.stats)
    importance.check_informative(criterion, stats, moments)
    options = tuple(sorted(recipe.options.items()))
    chosen, structure = jax.tree.flatten(prunable)
    axes, axes_structure = jax.tree.flatten(layout, is_leaf=tree.is_none)
    make = _compile_score if _all_arrays(params, opt_state) else _score_fn
    static = (structure, tuple(chosen), axes_structure, tuple(axes), recipe.seed)
    scored = make(str(recipe.criterion), *static, recipe.zeros, options)
    return scored(params, stats, opt_state, measured)


def _all_arrays(*trees: PyTree) -> bool:
    return all(
        isinstance(leaf, jax.Array | np.ndarray) and leaf.dtype.kind not in "OSU"
        for leaf in jax.tree.leaves(trees)
    )


def _score_fn(
    criterion: str,
    structure: Any,
    chosen: tuple[bool, ...],
    axes_structure: Any,
    axes: tuple[Any, ...],
    seed: int,
    zeros: str,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., PyTree]:
    prunable, layout = structure.unflatten(chosen), axes_structure.unflatten(axes)

    def scored(params: PyTree, stats: Any, opt_state: PyTree, measured: Any) -> PyTree:
        return importance.score(
            criterion,
            params,
            stats=stats,
            opt_state=opt_state,
            measured=measured,
            prunable=prunable,
            layout=layout,
            seed=seed,
            zeros=zeros,
            **dict(options),
        )

    return scored


@functools.cache
def _compile_score(*request: Any) -> Callable[..., PyTree]:
    """Returns the compiled scores of a criterion; a sweep over sparsities compiles it once."""
    return jax.jit(_score_fn(*request))
