"""Which axes of every weight are inputs, outputs and copies, asked of the computation itself.

axes          `Axes`, Flax's convention where there is no trace, and what rules do with copies
trace         a user's function, Linen module or NNX module as a jaxpr
walk          the walk through a jaxpr that follows every weight to its products
notes         what the walk knows of values, products and weights
primitives    names of the primitives and readers of their equations
views         which axes of a weight the dimensions of a value run over
operations    what an operation does to views
picks         weights that data picks, by lookup or by a one-hot
products      the roles that a product gives to the axes of a weight
experts       copies that all get the same activations
control_flow  scans, loops and branches

The shape of a kernel does not tell its inputs: Flax has (in, out), Equinox and torch (out, in),
attention (in, heads, width), scans stack layers in front or elsewhere, experts are (E, in, out).
`layout` traces the function and reads the roles from the products in which the weights are used.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.layout.axes import (
    Axes,
    AxesOf,
    InputAxes,
    axes_of,
    conventional_axes,
    copies_of,
    copy_labels,
    split,
)
from swe_prune.layout.notes import Cell, Notes
from swe_prune.layout.trace import Traced, function_of, one_sentence, trace
from swe_prune.layout.walk import Walk


def layout(fn: Any, params: PyTree, batch: PyTree) -> PyTree:
    """Returns the `Axes` of every weight, traced from a function of the parameters.

    Follows every floating-point leaf through casts, transposes, reshapes, slices, multiplications
    by masks and scales, and through jit, remat, custom derivatives, cond, while and scan, to the
    products in which it is used: dimensions that a product sums over are inputs, dimensions that
    both operands share and axes that a scan runs over are copies, the others are outputs. Nothing
    is computed, so parameters and batch may be abstract.

    Args:
        fn: Function of (params, batch), a Linen module, or an NNX module. Modules are applied to
            the batch, or to batch["inputs"] if the batch is a mapping that has it.
        params: Pytree of weights: of a Linen module its "params" or all its variables, of an NNX
            module its state or the module itself.
        batch: Pytree of arrays for one call.

    Returns:
        Pytree like `params` with `Axes`, None where the leaf is not a floating-point array or the
        function does not use it.

    Raises:
        InputError: The function cannot be traced on this batch.

    >>> import jax.numpy as jnp
    >>> params = {"up": {"weight": jnp.ones((32, 8))}}
    >>> found = layout(lambda p, x: x @ p["up"]["weight"].T, params, jnp.ones((4, 8)))
    >>> found["up"]["weight"].inputs, found["up"]["weight"].outputs
    ((1,), (0,))
    """
    with one_sentence("the batch", batch):
        traced = trace(function_of(fn, params), params, batch)
    found = axes_by_name(traced)
    return tree.map_leaves(lambda name, _: found.get(name), params)


def axes_by_name(traced: Traced) -> dict[str, Axes | None]:
    """Returns the axes of every weight of a traced function by name."""
    walk, results = walked(traced)
    last = _last(results, traced.closed.out_avals)
    return {
        name: _axes(walk.notes, number, len(shape), number == last)
        for number, (name, shape) in enumerate(zip(traced.names, traced.shapes, strict=True))
    }


def walked(traced: Traced) -> tuple[Walk, list[Cell]]:
    """Returns what a walk through a traced function found, and its results."""
    walk = Walk(traced.shapes)
    results, _ = walk.run(traced.closed, traced.cells())
    if walk.notes.members:  # which only products further on have shown
        walk = Walk(traced.shapes, members=walk.notes.members)
        results, _ = walk.run(traced.closed, traced.cells())
    return walk, results


def _axes(notes: Notes, number: int, ndim: int, last: bool) -> Axes | None:
    """Returns what the walk found of a weight."""
    uses = notes.uses.get(number) or notes.tentative.get(number, [])
    distinct = [use for at, use in enumerate(uses) if use is not None and use not in uses[:at]]
    every = tuple(range(ndim))
    embedding = number in notes.looked_up
    if None in uses or (not distinct and number in notes.opaque):
        return Axes(outputs=every, kind="unknown")
    if not distinct:
        copies = tuple(sorted(notes.copies.get(number, ())))
        others = tuple(axis for axis in every if axis not in copies)
        return Axes((), others, copies, "embedding" if embedding else "vector")
    kind = "router" if number in notes.ranked else "kernel"
    also = [Axes(**use) for use in distinct[1:]]
    if embedding:
        also.append(Axes(outputs=every, kind="embedding"))
    first = distinct[0]
    if not first["inputs"] or not first["outputs"]:
        kind = "vector"
    return Axes(**first, kind=kind, last=last, also=tuple(also))


def _last(results: Sequence[Cell], avals: Sequence[Any]) -> int | None:
    """Returns the weight that alone gives the floating-point results, or None."""
    sources = [
        cell.sources
        for cell, aval in zip(results, avals, strict=True)
        if cell.data and jnp.issubdtype(aval.dtype, jnp.floating)
    ]
    every = frozenset().union(*sources)
    return next(iter(every)) if len(every) == 1 else None


__all__ = [
    "Axes",
    "AxesOf",
    "InputAxes",
    "axes_by_name",
    "axes_of",
    "conventional_axes",
    "copies_of",
    "copy_labels",
    "layout",
    "split",
    "walked",
]
