"""What the rules read of a pytree: names, shapes and scores, and which tensors share a value."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from swe_prune import select, tree
from swe_prune.errors import InputError, check_choice

Groups = str | Mapping[str, str] | Callable[[str], str]
"""How tensors are grouped: "block", "tensor", regular expressions by group, or name → group."""

GROUPINGS = ("block", "tensor")

# A component such as "block_0", "layers_11" or "3"; a model called "gpt2" is no block.
_BLOCK = re.compile(r"^(?:[^/]*/)*?(?:(?:\w*_)?|blocks?|layers?|stage|h)\d+(?=/)")


def shapes_of(tensors: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by its name.

    Args:
        tensors: pytree of arrays (scores, weights or `jax.ShapeDtypeStruct`) or of shapes, tuples
            of ints; None where dense.

    Raises:
        InputError: a leaf without a shape, or not one weight in all.
    """
    paths = jax.tree_util.tree_flatten_with_path(tensors, is_leaf=_is_shape_or_none)[0]
    shapes = {}
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf is None:
            continue
        if not _is_shape(leaf) and not hasattr(leaf, "shape"):
            raise InputError(
                f"{name!r} is {leaf!r}, neither an array nor a shape; give scores, weights or "
                "shapes, with None where dense"
            )
        shapes[name] = tuple(leaf if _is_shape(leaf) else leaf.shape)
    if not any(0 not in shape for shape in shapes.values()):
        raise InputError(
            "no tensors were given: every leaf is None, that is dense; widen the rules"
        )
    return shapes


def _is_shape(leaf: Any) -> bool:
    return type(leaf) is tuple and bool(leaf) and all(isinstance(n, int) for n in leaf)


def _is_shape_or_none(leaf: Any) -> bool:
    return leaf is None or _is_shape(leaf)


def scored(scores: PyTree) -> dict[str, jax.Array]:
    """Returns the scores of every tensor by its name.

    Raises:
        InputError: no scores, scores that are no floats, or scores that are being traced.
    """
    named = {name: leaf for name, leaf in tree.named_leaves(scores) if leaf is not None}
    select.check_floats(list(named.values()))
    if not tree.size(named):
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    if any(isinstance(leaf, Tracer) for leaf in named.values()):
        raise InputError(
            "an allocation is made of Python integers, which traced scores do not give; allocate "
            "outside jax.jit"
        )
    return named


def chosen(params: PyTree, prunable: PyTree | None) -> dict[str, Any]:
    """Returns the prunable weights by their names; None: those of `tree.prunable(params)`.

    Raises:
        InputError: nothing is prunable.
    """
    marks = tree.prunable(params) if prunable is None else prunable
    kept = tree.map_named(lambda _, weight, mark: weight if mark else None, params, marks)
    found = {name: leaf for name, leaf in tree.named_leaves(kept) if leaf is not None}
    if not found:
        raise InputError("no weight is prunable, so there is nothing to allocate; widen the rules")
    return found


def grouped(names: Iterable[str], groups: Groups = "block") -> dict[str, list[str]]:
    """Returns the names of the tensors of every group, in the order of their first tensors.

    Args:
        names: of tensors.
        groups: "block", tensors under one numbered component of the path ("block_0", "layers/3",
            the first such) together, any other tensor alone; "tensor", each alone; a mapping of
            group → regular expression found in the names (`re.search`), the first match wins;
            or a function of a name.

    Raises:
        InputError: an unknown grouping, a group without tensors, or a tensor without a group.

    >>> grouped(["block_0/up/kernel", "block_0/down/kernel", "readout/kernel"])
    {'block_0': ['block_0/up/kernel', 'block_0/down/kernel'], 'readout/kernel': ['readout/kernel']}
    """
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_group_of(name, groups), []).append(name)
    if isinstance(groups, Mapping):
        empty = [group for group in groups if group not in members]
        if empty:
            raise InputError(
                f"group {empty[0]!r} has no tensors: its rule {groups[empty[0]]!r} matches none "
                "that an earlier group does not take; correct or drop it"
            )
    return members


def _group_of(name: str, groups: Groups) -> str:
    if isinstance(groups, str):
        check_choice(groups, GROUPINGS, "groups")
        block = _BLOCK.match(name) if groups == "block" else None
        return block.group() if block else name
    if not isinstance(groups, Mapping):
        return groups(name)
    for group, rule in groups.items():
        if tree.rule_matches(rule, name):
            return group
    raise InputError(f"{name!r} is in no group; add a rule that matches it, such as '.*'")
