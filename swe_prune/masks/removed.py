"""Weights that were removed before: their score is −inf, and no rule may bring them back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import patterns, tree


def without_removed(scores: Mapping[str, Array], masks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the masks without the weights whose score is −inf.

    Args:
        scores: Float arrays by tensor name.
        masks: Bool arrays, or None where a rule leaves a tensor dense, by tensor name.
    """
    return {
        name: None if (mask := masks.get(name)) is None else mask & (score != -jnp.inf)
        for name, score in scores.items()
    }


def units_with_removed_last(
    pattern: str | None, scores: Mapping[str, Array], *args: Any, **options: Any
) -> list[patterns.Units]:
    """Returns `patterns.units` in which a score of −inf stands for a weight that is gone.

    It adds nothing to its unit, whose score would be −inf for one such weight; the score of a unit
    is −inf if all its weights are gone.

    Args:
        pattern: Pattern as for `patterns.units`.
        scores: Float scores by tensor name.
        *args: Further arguments of `patterns.units`.
        **options: Options of `patterns.units`.
    """
    if pattern is None:  # every weight is a unit
        return patterns.units(pattern, scores, *args, **options)
    there = {name: (score != -jnp.inf).astype(jnp.float32) for name, score in scores.items()}
    present = {name: jnp.where(there[name] > 0, score, 0) for name, score in scores.items()}
    units = patterns.units(pattern, present, *args, **options)
    counting = {**options, "reduce": "sum", "across": "sum"}
    left = patterns.units(pattern, there, *args, **counting)
    return [
        dataclasses.replace(one, score=jnp.where(number.score > 0, one.score, -jnp.inf))
        for one, number in zip(units, left, strict=True)
    ]


def of_zeros(params: PyTree, prunable: PyTree | None = None) -> PyTree:
    """Returns the masks of a model that has zeros already: False where a prunable weight is 0.

    Args:
        params: Pytree of weights.
        prunable: Bool pytree. None: `tree.prunable(params)`.

    >>> of_zeros({"up": {"kernel": jnp.array([[0.0, 2.0]])}})["up"]["kernel"].tolist()
    [[False, True]]
    """
    return tree.map_prunable(lambda _, w: w != 0, params, prunable)
