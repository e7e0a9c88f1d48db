"""The axes of a weight: inputs, outputs and copies, and where they come from.

Three sources, in this order: `Axes` given explicitly (`layout=`, which `layout.layout` traces from
the computation), a function of name and shape (`input_axes=`), and Flax's naming convention.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice

KINDS = ("kernel", "embedding", "router", "vector", "unknown")

InputAxes = Callable[[str, tuple[int, ...]], tuple[int, ...]]
AxesOf = Callable[[str, tuple[int, ...]], "Axes"]


@checked
@dataclasses.dataclass(frozen=True)
class Axes:
    """What each axis of a weight is in the computation that uses it.

    Every axis is exactly one of inputs, outputs and copies. An `Axes` is a leaf of a pytree.

    Attributes:
        inputs: Axes that a product sums over.
        outputs: Axes that remain in its result.
        copies: Axes over separate tensors of the same shape: the layers of a scan, the members of
            a `vmap`, experts. Every rule treats each copy as a tensor of its own.
        kind: What the weight does: "kernel", multiplied with activations; "embedding", only read
            by a lookup; "router", a kernel whose result is ranked by `top_k` or `argmax`;
            "vector", in no product; "unknown", used by an operation that the trace cannot follow.
        last: Whether only elementwise operations and reductions lie between the result of the
            product and the result of the function, as for an output head.
        also: Axes of further products with another orientation, as of a tied weight.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    kind: str = "kernel"
    last: bool = False
    also: tuple["Axes", ...] = ()

    def __post_init__(self):
        check_choice(self.kind, KINDS, "kind")
        every = (*self.inputs, *self.outputs, *self.copies)
        if len(set(every)) < len(every) or any(axis < 0 for axis in every):
            raise InputError(
                f"axes must be distinct and counted from 0, got inputs={self.inputs}, "
                f"outputs={self.outputs}, copies={self.copies}; list every axis once"
            )

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.inputs) + len(self.outputs) + len(self.copies)

    @property
    def one_copy(self) -> "Axes":
        """Axes of one copy, counted without the axes of the copies."""

        def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - sum(copy < axis for copy in self.copies) for axis in axes)

        return dataclasses.replace(
            self, inputs=shifted(self.inputs), outputs=shifted(self.outputs), copies=(), also=()
        )

    @property
    def dense_reason(self) -> str:
        """Why the weight is dense by default, or `""`."""
        if self.kind == "embedding" or any(axes.kind == "embedding" for axes in self.also):
            return "read by a lookup"
        if self.kind == "router":
            return "router"
        if self.kind == "vector":
            return "in no product"
        if self.ndim - len(self.copies) < 2:
            return "fewer than two axes in each copy"
        return ""

    def moved(self, value: Array) -> Array:
        """Returns an array like the weight with its axes in the order copies, inputs, outputs."""
        return jnp.transpose(value, (*self.copies, *self.inputs, *self.outputs))


@checked
def conventional_axes(name: str, shape: tuple[int, ...]) -> Axes | None:
    """Returns the axes of a kernel by Flax's naming convention, or None if it does not say.

    The convention names kernels "kernel". A `Dense` kernel is (in, out), a `Conv` kernel
    (…, in, out) under a name with "conv", the query, key and value kernels of Flax's attention
    (in, heads, width) and its out kernel (heads, width, out). Haiku's "linear/w" and "conv2_d/w"
    are laid out in the same way. A single axis is an input axis. A kernel with more axes may as
    well be stacked by a scan or a `vmap`, which no name tells.

    >>> conventional_axes("mlp/up/kernel", (8, 32)).inputs
    (0,)
    >>> conventional_axes("layers/up/kernel", (3, 8, 32)), conventional_axes("up/weight", (8, 8))
    (None, None)
    """
    ndim = len(shape)
    if ndim == 1:
        return Axes((0,), ())
    parts = re.split(r"[/.]", name)
    owner = parts[-2] if len(parts) > 1 else ""
    haiku = parts[-1:] == ["w"] and re.fullmatch(r"(linear|conv\d?_?d?)(_\d+)?", owner)
    if parts[-1:] != ["kernel"] and not haiku:
        return None
    inputs = None
    if ndim == 2:
        inputs = (0,)
    elif "conv" in owner.lower() and ndim <= 5:
        inputs = tuple(range(ndim - 1))
    elif ndim == 3 and owner in ("query", "key", "value", "out"):
        inputs = _attention_inputs(owner == "out", shape, parts[:-2])
    if inputs is None:
        return None
    return Axes(inputs, tuple(axis for axis in range(ndim) if axis not in inputs))


def _attention_inputs(
    out: bool, shape: tuple[int, ...], parents: list[str]
) -> tuple[int, ...] | None:
    """Returns the inputs of a 3-D kernel of Flax's attention, or None if it may be a stack of 2-D.

    The heads of an attention have together at most the model's width, the layers of a stack do
    not; and "layers/attention" may be a scan over Dense projections, "layers_0/attention" is not.
    """
    width = shape[2] if out else shape[0]
    heads = math.prod(shape) // max(width, 1)
    stack = r"(?i)(layer|block|stack|scan|expert)s?(_?scan)?"
    stacked = any(re.fullmatch(stack, parent) for parent in parents)
    indexed = any(re.search(r"\d", parent) for parent in parents)
    if heads > width or (stacked and not indexed):
        return None
    return (0, 1) if out else (0,)


def axes_of(layout: PyTree | None = None, input_axes: InputAxes | None = None) -> AxesOf:
    """Returns the function from a tensor's name and shape to its axes.

    Args:
        layout: Pytree of `Axes` like the parameters. None in place of a leaf, or of all: the
            other sources say.
        input_axes: Function from a name and a shape to the input axes; all other axes are outputs.

    Raises (the function):
        InputError: The axes are not known or do not fit the shape.
    """
    given = _by_name(layout)

    def axes(name: str, shape: tuple[int, ...]) -> Axes:
        found = _given(name, given)
        if found is not None:
            return _fitting(name, shape, found)
        if input_axes is not None:
            return _from_inputs(name, shape, input_axes(name, shape))
        found = conventional_axes(name, shape)
        if found is None:
            raise InputError(
                f"which axes of {name!r}, shape {tuple(shape)}, are its inputs is not known; pass "
                "layout=swe_prune.layout(fn, params, batch), which traces it, or name it by "
                "Flax's convention (a 2-D '…/kernel' is (in, out)), or give "
                "input_axes=lambda name, shape: …"
            )
        return found

    return axes


def copies_of(layout: PyTree | None) -> Callable[[str, tuple[int, ...]], tuple[int, ...]]:
    """Returns the function from a tensor's name and shape to its axes over copies.

    Unlike `axes_of` it raises nothing for a tensor of unknown orientation, which has none.
    """
    given = _by_name(layout)

    def copies(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        found = _given(name, given)
        return () if found is None else _checked(name, shape, found).copies

    return copies


@checked
def split(named: Mapping[str, Any], layout: PyTree | None) -> dict[str, Any]:
    """Returns the tensors by name with each copy as a tensor of its own, "name[i]" or "name[i,j]".

    >>> axes = {"w": Axes((1,), (2,), copies=(0,))}
    >>> list(split({"w": jnp.ones((2, 3, 4))}, axes))
    ['w[0]', 'w[1]']
    """
    copies = copies_of(layout)
    parts = {}
    for name, leaf in named.items():
        axes = copies(name, leaf.shape) if hasattr(leaf, "shape") else ()
        if not axes:
            parts[name] = leaf  # also what is not an array, which is dense
            continue
        for index, label in copy_labels(name, leaf.shape, axes):
            parts[label] = leaf[index]
    return parts


@checked
def copy_labels(
    name: str, shape: tuple[int, ...], copies: tuple[int, ...]
) -> list[tuple[tuple[Any, ...], str]]:
    """Returns the index expression and the name of every copy of a tensor, in row-major order."""
    if any(not -len(shape) <= axis < len(shape) for axis in copies):
        raise InputError(f"copies of {name!r} must be axes of its shape {shape}, got {copies}")
    sizes = [shape[axis] for axis in copies]
    labels = []
    for at in np.ndindex(*sizes):
        index: list[Any] = [slice(None)] * len(shape)
        for axis, position in zip(copies, at, strict=True):
            index[axis] = position
        labels.append((tuple(index), f"{name}[{','.join(map(str, at))}]"))
    return labels


def _given(name: str, given: Mapping[str, Axes]) -> Axes | None:
    """Returns the axes that a layout has for a weight; not those of another level of names."""
    for other in (f"params/{name}", name.removeprefix("params/")):
        if name not in given and other in given:
            raise InputError(
                f"the layout has {tree.short(other)!r} where the weights have "
                f"{tree.short(name)!r}; give both with or both without the level 'params'"
            )
    return given.get(name)


def _by_name(layout: PyTree | None) -> dict[str, Axes]:
    found = {}
    for name, leaf in () if layout is None else tree.named_leaves(layout):
        if leaf is None:
            continue
        if not isinstance(leaf, Axes):
            raise InputError(
                f"layout must hold swe_prune.Axes or None, got {type(leaf).__name__} for {name!r}; "
                "make it by swe_prune.layout(fn, params, batch)"
            )
        found[name] = leaf
    return found


def _fitting(name: str, shape: tuple[int, ...], axes: Axes) -> Axes:
    axes = _checked(name, shape, axes)
    two_ways = any(other.kind == "kernel" for other in axes.also)
    if axes.kind == "unknown" or two_ways or not axes.inputs:
        what = {
            "unknown": "is used by an operation that the trace cannot follow, or in parts of an "
            "axis that holds several things, such as experts and inputs",
            "embedding": "is only read by a lookup",
            "vector": "is in no product",
        }.get(axes.kind, "is used in products of different orientation")
        raise InputError(
            f"{name!r} {what}, so its inputs are not known; exclude it, store it with an axis for "
            "each, or give its Axes explicitly in layout="
        )
    return axes


def _checked(name: str, shape: tuple[int, ...], axes: Axes) -> Axes:
    if axes.ndim != len(shape) or any(
        axis >= len(shape) for axis in (*axes.inputs, *axes.outputs, *axes.copies)
    ):
        raise InputError(
            f"the layout of {name!r} has {axes.ndim} axes and the tensor has shape {tuple(shape)}; "
            "trace the layout on these parameters"
        )
    return axes


def _from_inputs(name: str, shape: tuple[int, ...], inputs: Any) -> Axes:
    inputs = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    if any(not -len(shape) <= axis < len(shape) for axis in inputs):
        raise InputError(
            f"input_axes gave {inputs} for {name!r} of shape {tuple(shape)}; give axes that it has"
        )
    inside = tuple(sorted({axis % len(shape) for axis in inputs}))
    return Axes(inside, tuple(axis for axis in range(len(shape)) if axis not in inside))
