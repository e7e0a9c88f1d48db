"""Partition rules: the first rule whose regular expression matches a path decides."""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.errors import InputError

Rule = tuple[str, tuple[str | None, ...]]
"""Regular expression, and the mesh axis or None for each axis of the array."""


def partition(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> tuple[PyTree, list[str]]:
    """Returns the PartitionSpec of every parameter, and a message per axis that is not sharded.

    The first rule that matches a name (`re.search`) decides. An array with at most one axis that no
    rule matches is replicated. An axis whose size is not a multiple of its mesh axis is not
    sharded, which the messages report.

    Args:
        params: Pytree of arrays, which may be abstract.
        rules: Partition rules in the order in which they are tried.
        mesh: Mesh of devices.

    Raises:
        InputError: If a rule matches nothing, names an unknown mesh axis or one twice, or has more
            axes than its array; or if no rule matches an array with two or more axes.
    """
    # Check the rules: known mesh axes, each at most once, and at least one match.
    for rule, axes in rules:
        named = [axis for axis in axes if axis is not None]
        for axis in named:
            if axis not in mesh.axis_names:
                raise InputError(
                    f"partition rule {rule!r} names axis {axis!r}, which is not in the mesh; use "
                    f"{', '.join(mesh.axis_names)}, or None"
                )
        if len(set(named)) < len(named):
            raise InputError(
                f"partition rule {rule!r} names an axis twice in {axes!r}; one mesh axis can "
                "divide one axis of an array"
            )
    names = [name for name, leaf in tree.named_leaves(params) if leaf is not None]
    tree.matched((rule for rule, _ in rules), names, "partition rule", "parameter")
    uneven: list[str] = []

    def spec(name: str, leaf: Any) -> PartitionSpec:
        # Replicate along axes that the mesh does not divide evenly, and report them.
        axes = _axes_of(name, leaf, rules)
        whole = []
        for size, axis in zip(leaf.shape, axes, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                uneven.append(
                    f"{name} {list(leaf.shape)} is not sharded over {axis!r}: {size} is not a "
                    f"multiple of {mesh.shape[axis]}"
                )
                axis = None
            whole.append(axis)
        return PartitionSpec(*whole)

    return tree.map_named(spec, params), uneven


def _axes_of(name: str, leaf: Any, rules: Sequence[Rule]) -> tuple[str | None, ...]:
    for rule, axes in rules:
        if tree.rule_matches(rule, name):
            if len(axes) > leaf.ndim:
                raise InputError(
                    f"partition rule {rule!r} has {len(axes)} axes and {name!r} of shape "
                    f"{tuple(leaf.shape)} has {leaf.ndim}; give at most {leaf.ndim}"
                )
            return axes
    if leaf.ndim > 1 and math.prod(leaf.shape) > 1:
        raise InputError(
            f"no partition rule matches {name!r} of shape {tuple(leaf.shape)}; add one, such as "
            f"({name!r}, ({', '.join(['None'] * leaf.ndim)})) to replicate it on every device"
        )
    return ()
