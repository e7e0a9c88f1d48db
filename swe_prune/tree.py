"""Names of leaves, selection of leaves by path rules, and exact integer counts.

A leaf is named by its path, `"block_0/mlp/up/kernel"`. `None` is a leaf here and means dense.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, UInt32

from swe_prune.errors import InputError

DENSE_BY_DEFAULT = {
    "embedding": r"(?i)embed|(^|/)w[tp]e(/|$)",  # token and position tables, GPT-2's wte and wpe
    # The output, which "MultiHeadDotProductAttention", "multi_head" and "attention/head_0" are not.
    "output head": r"(?i)^((?!\w*att(n|ention))[^/]*/)*(?!multi)"
    r"(\w+_)?(head|logits|classifier)(_\d+)?(/|$)",
    "norm": r"(?i)norm|(^|/)ln\w*(/|$)",
    "bias": r"(?i)(^|/)bias(/|$)",  # a DenseGeneral bias has two axes, so its shape does not tell
}
"""What stays dense unless the rules say otherwise: its name, and the rule that finds it."""


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
    """Returns the tree of `f(name, leaf, *leaves of rest)`; None leaves of `tree` stay None.

    Raises:
        InputError: one of the rest has another structure.
    """

    def unless_none(name: str, leaf: Any, *others: Any) -> Any:
        return None if leaf is None else f(name, leaf, *others)

    return map_leaves(unless_none, tree, *rest)


def map_leaves(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns the tree of `f(name, leaf, *leaves of rest)`, where None is a leaf like any other.

    Raises:
        InputError: one of the rest has another structure.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    try:
        others = [treedef.flatten_up_to(other) for other in rest]
    except ValueError as error:
        raise InputError(
            f"two pytrees that belong together differ in structure: {error}; make the one from the "
            "other, with None for dense leaves"
        ) from error
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    return treedef.unflatten(map(f, names, leaves, *others))


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
    include, exclude = (
        [rules] if isinstance(rules, str) else rules for rules in (include, exclude)
    )
    weights = {name: leaf for name, leaf in named_leaves(params) if is_weight(leaf)}
    for kind, rules in (("include", include), ("exclude", exclude)):
        for rule in rules or ():
            if not any(rule_matches(rule, name) for name in weights):
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
    """Returns whether a path rule is found in a name.

    Raises:
        InputError: the rule is no regular expression.
    """
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
    projections of Flax's attention are (in, heads, width): the first axis alone. Its `out`
    projection (heads, width, out) follows the general rule again. One axis is all inputs.

    >>> input_axes("mlp/up/kernel", (8, 32)), input_axes("attention/query/kernel", (8, 2, 4))
    ((0,), (0,))
    """
    # In nnx every name ends in the name of a field, as in "attention/out/kernel/value".
    if len(shape) == 3 and re.search(r"(^|/)(query|key|(?<!kernel/)value)(/|$)", name):
        return (0,)
    return tuple(range(max(len(shape) - 1, min(len(shape), 1))))


def named_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns a tensor's own random key, which depends on its name and on no other tensor."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def size(values: PyTree) -> int:
    """Returns the number of elements of a leaf, or of all of a pytree's, exact at any size.

    >>> size({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    9
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(values))


@jax.jit  # as one program, which takes less time to compile than each of its operations alone
def all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """Returns whether no element is NaN or infinite."""
    return jnp.isfinite(x).all()


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


def share(size: int | Count, fraction: Float[Array, ""], *, up: bool = True) -> Count:
    """Returns size · fraction as an integer, exactly; both may be traced.

    A float32 product would be wrong from 2^24 on; here the size and the fraction's 48 binary
    digits are multiplied in limbs of 16.

    Args:
        size: below 2^48; traced, as a Count.
        fraction: float32, clipped to [0, 1]; what it has below 2^-48 is cut off.
        up: round to the nearest integer, halves up; False: down.
    """
    clipped = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0) * 2**24
    above = jnp.floor(clipped)
    below = jnp.floor((clipped - above) * 2**24)  # a difference and a power of 2, both exact
    above, below = above.astype(jnp.uint32), below.astype(jnp.uint32)
    digits = [below & 0xFFFF, (below >> 16) | ((above & 0xFF) << 8), above >> 8]
    whole = size if isinstance(size, Count) else count(size)
    limbs = [whole.low, whole.high & 0xFFFF, whole.high >> 16]
    columns = [jnp.uint32(0)] * 6  # each a sum of at most 7 numbers below 2^16
    for i, digit in enumerate(digits):
        for j, limb in enumerate(limbs):
            product = digit * limb
            columns[i + j] += product & 0xFFFF
            columns[i + j + 1] += product >> 16
    columns[2] += jnp.uint32(0x8000 if up else 0)  # a half
    carry = jnp.uint32(0)
    for i, column in enumerate(columns):
        columns[i], carry = (column + carry) & 0xFFFF, (column + carry) >> 16
    return Count((columns[5] << 16) | columns[4], columns[3])


def total(counts: Sequence[Count]) -> Count:
    """Returns the sum of at most 2^16 counts."""
    # Each low limb is below 2^16, so 2^16 of them cannot overflow.
    high, low = jax.tree.map(lambda *limbs: sum(limbs[1:], limbs[0]), *counts)
    return Count(high + (low >> 16), low & 0xFFFF)


def count_true(masks: Sequence[Array], axes: tuple[int, ...] | None = None) -> Count:
    """Returns how many elements of all the bool arrays together are True, exactly.

    Args:
        masks: bool arrays of fewer than 2^32 elements each and at most 2^16 of them.
        axes: count along these axes, which are kept with length 1; None: all, to a scalar.
    """
    return total([count(count_each([mask], axes)[0]) for mask in masks])


def count_each(
    masks: Sequence[Array], axes: tuple[int, ...] | None = None
) -> list[UInt32[Array, "..."]]:
    """Returns the number of True of each of several masks of one shape, in one pass over them.

    Args:
        masks: bool arrays of one shape, of fewer than 2^32 elements each.
        axes: as in `count_true`.
    """
    along = tuple(range(masks[0].ndim)) if axes is None else axes
    keep = axes is not None
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or not along:
        return [jnp.sum(mask, axis=along, dtype=jnp.uint32, keepdims=keep) for mask in masks]
    # XLA for CPU first writes the operand of a plain integer sum to memory, which takes ten times
    # as long; a reduction of several operands at once it fuses with what they are made of. Not over
    # several devices: the partitioner all-reduces plain sums, and gathers the others' parts.
    if len(masks) == 1:
        true, false = _fused_counts([masks[0], ~masks[0]], along)
        whole = math.prod(masks[0].shape[axis] for axis in along)
        counts = [jnp.minimum(true, jnp.uint32(whole) - false)]  # the two are equal
    else:
        counts = _fused_counts(masks, along)
    return [jnp.expand_dims(n, along) for n in counts] if keep else counts


def _fused_counts(masks: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
    operands = tuple(mask.astype(jnp.uint32) for mask in masks)
    zeros = (jnp.zeros((), jnp.uint32),) * len(masks)
    return list(jax.lax.reduce(operands, zeros, _add_each, axes))


def _add_each(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, ...]:
    # Of the module, as jax compiles an eager reduction anew for every new function.
    return tuple(a + b for a, b in zip(left, right, strict=True))
