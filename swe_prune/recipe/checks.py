"""One validation of a pruning request, with one sentence a fault, before any work is done."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import allocation, blockwise, importance, masks, patterns, tree
from swe_prune.arguments import checked
from swe_prune.blockwise.sparsegpt import BLOCK, check_sparsity
from swe_prune.errors import InputError, check_choice
from swe_prune.importance.registry import check_value
from swe_prune.layout import axes_of
from swe_prune.recipe.request import METHOD_OPTIONS, Recipe
from swe_prune.recipe.selection import select


@checked
def check(
    recipe: Recipe,
    params: PyTree | None = None,
    prunable: PyTree | None = None,
    *,
    layout: PyTree | None = None,
    unavailable: Mapping[str, str] | None = None,
) -> None:
    """Refuses everything about a recipe that cannot work, before any work is done.

    Args:
        recipe: Request to check.
        params: Parameters, which may be abstract, to check the shapes against. None: only names
            and values are checked.
        prunable: Bool pytree like the parameters. None: `tree.prunable(params, layout=layout)`.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.
        unavailable: Sentence on what to do instead, by need that cannot be provided.

    Raises:
        InputError: The first fault, in one sentence that says how to fix it.
    """
    _check_ranking(recipe)
    _check_amount(recipe)
    _check_options(recipe)
    check_available(recipe, unavailable or {})
    if params is not None:
        prunable = tree.prunable(params, layout=layout) if prunable is None else prunable
        check_shapes(recipe, params, prunable, layout)


def check_available(recipe: Recipe, unavailable: Mapping[str, str]) -> None:
    """The part of `check` on what the scores need."""
    for need, reason in unavailable.items():
        if need in recipe.needs:
            raise InputError(f"criterion {recipe.name!r} needs {need!r}, {reason}")


def _check_ranking(recipe: Recipe) -> None:
    """Checks what ranks the weights, and what a block-by-block method excludes."""
    if (recipe.criterion is None) == (recipe.method is None):
        given = "neither was given" if recipe.criterion is None else "both were given"
        raise InputError(
            "a recipe must have a criterion (at once, by its scores) or a method (block by "
            f"block), {given}; give one of them"
        )
    if recipe.method is None:
        _, blockwise_name, method = str(recipe.criterion).partition("blockwise:")
        if blockwise_name:
            raise InputError(
                f"unknown criterion {recipe.criterion!r}; give method={method!r} in its place"
            )
        importance.get(str(recipe.criterion))
        return
    check_choice(recipe.method, blockwise.METHODS, "method")
    if recipe.scope != "tensor":
        raise InputError(
            f"method {recipe.method!r} prunes kernel by kernel, so scope must be 'tensor', got "
            f"{recipe.scope!r}; leave the scope out"
        )
    if recipe.pattern is not None and not recipe.n_of_m:
        raise InputError(
            f"method {recipe.method!r} knows no pattern {recipe.pattern!r}; give 'n:m' or None"
        )


def _check_amount(recipe: Recipe) -> None:
    """Checks sparsity, rate, scope and allocation, and that they fit together."""
    check_choice(recipe.scope, masks.SCOPES, "scope")
    check_choice(recipe.zeros, importance.ZEROS, "zeros")
    check_choice(recipe.restore, blockwise.RESTORES, "restore")
    if recipe.allocation is not None:
        allocation.get(recipe.allocation).check_options(())
    if recipe.rate is not None:
        _check_number("rate", recipe.rate)
        if not 0 <= recipe.rate < math.inf:
            raise InputError(
                f"rate must be a finite multiple of a standard deviation, 0 or more, got "
                f"{recipe.rate!r}; give for example 1.4"
            )
        clashing = {
            "sparsity": recipe.sparsity,
            "allocation": recipe.allocation,
            "pattern": recipe.pattern,
            "method": recipe.method,
            "max_sparsity": recipe.max_sparsity,
            "scope": None if recipe.scope == "tensor" else recipe.scope,
        }
        for setting, value in clashing.items():
            if value is not None:
                raise InputError(
                    f"{setting} = {value!r} and rate = {recipe.rate!r} exclude each other, since "
                    "a rate sets a threshold per tensor; leave one of them out"
                )
        return
    if recipe.max_sparsity is not None:
        _check_max_sparsity(recipe)
    if recipe.sparsity is not None:
        _check_number("sparsity", recipe.sparsity)
        allocation.check_sparsity(recipe.sparsity)
    elif not recipe.n_of_m:
        raise InputError(
            "a recipe must say how much to remove, got neither sparsity nor rate; give a sparsity "
            "in [0, 1), a rate, or an n:m pattern"
        )
    if recipe.n_of_m:
        check_sparsity(recipe.sparsity, recipe.pattern)
        if recipe.allocation is not None:
            raise InputError(
                f"pattern {recipe.pattern!r} fixes the sparsity of every tensor, so allocation "
                f"must be None, got {recipe.allocation!r}; leave it out"
            )
    if recipe.allocation is not None and recipe.scope == "global":
        raise InputError(
            f"scope 'global' would overrule allocation {recipe.allocation!r}; give scope 'tensor' "
            "or 'row'"
        )


def _check_max_sparsity(recipe: Recipe) -> None:
    allocation.least_kept(0, recipe.max_sparsity)  # type: ignore[arg-type]
    known = allocation.get(recipe.allocation).options if recipe.allocation is not None else ()
    if recipe.scope != "global" and "max_sparsity" not in known:
        raise InputError(
            "max_sparsity is for scope 'global' and for allocations that rank all tensors together "
            f"(curvature, global), got scope {recipe.scope!r} and allocation "
            f"{recipe.allocation!r}; leave it out"
        )
    if recipe.target is not None and recipe.max_sparsity < recipe.target:  # type: ignore[operator]
        raise InputError(
            f"max_sparsity = {recipe.max_sparsity:g} is below the sparsity {recipe.target:g} that "
            "all tensors together must lose; raise it"
        )


def _check_options(recipe: Recipe) -> None:
    """Checks options by name and by value, on a trace of the criterion over tiny arrays."""
    if not isinstance(recipe.options, Mapping):
        raise InputError(f"options must be a mapping of names to values, got {recipe.options!r}")
    if recipe.method is not None:
        known = METHOD_OPTIONS
        for name in recipe.options:
            if name not in known:
                raise InputError(
                    f"method {recipe.method!r} has no option {name!r}; its options: "
                    + ", ".join(known)
                )
    else:
        criterion = importance.get(str(recipe.criterion))
        criterion.check_options(recipe.options)
        signature = inspect.signature(criterion.function).parameters
        known = {name: signature[name].default for name in criterion.options}
    for name, value in recipe.options.items():
        check_value(f"option {name} of {recipe.name!r}", value, known[name])
    if recipe.method is not None and recipe.options.get("block", 1) < 1:
        raise InputError(f"option block must be 1 or more inputs, got {recipe.options['block']!r}")
    if recipe.method is not None and recipe.options.get("damping", 0) < 0:
        raise InputError(f"option damping must be 0 or more, got {recipe.options['damping']!r}")
    if recipe.method is None and recipe.options:
        _trace(recipe)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise InputError(f"{name} must be a number, got {value!r}; give for example 0.5")


def _trace(recipe: Recipe) -> None:
    """Runs the criterion abstractly, which meets the checks that it makes of its options."""
    criterion = importance.get(str(recipe.criterion))
    given: dict[str, Any] = dict.fromkeys(criterion.needs, jnp.ones((4, 4)))
    static = {"inputs": (0,)} if "inputs" in given else {}
    if "key" in given:
        given["key"] = jax.random.key(0)
    arrays = {need: value for need, value in given.items() if need not in static}
    jax.eval_shape(lambda arrays: criterion.function(**arrays, **static, **recipe.options), arrays)


def check_shapes(recipe: Recipe, params: PyTree, prunable: PyTree, layout: PyTree) -> None:
    """The part of `check` on shapes: traces the selection, which refuses what they do not admit."""
    if recipe.rate is not None:
        return
    if not any(jax.tree.leaves(tree.check_marks(prunable))):
        raise InputError("no weight is prunable, so there is nothing to prune; widen the rules")
    scores = tree.map_named(
        lambda _, leaf, chosen: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if chosen else None,
        params,
        prunable,
    )
    jax.eval_shape(lambda scores: select(recipe, scores, recipe.target, layout), scores)
    if recipe.method == "sparsegpt" and recipe.n_of_m:
        block = recipe.options.get("block", BLOCK)
        _, m = patterns.parse_n_of_m(str(recipe.pattern))
        axes = axes_of(layout)
        for name, leaf in tree.named_leaves(scores):
            if leaf is None or block % m == 0:
                continue
            inputs = math.prod(leaf.shape[axis] for axis in axes(name, leaf.shape).inputs)
            if block < inputs:
                raise InputError(
                    f"option block = {block} would cut groups of {m} inputs of {name!r}; give a "
                    f"multiple of {m}"
                )
