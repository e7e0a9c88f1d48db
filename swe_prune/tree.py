"""Names of leaves, selection of leaves by path rules, and exact integer counts.

A leaf is named by its path, `"block_0/mlp/up/kernel"`. `None` is a leaf here and means dense.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from swe_prune.errors import InputError

DENSE_BY_DEFAULT = (
    r"(?i)embed|(^|/)w[tp]e(/|$)",  # token and position tables, GPT-2's wte and wpe
    r"(?i)(^|/)(\w+_)?(head|logits|classifier)(_\d+)?(/|$)",  # the output, not MultiHeadAttention
    r"(?i)norm|(^|/)ln\w*(/|$)",
    r"(?i)(^|/)bias(/|$)",  # a DenseGeneral bias has two axes, so its shape does not give it away
)


def is_none(leaf: Any) -> bool:
    """Returns whether a leaf is None; as `is_leaf` it makes jax see None as a leaf."""
    return leaf is None


def named_leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) in the order of `jax.tree.leaves`, None leaves included.

    >>> list(named_leaves({"a": {"kernel": 1}, "b": None}))
    [('a/kernel', 1), ('b', None)]
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def map_named(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns the tree of `f(name, leaf, *leaves of rest)`; None leaves of `tree` stay None."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    others = [treedef.flatten_up_to(other) for other in rest]
    out = []
    for i, (path, leaf) in enumerate(paths):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        out.append(None if leaf is None else f(name, leaf, *(other[i] for other in others)))
    return treedef.unflatten(out)


def map_tracked(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns `jax.tree.map` over the leaves of `tree` that are not None; the others stay None."""
    return map_named(lambda _, *leaves: f(*leaves), tree, *rest)


def is_weight(leaf: Any) -> bool:
    """Returns whether a leaf is a floating-point array: an array, a tracer, or an abstract one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def prunable(
    params: PyTree,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> PyTree:
    """Returns a bool per leaf: True where the weight may be pruned.

    A leaf is prunable when any `include` rule is found in its name (`re.search`) and no `exclude`
    rule is. Without `include`, every floating-point leaf with two axes or more is; without
    `exclude`, embeddings, norms, biases and the output head are dense (`DENSE_BY_DEFAULT`).

    Args:
        params: pytree of arrays of any kind; only floating-point leaves can be prunable.
        include: regular expressions; each must match a floating-point leaf.
        exclude: regular expressions; each must match one too.

    Raises:
        InputError: a rule is no regular expression or matches no weight, or nothing is prunable.

    >>> params = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> prunable(params)
    {'up': {'bias': False, 'kernel': True}}
    """
    weights = {name: leaf for name, leaf in named_leaves(params) if is_weight(leaf)}
    for kind, rules in (("include", include), ("exclude", exclude)):
        for rule in rules or ():
            if not any(_found(rule, name) for name in weights):
                raise InputError(
                    f"{kind} rule {rule!r} matches no weight; correct it. "
                    f"Weights: {_abbreviated(list(weights))}"
                )
    chosen = {
        name: not dense_reason(name, leaf, include, exclude) for name, leaf in weights.items()
    }
    if not any(chosen.values()):
        raise InputError(
            f"no weight is prunable under include={include!r}, exclude={exclude!r}; "
            f"widen the rules. Weights: {_abbreviated(list(weights)) or 'none'}"
        )
    return map_named(lambda name, _: chosen.get(name, False), params)


def dense_reason(
    name: str, leaf: Any, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> str:
    """Returns why a leaf stays dense under the rules of `prunable`, or `""` when it is prunable."""
    if not is_weight(leaf):
        return "not a floating-point array"
    if include is None and leaf.ndim < 2:
        return "fewer than two axes"
    if include is not None and not any(_found(rule, name) for rule in include):
        return "no include rule matches"
    for rule in DENSE_BY_DEFAULT if exclude is None else exclude:
        if _found(rule, name):
            return f"exclude rule {rule!r}"
    return ""


def _found(rule: str, name: str) -> bool:
    try:
        return re.search(rule, name) is not None
    except re.error as error:
        raise InputError(f"rule {rule!r} is no regular expression: {error}; correct it") from error


def _abbreviated(names: Sequence[str], most: int = 12) -> str:
    more = f", … ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def input_axes(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of a kernel along which its inputs run, by Flax's conventions.

    `Dense` is (in, out) and `Conv` (…, in, out): all axes but the last. The query, key and value
    projections of Flax's attention are (in, heads, width): the first axis alone. Linen's `out`
    projection (heads, width, out) follows the general rule again.

    >>> input_axes("mlp/up/kernel", (8, 32)), input_axes("attention/query/kernel", (8, 2, 4))
    ((0,), (0,))
    """
    if len(shape) == 3 and re.search(r"(^|/)(query|key|value)(/|$)", name):
        return (0,)
    return tuple(range(len(shape) - 1))


def size(leaf: Any) -> int:
    """Returns the number of elements as a Python int, exact at any size."""
    return math.prod(leaf.shape)


class Count(NamedTuple):
    """A non-negative integer below 2^48 in two uint32 limbs of base 2^16, on the device.

    jax has no 64-bit integers by default and a float32 is exact only to 2^24, but a model has more
    weights than either can count. Both limbs may be arrays, for a count per row.
    """

    high: UInt32[Array, "..."]
    low: UInt32[Array, "..."]

    def __ge__(self, other: "Count") -> Any:  # type: ignore[override]  # elementwise, as arrays do
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def equals(self, other: "Count") -> Any:
        """Returns elementwise equality; `==` of a tuple would compare as one object."""
        return (self.high == other.high) & (self.low == other.low)

    def minus(self, other: "Count") -> "Count":
        """Returns the difference, which must not be negative."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        return Count(self.high - other.high - borrow, self.low + (borrow << 16) - other.low)

    def saturated(self) -> UInt32[Array, "..."]:
        """Returns the count as one uint32, or 2^32 − 1 where it is larger."""
        whole = (self.high << 16) | self.low
        return jnp.where(self.high > 0xFFFF, jnp.uint32(0xFFFFFFFF), whole)

    def __int__(self) -> int:
        return (int(self.high) << 16) + int(self.low)


def count(value: Any) -> Count:
    """Returns a Python int, or an integer array of counts below 2^32, as a Count."""
    if isinstance(value, int | np.integer):
        return Count(jnp.uint32(int(value) >> 16), jnp.uint32(int(value) & 0xFFFF))
    value = jnp.asarray(value).astype(jnp.uint32)
    return Count(value >> 16, value & 0xFFFF)


def count_true(masks: Sequence[Array], axes: tuple[int, ...] | None = None) -> Count:
    """Returns how many elements of all the bool arrays together are True, exactly.

    Args:
        masks: bool arrays of fewer than 2^32 elements each and at most 2^16 of them.
        axes: count along these axes, which are kept with length 1; None: all, to a scalar.
    """
    partial = [
        count(jnp.sum(mask, axis=axes, dtype=jnp.uint32, keepdims=axes is not None))
        for mask in masks
    ]
    # Each low limb is below 2^16, so 2^16 of them cannot overflow.
    high, low = jax.tree.map(lambda *limbs: sum(limbs[1:], limbs[0]), *partial)
    return Count(high + (low >> 16), low & 0xFFFF)
