"""Groups: which axes of which weights belong together, so that a unit goes from all of them.

Every system for language models declares its groups instead of tracing them: a traced graph misses
the key-value groups of today's attention (Torch-Pruning, issue 527).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.bounds import COUNT
from swe_prune.errors import InputError, suggestion

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Along:
    """Axis of a weight along which the units of a group lie.

    Attributes:
        axis: Axis of the units. An axis counted from the end, such as -1, also fits a stacked
            weight and the history of L-BFGS. None: each unit has weights of its own, whose number
            the rule captures, as in r"block_([0-9]+)/".
        width: Number of consecutive indices of one unit, such as the width of a head.
        copies: Axis of the copies of a group that chooses units in each copy, such as the layers of
            a scan or the experts. The same axis as `axis`: each copy is a consecutive part of it.
        power: Exponent p of a factor (kept / units) ** p on the weights that stay, by which a norm
            over all units remains what it was when the others were 0. Statistics and moments are
            not scaled.
    """

    axis: int | None
    width: int = 1
    copies: int | None = None
    power: float = 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that are removed from several weights at once.

    Attributes:
        units: Number of units, in each copy.
        axes: Where the units are, by path rule: a regular expression (`re.search`) for the names of
            weights, and an axis or an `Along`. Each rule must match a weight.
        copies: Number of copies, each of which keeps the same number of units of its own. None:
            one choice of units for all weights of the group.
        multiple: Number that the count of kept units should be a multiple of.

    >>> Group(64, {r"up/kernel$": -1, r"up/bias$": -1, r"down/kernel$": -2}).units
    64
    """

    units: int
    axes: Mapping[str, int | Along | None]
    copies: int | None = None
    multiple: int = 1

    @property
    def shape(self) -> Shape:
        """Shape of the group's scores: (units,), or (copies, units)."""
        return (self.units,) if self.copies is None else (self.copies, self.units)

    @property
    def numbered(self) -> bool:
        """Whether the units have weights of their own, with the number in their names."""
        return any(along.axis is None for along in self.along.values())

    @property
    def along(self) -> dict[str, Along]:
        """`axes` with an `Along` for each rule."""
        return {
            rule: given if isinstance(given, Along) else Along(given)
            for rule, given in self.axes.items()
        }


Groups = Mapping[str, Group]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a leaf has the units of a group.

    Attributes:
        group: Name of the group.
        along: Axes in this leaf, counted from the front.
    """

    group: str
    along: Along


def placed(groups: Groups, values: PyTree) -> dict[str, list[Placed]]:
    """Returns where each leaf has units, by name; leaves without units are missing.

    Args:
        groups: Groups by name. Weights that belong to one unit as a whole are left out.
        values: Pytree laid out like the parameters: parameters, scores, masks, statistics, or an
            optimizer's state.

    Raises:
        InputError: A rule matches nothing, a group does not fit the shape of a weight, or two
            groups share an axis of a weight.
    """
    check(groups)
    _check_moments(groups, values)
    leaves = dict(tree.named_leaves(values))
    found: dict[str, list[Placed]] = {}
    for group_name, group in groups.items():
        for rule, along in group.along.items():
            if along.axis is None:
                continue
            matched = matches(rule, leaves)
            check_matched(rule, group_name, matched, leaves)
            for name in matched:
                if not _has_axes(leaves[name]):
                    continue
                fitted = _fitted(group, group_name, rule, along, name, leaves[name])
                others = found.setdefault(name, [])
                for other in others:
                    if other.along.axis == fitted.axis:
                        raise InputError(
                            f"the groups {other.group!r} and {group_name!r} both have axis "
                            f"{fitted.axis} of {tree.short(name)!r}; correct a rule of one"
                        )
                others.append(Placed(group_name, fitted))
    return found


def matches(rule: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a rule matches.

    In an optimizer's state and in statistics the name of a leaf ends in the name of its weight, so
    a rule that matches no whole name is searched in the ends of the names.
    """

    def ends(name: str) -> list[str]:
        parts = name.split("/")
        return ["/".join(parts[start:]) for start in range(1, len(parts))]

    found = [name for name in names if tree.rule_matches(rule, name)]
    if found:
        return found
    return [name for name in names if any(tree.rule_matches(rule, end) for end in ends(name))]


def check(groups: Groups) -> None:
    """Checks groups without weights.

    Raises:
        InputError: There is none, or a number in one of them is not possible.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            "groups must be a mapping of names to structured.Group with at least one, got "
            f"{groups!r}"
        )
    for name, group in groups.items():
        if not isinstance(group, Group):
            raise InputError(f"group {name!r} must be a structured.Group, got {group!r}")
        for what in ("units", "multiple"):
            COUNT.check(getattr(group, what), f"{what} of group {name!r}")
        if group.copies is not None:
            COUNT.check(group.copies, f"copies of group {name!r}")
        if not group.axes:
            raise InputError(f"group {name!r} must have at least one rule in axes, got none")
        for rule, along in group.along.items():
            _check_along(rule, along, group, f"of group {name!r}")


def _check_along(rule: str, along: Along, group: Group, where: str) -> None:
    tree.rule_matches(rule, "")  # refuses what is not a regular expression
    COUNT.check(along.width, f"width in rule {rule!r} {where}")
    for axis in (along.axis, along.copies):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise InputError(f"an axis in rule {rule!r} {where} must be an integer, got {axis!r}")
    if along.axis is None and (re.compile(rule).groups != 1 or group.copies is not None):
        raise InputError(
            f"rule {rule!r} {where} has no axis, so it must capture the number of the unit, as in "
            "'block_([0-9]+)/', and the group must have no copies"
        )
    if (along.copies is None) != (group.copies is None):
        raise InputError(
            f"rule {rule!r} {where} must say which axis has the copies if the group has copies, "
            f"and only then, got copies = {group.copies} of the group and {along.copies} of the "
            "rule"
        )


def check_keep(groups: Groups, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the kept units of each group, in ascending order.

    Args:
        groups: Groups by name.
        keep: Indices of kept units by group, of shape (kept,) or (copies, kept), in any order.
            Groups that are missing keep all.

    Raises:
        InputError: An unknown group, or indices that are out of range, repeated or none.
    """
    check(groups)
    if not isinstance(keep, Mapping):
        raise InputError(f"keep must be a mapping of groups to indices, got {keep!r}")
    found = {}
    for name, given in keep.items():
        if name not in groups:
            raise InputError(f"keep has no group to cut at {name!r}{suggestion(name, groups)}")
        group = groups[name]
        try:
            indices = np.asarray(given)
        except ValueError:  # rows of different lengths
            raise InputError(
                f"keep[{name!r}] must have as many units in each copy, got {given!r}"
            ) from None
        if not np.issubdtype(indices.dtype, np.integer) or indices.ndim != len(group.shape):
            raise InputError(
                f"keep[{name!r}] must be integer indices of kept units with "
                f"{len(group.shape)} axes, got {indices.dtype}{list(indices.shape)}; of a bool "
                "array take numpy.flatnonzero"
            )
        if group.copies is not None and len(indices) != group.copies:
            raise InputError(
                f"keep[{name!r}] must have a row for each of the {group.copies} copies, got "
                f"{len(indices)}"
            )
        if indices.size == 0:
            raise InputError(f"keep[{name!r}] keeps nothing; keep at least one unit")
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= group.units:
            raise InputError(
                f"keep[{name!r}] must be within 0 and {group.units - 1}, got "
                f"{low if low < 0 else high}"
            )
        indices = np.sort(indices, axis=-1)
        twice = indices[..., 1:][np.diff(indices, axis=-1) == 0]
        if twice.size:
            raise InputError(f"keep[{name!r}] has unit {twice[0]} twice; keep each once")
        found[name] = indices
    return found


def check_matched(rule: str, group: str, matched: list[str], leaves: Mapping[str, Any]) -> None:
    """Raises InputError if a rule matches no name of a pytree that has arrays."""
    if matched or not any(_has_axes(leaf) for leaf in leaves.values()):
        return  # the state of an optimizer without moments has nothing to cut
    raise InputError(
        f"rule {rule!r} of group {group!r} matches no weight; correct it. Weights are named as "
        f"{tree.short(next(iter(leaves)))!r}"
    )


def _has_axes(leaf: Any) -> bool:
    # Adafactor leaves arrays of one element where it does not use them.
    return getattr(leaf, "shape", ()) not in ((), (1,))


def _fitted(group: Group, group_name: str, rule: str, along: Along, name: str, leaf: Any) -> Along:
    """Returns the `Along` with the axes of one leaf, counted from the front."""
    shape = jnp.shape(leaf)
    axes = [axis for axis in (along.axis, along.copies) if axis is not None]
    where = f"the group {group_name!r} does not fit {tree.short(name)!r} of shape {shape}"
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise InputError(f"{where}: rule {rule!r} has axis {axes[0]}; correct the axis")
    assert along.axis is not None
    axis = along.axis % len(shape)
    copies = None if along.copies is None else along.copies % len(shape)
    inner = (group.copies or 1) if copies == axis else 1
    needed = inner * group.units * along.width
    if shape[axis] != needed:
        parts = f"{group.units} units of width {along.width}"
        parts += f" in each of {inner} copies" if inner > 1 else ""
        raise InputError(
            f"{where}: rule {rule!r} needs {needed} along axis {along.axis} ({parts}), which has "
            f"{shape[axis]}; correct the axis, the width or the number of units"
        )
    if copies is not None and copies != axis and shape[copies] != group.copies:
        raise InputError(
            f"{where}: rule {rule!r} needs {group.copies} copies along axis {along.copies}, which "
            f"has {shape[copies]}; correct the copies"
        )
    return dataclasses.replace(along, axis=axis, copies=copies)


def _check_moments(groups: Groups, values: PyTree) -> None:
    """Refuses moments that are not laid out like their weights."""
    kinds = (optax.FactoredState, optax.ScaleByLBFGSState)
    rules = [(rule, along) for group in groups.values() for rule, along in group.along.items()]
    for node in jax.tree.leaves(values, is_leaf=lambda node: isinstance(node, kinds)):
        factored = isinstance(node, optax.FactoredState)
        if not isinstance(node, kinds):
            continue
        moments = dict(tree.named_leaves(node.v_row if factored else node.diff_params_memory))
        for rule, along in rules:
            named = [name for name in matches(rule, moments) if _has_axes(moments[name])]
            if named and factored:
                raise InputError(
                    f"the optimizer has a factored moment of {tree.short(named[0])!r}, which "
                    "cannot be cut; start the optimizer again from the cut weights"
                )
            if named and along.axis is not None and along.axis >= 0:
                raise InputError(
                    f"the history of L-BFGS has one axis more than {tree.short(named[0])!r}; count "
                    f"axis {along.axis} in rule {rule!r} from the end, as -1 for the last"
                )
