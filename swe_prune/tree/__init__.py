"""Names of leaves, and selection of leaves by path rules.

A leaf is named by its path, such as `"block_0/mlp/up/kernel"`. `None` is a leaf here and means
dense.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from swe_prune.annotations import has_shape
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_texts, listed, shown
from swe_prune.tree import pairing
from swe_prune.tree.dense_rules import DENSE_BY_DEFAULT as DENSE_BY_DEFAULT
from swe_prune.tree.holders import Held as Held
from swe_prune.tree.holders import held as held
from swe_prune.tree.holders import level_of as level_of
from swe_prune.tree.holders import opt_state_of as opt_state_of
from swe_prune.tree.pairing import is_absent as is_absent
from swe_prune.tree.pairing import placed_leaves as placed_leaves
from swe_prune.tree.pairing import short as short


def is_none(leaf: Any) -> bool:
    """Returns whether a leaf is None; pass it as `is_leaf` to make JAX treat None as a leaf."""
    return leaf is None


def named_leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) in the order of `jax.tree.leaves`, None leaves included.

    A name does not depend on how the leaf is held: a Flax box, such as `nnx.Param` or
    `nn.Partitioned`, adds nothing to it.

    Raises:
        InputError: If two leaves have the same name.

    >>> list(named_leaves({"a": {"kernel": 1}, "b": None}))
    [('a/kernel', 1), ('b', None)]
    """
    names, leaves, _ = pairing.flatten(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is None or not is_absent(leaf):  # optax's MaskedNode is not a leaf elsewhere
            yield name, leaf


def present(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves that are not None by name.

    >>> present({"a": {"kernel": 1}, "b": None})
    {'a/kernel': 1}
    """
    return {name: leaf for name, leaf in named_leaves(tree) if leaf is not None}


def map_named(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns the tree of `f(name, leaf, *leaves of rest)`; None leaves of `tree` stay None.

    Args:
        f: Function of a name, a leaf of `tree`, and the matching leaf of each tree in `rest`.
        tree: Pytree to map over; the result has its containers.
        *rest: Pytrees with the names of `tree`; see `map_leaves`.

    Raises:
        InputError: If a tree in `rest` has other names, or two leaves have the same name.
    """

    def unless_none(name: str, leaf: Any, *others: Any) -> Any:
        return leaf if is_absent(leaf) else f(name, leaf, *others)

    return map_leaves(unless_none, tree, *rest)


def map_leaves(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns the tree of `f(name, leaf, *leaves of rest)`; `f` also receives None leaves.

    Leaves belong together by name, so the containers may differ: a dict and a FrozenDict or an
    `nnx.State`, a list and a tuple, boxed and unboxed leaves, an NNX module and its pure dict. A
    tree in `rest` may have more leaves if they are None. It may lack what no mask can have: None,
    functions, and `nnx.Variable`s other than `nnx.Param`; for these `f` receives None.

    Args:
        f: Function of a name, a leaf of `tree`, and the matching leaf of each tree in `rest`.
        tree: Pytree to map over; the result has its containers.
        *rest: Pytrees with the names of `tree`.

    Raises:
        InputError: If a tree in `rest` has other names, or two leaves have the same name; the
            first path that differs is in the message.

    >>> map_leaves(lambda name, a, b: a + b, {"w": (1, 2)}, {"w": [10, 20]})
    {'w': (11, 22)}
    """
    names, leaves, treedef = pairing.flatten(tree)
    others = [pairing.aligned(names, tree, treedef, other) for other in rest]
    return treedef.unflatten(map(f, names, leaves, *others))


def map_tracked(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f` over the leaves that are not None, like `jax.tree.map`; None stays None."""
    return map_named(lambda _, *leaves: f(*leaves), tree, *rest)


def by_suffix(name: str, of_params: Mapping[str, Any]) -> Any:
    """Returns the value of the parameter that a leaf of an optimizer's state belongs to, or None.

    A part of the state belongs to a parameter when its name ends in the parameter's, which is so
    in all of optax; of several the longest.

    Args:
        name: Name of the leaf in the state.
        of_params: Values by the names of the parameters.

    >>> by_suffix("0/mu/a/w", {"w": 1, "a/w": 2})
    2
    """
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts) + 1))  # the longest first
    return next((of_params[end] for end in ends if end in of_params), None)


def is_weight(leaf: Any) -> bool:
    """Returns whether a leaf is a floating-point array; it may be traced or abstract."""
    array = hasattr(leaf, "dtype") and not isinstance(leaf, type)
    return array and jnp.issubdtype(leaf.dtype, jnp.floating)


def prunable(
    params: PyTree,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    layout: PyTree | None = None,
) -> PyTree:
    """Returns a bool pytree that is True where the weight may be pruned.

    A leaf is prunable if an `include` rule matches its name (`re.search`) and no `exclude` rule
    does. Without `include`, all floating-point leaves with two or more axes are included, of
    Linen's variables or a training state only those under "params". Without `exclude`, embeddings,
    norms, biases, routers and the output head are excluded, under the names that the usual
    frameworks give them (`DENSE_BY_DEFAULT`).

    Args:
        params: Pytree of arrays; only floating-point leaves can be prunable.
        include: Regular expressions, each of which must match a floating-point leaf.
        exclude: Regular expressions, each of which must match a floating-point leaf.
        layout: Pytree of `layout.Axes` like `params`. Without `include`, only kernels are then
            included, of two or more axes in each copy: no lookup tables, no weights that rank
            experts, and none that no product uses.

    Raises:
        InputError: If a rule is not a regular expression or matches no weight, or if nothing is
            prunable.

    >>> params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> prunable(params)
    {'up': {'bias': False, 'kernel': True}}
    """
    include, exclude = (
        None if rules is None else check_texts(rules, what)
        for rules, what in ((include, "include"), (exclude, "exclude"))
    )
    weights = {name: leaf for name, leaf in named_leaves(params) if is_weight(leaf)}
    for kind, rules in (("include", include), ("exclude", exclude)):
        matched(rules or (), weights, f"{kind} rule")
    axes = {} if layout is None else dict(named_leaves(layout))
    within = level_of(params)
    chosen = {
        name: (include is not None or name.startswith(within))
        and not dense_reason(name, leaf, include, exclude, axes.get(name))
        for name, leaf in weights.items()
    }
    if not any(chosen.values()):
        told = [
            f"{name} ({dense_reason(name, leaf, include, exclude, axes.get(name))})"
            for name, leaf in named_leaves(params)
            if hasattr(leaf, "shape")
        ]
        by_default = "" if exclude is not None else ", or give exclude=() to let all weights in"
        raise InputError(
            f"no weight is prunable under include={include!r}, exclude={exclude!r}; "
            f"widen the rules{by_default}. Weights: {listed(told, 12, str) or 'none'}"
        )
    return map_named(lambda name, _: chosen.get(name, False), params)


def check_marks(marks: PyTree, what: str = "") -> PyTree:
    """Returns a tree that says which weights are prunable.

    Args:
        marks: Bool pytree.
        what: What is to be done with the prunable weights, of which there must be one; for the
            error. If empty, none is needed.

    Raises:
        InputError: A leaf is neither True, False nor None, as of a mask or of strings, or no
            weight is prunable.
    """
    for name, leaf in named_leaves(marks):
        if leaf is not None and not isinstance(leaf, bool | np.bool_):
            where = f" of {short(name)!r}" if name else ""
            raise InputError(
                f"prunable{where} must be True or False, got {shown(leaf)}; give the tree that "
                "tree.prunable returns"
            )
    if what and not any(present(marks).values()):
        raise _none_prunable(what)
    return marks


def _none_prunable(what: str) -> InputError:
    return InputError(f"no weight is prunable, so there is nothing to {what}; widen the rules")


def map_prunable(
    f: Callable[..., Any], params: PyTree, prunable_tree: PyTree | None, *rest: PyTree
) -> PyTree:
    """Returns the tree of `f(name, weight, *leaves of rest)`, None where dense.

    Args:
        f: Function of a name, a prunable weight, and the matching leaf of each tree in `rest`.
        params: Pytree of weights.
        prunable_tree: Bool pytree like `params`. If None, `prunable(params)`.
        *rest: Pytrees like `params`.

    Raises:
        InputError: Errors of `check_marks` and `map_named`.

    >>> map_prunable(lambda name, w: w.shape, {"kernel": jnp.ones((1, 2)), "bias": 0}, None)
    {'bias': None, 'kernel': (1, 2)}
    """
    marks = prunable(params) if prunable_tree is None else check_marks(prunable_tree)

    def chosen(name: str, weight: Any, mark: Any, *others: Any) -> Any:
        return f(name, weight, *others) if mark else None

    return map_named(chosen, params, marks, *rest)


def prunable_leaves(params: PyTree, prunable_tree: PyTree | None, what: str) -> dict[str, Any]:
    """Returns the prunable weights by name.

    Args:
        params: Pytree of weights.
        prunable_tree: Bool pytree like `params`. If None, `prunable(params)`.
        what: What is to be done with the weights, for the error.

    Raises:
        InputError: If no weight is prunable.
    """
    found = present(map_prunable(lambda _, weight: weight, params, prunable_tree))
    if not found:
        raise _none_prunable(what)
    return found


def dense_reason(
    name: str,
    leaf: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    axes: Any = None,
) -> str:
    """Returns why a leaf is dense under the rules of `prunable`, or `""` if it is prunable.

    Args:
        name: Name of the leaf.
        leaf: Leaf, which may be abstract.
        include: Rules as in `prunable`.
        exclude: Rules as in `prunable`.
        axes: `layout.Axes` of the leaf, or None.
    """
    if not is_weight(leaf):
        return "not a floating-point array"
    if include is None and leaf.ndim < 2:
        return "fewer than two axes"
    if axes is not None and not hasattr(axes, "dense_reason"):
        raise InputError(
            f"the layout of {short(name)!r} must be layout.Axes, got {shown(axes)}; give what "
            "swe_prune.layout returns"
        )
    if include is None and axes is not None and axes.dense_reason:
        return axes.dense_reason
    if include is not None and not any(rule_matches(rule, name) for rule in include):
        return "no include rule matches"
    if exclude is None:
        return next(
            (kind for kind, rule in DENSE_BY_DEFAULT.items() if rule_matches(rule, name)), ""
        )
    for rule in exclude:
        if rule_matches(rule, name):
            return f"exclude rule {rule!r}"
    return ""


def rule_matches(rule: str, name: str) -> bool:
    """Returns whether a path rule matches a name (`re.search`).

    Raises:
        InputError: If the rule is not a regular expression.
    """
    try:
        return re.search(rule, name) is not None
    except re.error as error:
        raise InputError(f"rule {rule!r} is not a regular expression: {error}; fix it") from error


def matched(
    rules: Iterable[str], names: Iterable[str], what: str, of: str = "weight", instead: str = ""
) -> dict[str, list[str]]:
    """Returns the names that each path rule matches; one that matches nothing is misspelled.

    Args:
        rules: Path rules.
        names: Names of leaves.
        what: What a rule is, for the error.
        of: What the names are of, for the error.
        instead: What else can be done about it than to correct the rule, for the error.

    Raises:
        InputError: If a rule is not a regular expression, or matches no name.
    """
    known = list(names)
    found = {rule: [name for name in known if rule_matches(rule, name)] for rule in rules}
    for rule, own in found.items():
        if not own:
            raise InputError(
                f"{what} {rule!r} matches no {of}; correct the rule{instead}. "
                f"Names: {listed(known, 12, str) or 'none'}"
            )
    return found


def named_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns a random key for a tensor that depends only on `key` and the tensor's name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def size(values: PyTree) -> int:
    """Returns the number of elements of an array or of all arrays of a pytree, exact at any size.

    >>> size({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    9
    """
    with pairing.keys_checked(values):
        leaves = jax.tree.leaves(values)
    other = next((leaf for leaf in leaves if not has_shape(leaf)), None)
    if other is not None:
        raise InputError(f"size counts the elements of arrays, got {shown(other)}")
    return sum(math.prod(leaf.shape) for leaf in leaves)


@checked
def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of leaves by name.

    >>> nested({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    whole: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        inner = whole
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise InputError(f"{short(name)!r} is the name of a leaf and of a folder; rename one")
        inner[last] = leaf
    return whole


def described(values: PyTree) -> str:
    """Returns the dtypes and shapes of arrays, for error messages.

    >>> import numpy as np
    >>> described({"inputs": np.zeros((2, 3), np.int32)})
    "{'inputs': 'int32[2, 3]'}"
    """

    def one(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if has_shape(leaf) else repr(leaf)

    with pairing.keys_checked(values):
        return str(jax.tree.map(one, values))


def check_finite(what: str, x: Float[Array, "..."], fix: str) -> None:
    """Raises InputError if an array has NaN or inf, which is not known while tracing.

    Args:
        what: Name of the array in the message.
        x: Array to check.
        fix: End of the message, what to do about it.
    """
    if not isinstance(x, Tracer) and not bool(all_finite(x)):
        raise InputError(f"{what} has NaN or inf; {fix}")


@jax.jit  # one program compiles faster than its operations one by one
def all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """Returns whether no element is NaN or infinite."""
    return jnp.isfinite(x).all()
