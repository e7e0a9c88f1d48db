"""Names of leaves, and pairs of pytrees whose leaves belong together by name.

A mask, statistics and an optimizer's state meet weights that another framework's containers hold:
a FrozenDict for a dict, an `nnx.State` for its pure dict, a `nnx.Param` for its array. The name of
a leaf is the same in all of them, so leaves are paired by name wherever the structures differ.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from flax.core import meta
from jaxtyping import PyTree

from swe_prune.arguments import UNSORTED
from swe_prune.errors import InputError

_BOXES = (nnx.Variable, meta.AxisMetadata)
"""What Flax puts around an array; its own key, "value", is not part of a name."""

_LONGEST = 60  # characters of a name in a message


def is_absent(node: Any) -> bool:
    """Returns whether a leaf is None, or what optax puts in the place of a leaf it masks."""
    return node is None or isinstance(node, optax.MaskedNode)


def is_box(node: Any) -> bool:
    """Returns whether a node is a Flax box around an array."""
    return isinstance(node, _BOXES)


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Returns the names and the leaves of a pytree in the order of JAX, and its structure.

    Args:
        tree: Pytree; None and `optax.MaskedNode` count as leaves.

    Raises:
        InputError: If two leaves have the same name.
    """
    with keys_checked(tree):
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_absent)
    names = [name for name, _ in named(tree)]
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise InputError(f"two leaves are named {short(twice)!r}; rename one of them")
    return names, leaves, treedef


@contextlib.contextmanager
def keys_checked(tree: PyTree) -> Iterator[None]:
    """Turns what JAX raises for keys without an order into a sentence, while it flattens."""
    try:
        yield
    except ValueError as error:
        # JAX sorts the keys of a dict, which fails for 1 beside "1".
        if UNSORTED not in str(error):
            raise
        raise InputError(
            f"two leaves are named {short(_twice(tree))!r}, as of keys that are a number and a "
            "string; make the keys of every dict strings that differ"
        ) from None


def _twice(tree: PyTree) -> str:
    """Returns a key that a dict in the tree has as a number and as a string, or any of its keys."""
    found: list[str] = []

    def look(node: Any) -> bool:
        if isinstance(node, Mapping) and len({type(key) for key in node}) > 1:
            keys = [str(key) for key in node]
            found.append(next((key for key in keys if keys.count(key) > 1), keys[0]))
            return True  # JAX need not sort its keys
        return is_absent(node)

    jax.tree.leaves(tree, is_leaf=look)
    return found[0] if found else ""


def _boxes_whole(tree: PyTree, is_leaf: Callable[[Any], bool] = is_absent) -> list[tuple[Any, Any]]:
    with keys_checked(tree):
        return jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda node: is_leaf(node) or is_box(node)
        )[0]


def named(tree: PyTree, is_leaf: Callable[[Any], bool] = is_absent) -> list[tuple[str, Any]]:
    """Returns (name, leaf) of every leaf, where a box adds nothing to the name.

    Args:
        tree: Pytree.
        is_leaf: Function that returns whether a node has no children.
    """
    return [(name, leaf) for name, _, leaf in placed_leaves(tree, is_leaf)]


def placed_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] = is_absent
) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Returns (name, key path, leaf) of every leaf, where a box has no key.

    Args:
        tree: Pytree.
        is_leaf: Function that returns whether a node has no children.
    """
    found = []
    for path, node in _boxes_whole(tree, is_leaf):
        inside = [((), node)]
        if is_box(node):
            inside = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)[0]
        for rest, leaf in inside:
            keys = (*path, *rest[1:])
            found.append((jax.tree_util.keystr(keys, simple=True, separator="/"), keys, leaf))
    return found


def aligned(names: Sequence[str], tree: PyTree, treedef: Any, other: PyTree) -> list[Any]:
    """Returns the leaves of another pytree in the order of the names of the first.

    Args:
        names: Names of the leaves of `tree`.
        tree: First pytree.
        treedef: Structure of `tree`.
        other: Pytree with the same names, in whatever containers. More leaves may be None. What
            only one of the two has may be what `_may_lack` returns; it is None where it is not.

    Raises:
        InputError: If the names differ; the message has the first that does.
    """
    other_names, leaves, other_treedef = flatten(other)
    if other_treedef == treedef:
        return leaves
    by_name = dict(zip(other_names, leaves, strict=True))
    known = set(names)
    missing = set(names) - by_name.keys()
    if missing:
        missing -= _may_lack(tree)
    extra = {name for name, leaf in by_name.items() if name not in known and not is_absent(leaf)}
    if extra:
        extra -= _may_lack(other)
    if missing or extra:
        raise InputError(_difference(missing, extra))
    return [by_name.get(name) for name in names]


def _may_lack(tree: PyTree) -> set[str]:
    """Returns the names of leaves that no mask and no statistics need to have."""
    found = set()
    for path, node in _boxes_whole(tree):
        state = isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if state:
            found |= {n for n, _ in named(node)} | {name}
        elif is_absent(node) or callable(node) or isinstance(node, str):
            found.add(name)
    return found


def _difference(missing: set[str], extra: set[str]) -> str:
    first = min([*missing, *extra])
    which = "only the first has it" if first in missing else "only the second has it"
    more = len(missing) + len(extra) - 1
    told = f", and at {more} other paths" if more > 1 else ", and at 1 other path" if more else ""
    hint = "make one from the other, with None for dense leaves"
    if any(name.startswith("params/") for name in (*missing, *extra)):
        hint = "give both with or both without the level 'params'"
    return (
        f"two pytrees that belong together differ in structure at {short(first)!r} ({which})"
        f"{told}; {hint}"
    )


def emptied(tree: PyTree) -> PyTree:
    """Returns a pytree of the same containers with None for every leaf."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_absent)
    return treedef.unflatten([None] * len(leaves))


def short(name: str) -> str:
    """Returns a name for a message, with its middle left out if it is long."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}"
