"""The cut: smaller arrays for weights, moments, statistics and masks alike."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.structured.group import (
    Along,
    Group,
    Groups,
    Placed,
    check_keep,
    check_matched,
    matches,
    placed,
)
from swe_prune.trajectory import TrajectoryStats
from swe_prune.tree import pairing


@checked
def cut(values: PyTree, groups: Groups, keep: Mapping[str, Any]) -> PyTree:
    """Returns a pytree with only the kept units; dtypes and containers stay.

    A model without the cut units computes what the model computes with zeros in their place
    (`unit_mask`), up to rounding. Leaves without units are the same arrays in both, not copies: a
    train step that donates the one deletes them in the other.

    Args:
        values: Pytree laid out like the parameters: parameters, masks, trajectory statistics, or
            the state of an optimizer, whose moments are found by the ends of their names. Leaves
            may be abstract.
        groups: Groups by name.
        keep: Indices of kept units by group, as `choose` returns them. Groups that are missing
            keep all.

    Raises:
        InputError: A group does not fit a weight, indices are out of range, repeated or none, or
            an optimizer has moments that are not laid out like the weights.

    >>> params = {"up": jnp.arange(6.0).reshape(2, 3), "down": jnp.arange(3.0)}
    >>> small = cut(params, {"mlp": Group(3, {"up": -1, "down": -1})}, {"mlp": [0, 2]})
    >>> small["up"].tolist(), small["down"].tolist()
    ([[0.0, 2.0], [3.0, 5.0]], [0.0, 2.0])
    """
    kept = check_keep(groups, keep)
    where = placed({name: groups[name] for name in kept}, values) if kept else {}
    scaled = any(one.along.power for places in where.values() for one in places)
    states = _states(values) if scaled else ()

    def leaf(name: str, value: Any) -> Any:
        for one in where.get(name, ()):
            value = _taken(value, one.along, groups[one.group], kept[one.group])
            in_state = any(not state or f"{name}/".startswith(f"{state}/") for state in states)
            if one.along.power and not in_state:
                value = _scaled(value, one.along, groups[one.group], kept[one.group])
        return value

    small = tree.map_leaves(leaf, values)
    for name, indices in kept.items():
        if groups[name].numbered:
            small = _renumbered(small, name, groups[name], indices)
    return small


@checked
def unit_mask(params: PyTree, groups: Groups, keep: Mapping[str, Any]) -> PyTree:
    """Returns the mask that removes the same units: bool, None for weights without units.

    Args:
        params: Parameters, which may be abstract.
        groups: Groups by name.
        keep: Indices of kept units by group.

    Raises:
        InputError: Errors of `cut`.
    """
    kept = check_keep(groups, keep)
    where = placed({name: groups[name] for name in kept}, params) if kept else {}
    numbered = {
        name: one.unit in kept[group]
        for group in kept
        if groups[group].numbered
        for name, one in unit_numbers(groups[group], group, params).items()
    }

    def leaf(name: str, value: Any) -> Any:
        places = where.get(name, [])
        if not tree.is_weight(value) or not (places or name in numbered):
            return None
        mask = np.full(value.shape, numbered.get(name, True))
        for one in places:
            mask &= _kept_along(value.shape, one, groups[one.group], kept[one.group])
        return jnp.asarray(mask)

    return tree.map_leaves(leaf, params)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """The number of a unit in the name of one of its weights.

    Attributes:
        unit: Number of the unit.
        start: Position of the number in the name.
        end: Position behind it.
    """

    unit: int
    start: int
    end: int


def unit_numbers(group: Group, group_name: str, values: PyTree) -> dict[str, Numbered]:
    """Returns which unit each leaf belongs to, by name, for units with weights of their own.

    Raises:
        InputError: A rule matches nothing, or the numbers are not those of the units.
    """
    leaves = dict(pairing.named(values))
    found = {}
    for rule, along in group.along.items():
        if along.axis is not None:
            continue
        matched = matches(rule, leaves)
        check_matched(rule, group_name, matched, leaves)
        for name in matched:
            starts = (0, *(match.end() for match in re.finditer("/", name)))
            at, match = next((at, m) for at in starts if (m := re.search(rule, name[at:])))
            if not match[1].isdecimal():
                raise InputError(
                    f"rule {rule!r} of group {group_name!r} must capture the number of a unit, got "
                    f"{match[1]!r} of {tree.short(name)!r}"
                )
            found[name] = Numbered(int(match[1]), at + match.start(1), at + match.end(1))
    numbers = {one.unit for one in found.values()}
    if found and numbers != set(range(group.units)):
        raise InputError(
            f"group {group_name!r} has {group.units} units, but its rules match the numbers "
            f"{sorted(numbers)}; correct the rule or the number of units"
        )
    return found


def _indices(along: Along, group: Group, kept: np.ndarray) -> np.ndarray:
    """Returns the kept indices along the axis: (size,), or (copies, size) of each copy."""
    if group.copies is not None and along.copies == along.axis:  # copies are parts of the axis
        kept = (kept + np.arange(group.copies)[:, None] * group.units).reshape(-1)
    columns = kept[..., None] * along.width + np.arange(along.width)
    return columns.reshape(*kept.shape[:-1], -1)


def _taken(value: Any, along: Along, group: Group, kept: np.ndarray) -> Any:
    indices, axis = _indices(along, group, kept), along.axis
    assert axis is not None
    if isinstance(value, jax.ShapeDtypeStruct):
        shape = (*value.shape[:axis], indices.shape[-1], *value.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, value.dtype)
    library = np if isinstance(value, np.ndarray) else jnp
    if indices.ndim == 1:
        return library.take(value, indices, axis=axis)
    assert along.copies is not None
    return library.take_along_axis(value, _spread(indices, along, value.ndim), axis)


def _spread(of_copies: np.ndarray, along: Along, ndim: int) -> np.ndarray:
    """Returns an array (copies, size) with its axes where a leaf has them, and 1 elsewhere."""
    assert along.axis is not None
    assert along.copies is not None
    shape = [1] * ndim
    shape[along.copies], shape[along.axis] = of_copies.shape
    return (of_copies if along.copies < along.axis else of_copies.T).reshape(shape)


def _scaled(value: Any, along: Along, group: Group, kept: np.ndarray) -> Any:
    if not tree.is_weight(value) or isinstance(value, jax.ShapeDtypeStruct):
        return value
    return (value * (kept.shape[-1] / group.units) ** along.power).astype(value.dtype)


def _kept_along(shape: tuple[int, ...], one: Placed, group: Group, kept: np.ndarray) -> np.ndarray:
    axis, indices = one.along.axis, _indices(one.along, group, kept)
    assert axis is not None
    if indices.ndim == 1:
        rows = np.zeros(shape[axis], bool)
        rows[indices] = True
        return rows.reshape([-1 if at == axis else 1 for at in range(len(shape))])
    rows = np.zeros((len(indices), shape[axis]), bool)
    np.put_along_axis(rows, indices, True, axis=1)
    return _spread(rows, one.along, len(shape))


def _states(values: PyTree) -> tuple[str, ...]:
    """Returns the names of the nodes that hold moments or statistics, "" for the whole."""

    def is_state(node: Any) -> bool:
        named_tuple = isinstance(node, tuple) and hasattr(node, "_fields")
        return named_tuple or isinstance(node, TrajectoryStats)

    nodes = pairing.named(values, lambda node: tree.is_absent(node) or is_state(node))
    return tuple(name for name, node in nodes if is_state(node))


def _renumbered(values: PyTree, group_name: str, group: Group, kept: np.ndarray) -> PyTree:
    """Returns the pytree without the units that are not kept, the others numbered from 0."""
    new = {int(old): number for number, old in enumerate(kept)}
    units = {}  # by the name of the node that holds all weights of the unit
    for name, one in unit_numbers(group, group_name, values).items():
        units[f"{name}/"[: f"{name}/".index("/", one.end)]] = one

    def visit(name: str, node: Any) -> Any:
        def below(key: Any) -> str:
            return f"{name}/{key}" if name else str(key)

        children, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda one: one is not node
        )
        names = [below(jax.tree_util.keystr(p, simple=True, separator="/")) for p, _ in children]
        if pairing.is_box(node) or not any(path for path, _ in children):
            return node
        if not units.keys() & set(names):
            return treedef.unflatten(
                visit(one, child) for one, (_, child) in zip(names, children, strict=True)
            )
        kind: Any = type(node)
        if not isinstance(node, Mapping):  # a list or a tuple
            return kind(node[old] for old in new)
        made = {}
        for key, child in node.items():
            unit = units.get(below(key))
            if unit is None:
                made[key] = child
            elif unit.unit in new:
                made[_new_key(key, unit, len(below(key)), new[unit.unit])] = child
        return kind(made)

    return visit("", values)


def _new_key(key: Any, unit: Numbered, length: int, number: int) -> Any:
    if isinstance(key, int):
        return number
    start, end = unit.start - length, unit.end - length  # counted from the end of the key
    return f"{key[:start]}{number}{key[end:] if end else ''}"
