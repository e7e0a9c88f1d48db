"""Scores of units from scores of weights."""

import functools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice
from swe_prune.recipe import Reduce
from swe_prune.structured.cutting import unit_numbers
from swe_prune.structured.group import Along, Groups, placed

REDUCES = ("sum", "mean", "l2", "max")
"""How the scores of a unit's weights become one."""


@checked
def unit_scores(groups: Groups, scores: PyTree, reduce: Reduce = "l2") -> dict[str, Array]:
    """Returns the score of each unit by group, float32 (units,) or (copies, units).

    Of the scores S of all weights of a unit it is Σ S, Σ S / n, √Σ S², or max S. A weight without a
    score does not count. A score of -inf, which `importance.score` gives to a weight that is
    already 0, counts as 0.

    Args:
        groups: Groups by name.
        scores: Float pytree like the parameters, None where a weight has no score, such as
            `importance.score` returns for any criterion.
        reduce: "sum", "mean", "l2" or "max".

    Raises:
        InputError: A group does not fit the scores or has none, a score is NaN, or `reduce` is "l2"
            and a score is negative.

    >>> from swe_prune.structured import Group
    >>> groups = {"mlp": Group(2, {"up$": -1, "down$": -2})}
    >>> scores = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
    >>> unit_scores(groups, scores)["mlp"].tolist()
    [5.0, 1.0]
    """
    check_choice(reduce, REDUCES, "reduce")
    leaves = {
        name: leaf for name, leaf in tree.named_leaves(scores) if tree.is_weight(leaf) and leaf.size
    }
    parts: dict[str, list[Any]] = {name: [] for name in groups}
    for name, places in placed(groups, scores).items():
        for one in places:
            if name in leaves:
                shape = groups[one.group].shape
                parts[one.group].append(_part(leaves[name], one.along, shape, reduce))
    for group_name, group in groups.items():
        if group.numbered:
            of_unit = defaultdict(list)
            for name, one in unit_numbers(group, group_name, scores).items():
                if name in leaves:
                    of_unit[one.unit].append(_part(leaves[name], None, (), reduce))
            if len(of_unit) == group.units:
                joined = [_joined(of_unit[unit], reduce) for unit in range(group.units)]
                parts[group_name].append(tuple(map(jnp.stack, zip(*joined, strict=True))))
    found = {}
    for group_name, some in parts.items():
        if not some:
            raise InputError(
                f"no weight of group {group_name!r} has a score; give scores of its weights, or "
                "correct its rules"
            )
        value, lowest = _joined(some, reduce)[:2]
        found[group_name] = _checked(group_name, value, lowest, reduce)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _part(scores: Array, along: Along | None, shape: tuple[int, ...], reduce: str) -> Any:
    """Returns the reduced scores of a weight by unit, the lowest, and how many each unit has."""
    scores = scores.astype(jnp.float32)
    if along is not None:
        front = [axis for axis in (along.copies, along.axis) if axis is not None]
        front = list(dict.fromkeys(front))  # once where the copies are parts of the axis
        scores = jnp.moveaxis(scores, front, range(len(front)))
    scores = scores.reshape(*shape, -1)
    scores = jnp.where(jnp.isneginf(scores), 0, scores)
    value = {"max": jnp.max, "l2": _norm}.get(reduce, jnp.sum)(scores, axis=-1)
    return value, scores.min(axis=-1), jnp.full(shape, scores.shape[-1], jnp.float32)


def _joined(parts: list[Any], reduce: str) -> Any:
    """Returns the same of several weights; only for one of them the mean is divided."""
    values, lowest, counts = (jnp.stack(some) for some in zip(*parts, strict=True))
    if reduce == "mean":
        ones = jnp.ones(counts.shape[1:])
        return values.sum(0) / counts.sum(0), lowest.min(0), ones
    joined = {"max": jnp.max, "l2": _norm}.get(reduce, jnp.sum)(values, axis=0)
    return joined, lowest.min(0), counts.sum(0)


def _norm(x: Array, axis: int) -> Array:
    """Returns √Σ x², where the squares of small and large scores do not leave float32."""
    top = jnp.abs(x).max()
    scale = jnp.where(jnp.isfinite(top) & (top > 0), top, 1)
    return scale * jnp.sqrt(jnp.square(x / scale).sum(axis))


def _checked(group: str, value: Array, lowest: Array, reduce: str) -> Array:
    if np.isnan(value).any():
        raise InputError(f"the scores of group {group!r} have NaN; check what they are made of")
    if reduce == "l2" and np.min(lowest) < 0:
        raise InputError(
            f"the scores of group {group!r} have negative values, whose squares reduce = 'l2' "
            "would take for large ones; give 'sum', 'mean' or 'max'"
        )
    return value
