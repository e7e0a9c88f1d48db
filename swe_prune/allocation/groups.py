"""Inputs of the allocation rules: names, shapes and scores of tensors, and groups of tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import select, tree
from swe_prune.annotations import has_shape
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.tree import pairing

Groups = str | Mapping[str, str] | Callable[[str], str]
"""Grouping of tensors: "block", "tensor", regular expressions by group, or name → group."""

GROUPINGS = ("block", "tensor")

# A component such as "block_0", "layers_11" or "3", but not a model named "gpt2".
_BLOCK = re.compile(r"^(?:[^/]*/)*?(?:(?:\w*_)?|blocks?|layers?|stage|h)\d+(?=/)")

# A copy of a stacked tensor, such as "layers/mlp/up/kernel[3]", whose block is "layers[3]".
_COPY = re.compile(r"^([^/]+)/.*\[(\d+)[,\]]")


def shapes_of(tensors: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by its name.

    Args:
        tensors: Pytree of arrays (scores, weights or `jax.ShapeDtypeStruct`) or of shapes (tuples
            of ints), None where dense.

    Raises:
        InputError: If a leaf has no shape, or there are no weights.
    """
    shapes = {}
    for name, leaf in pairing.named(tensors, _is_shape_or_none):
        if leaf is None:
            continue
        if not _is_shape(leaf) and not has_shape(leaf):
            raise InputError(
                f"{name!r} must be an array or a shape, got {shown(leaf)}; give scores, weights or "
                "shapes, with None where dense"
            )
        shapes[name] = tuple(leaf if _is_shape(leaf) else leaf.shape)
    if not any(0 not in shape for shape in shapes.values()):
        raise InputError(
            "no tensors were given: every leaf is None, which means dense; widen the rules"
        )
    return shapes


def _is_shape(leaf: Any) -> bool:
    return type(leaf) is tuple and bool(leaf) and all(isinstance(n, int) for n in leaf)


def _is_shape_or_none(leaf: Any) -> bool:
    return leaf is None or _is_shape(leaf)


def scored(scores: PyTree) -> dict[str, jax.Array]:
    """Returns the scores of every tensor by its name.

    Raises:
        InputError: If there are no scores, or scores are not floating-point or are traced.
    """
    named = tree.present(scores)
    select.check_floats(list(named.values()))
    if not tree.size(named):
        raise InputError("no scores were given: every leaf is None, so dense; widen the rules")
    if select.is_traced(named):
        raise InputError(
            "an allocation consists of Python integers, so it cannot be computed from traced "
            "scores; allocate outside jax.jit"
        )
    return named


@checked
def grouped(names: Iterable[str], groups: Groups = "block") -> dict[str, list[str]]:
    """Returns the names of the tensors in each group, in the order of the groups' first tensors.

    Args:
        names: Names of the tensors.
        groups: Grouping of the tensors. "block" groups the tensors under the first numbered
            component of the path ("block_0", "layers/3"), copies of stacked tensors by their
            index, and leaves every other tensor alone.
            "tensor" leaves every tensor alone. A mapping gives a regular expression (`re.search`)
            for each group, of which the first match wins. A function maps names to groups.

    Raises:
        InputError: If the grouping is unknown, a group has no tensors, or a tensor has no group.

    >>> grouped(["block_0/up/kernel", "block_0/down/kernel", "readout/kernel"])
    {'block_0': ['block_0/up/kernel', 'block_0/down/kernel'], 'readout/kernel': ['readout/kernel']}
    """
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_group_of(name, groups), []).append(name)
    if isinstance(groups, Mapping):
        # A group without tensors is probably a misspelled rule.
        empty = [group for group in groups if group not in members]
        if empty:
            raise InputError(
                f"group {empty[0]!r} has no tensors: its rule {groups[empty[0]]!r} matches none "
                "that no earlier group has; correct or drop the group"
            )
    return members


def _group_of(name: str, groups: Groups) -> str:
    if isinstance(groups, str):
        check_choice(groups, GROUPINGS, "groups")
        block = _BLOCK.match(name) if groups == "block" else None
        copy = _COPY.match(name) if groups == "block" else None
        if block is None and copy is not None:
            return f"{copy[1]}[{copy[2]}]"
        return block.group() if block else name
    if not isinstance(groups, Mapping):
        return groups(name)
    for group, rule in groups.items():
        if tree.rule_matches(rule, name):
            return group
    raise InputError(f"{name!r} is not in a group; add a rule that matches it, such as '.*'")
