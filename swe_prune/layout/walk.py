"""A walk through the computation of a function that follows every weight to its products.

The walk reads the jaxpr of `fn(params, batch)`. For each value it knows which axes of which weights
the value is made of (`views.View`), whether it depends on the batch, and from which products it
comes. Where a weight meets the activations in a `dot_general`, a `ragged_dot` or a convolution,
the walk notes the roles of its axes, and hands the other operand to `measure`.

With values, the walk also computes everything, so that it can be traced and compiled: this is how
calibration measures the inputs of the products of any function, without touching the function.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from swe_prune.layout import control_flow
from swe_prune.layout.experts import experts_of
from swe_prune.layout.notes import Cell, Measure, Notes, Sums
from swe_prune.layout.operations import views_of
from swe_prune.layout.picks import index_of, picks
from swe_prune.layout.primitives import CALLS, INNER, PICKS, PRODUCTS, RANKS
from swe_prune.layout.products import note_products

_CONTROL_FLOW = {
    "scan": control_flow.scan,
    "while": control_flow.while_loop,
    "cond": control_flow.cond,
}


_SAME = ("convert_element_type", "copy", "expand_dims", "name", "reshape", "squeeze", "transpose")
_PARTS = ("broadcast_in_dim", "dynamic_slice", "slice")
"""What leaves a value the same but for its shape and dtype; and what does where no size changes."""


class Walk:
    """A walk.

    Attributes:
        notes: What it found.
        measure: Function of each product to the sums that are wanted. None: nothing is computed.
        depth: Number of scans that enclose the jaxpr that is being walked.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        measure: Measure | None = None,
        members: Mapping[int, set[int]] | None = None,
    ):
        self.notes = Notes(shapes, dict(members or {}))
        self.measure = measure
        self.depth = 0
        self._sums: Sums = {}

    def run(self, closed: Any, cells: Sequence[Cell]) -> tuple[list[Cell], Sums]:
        """Returns the results of a closed jaxpr, and the sums over its products.

        Args:
            closed: Closed jaxpr.
            cells: Its arguments.
        """
        outside, self._sums = self._sums, {}
        constants = [Cell(value if self.measure else None) for value in closed.consts]
        given = [
            cell if cell.number else cell._replace(number=_number(id(closed.jaxpr), at))
            for at, cell in enumerate([*constants, *cells])
        ]
        results = self._follow(closed.jaxpr, given)
        inside, self._sums = self._sums, outside
        return results, inside

    def _follow(self, jaxpr: Any, cells: Sequence[Cell]) -> list[Cell]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], cells, strict=True))

        def read(atom: Any) -> Cell:
            if isinstance(atom, core.Literal):
                return Cell(atom.val if self.measure else None, number=_number(str(atom.val)))
            return known[atom]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._step(eqn, list(map(read, eqn.invars))), strict=True)
        return list(map(read, jaxpr.outvars))

    def _step(self, eqn: Any, cells: list[Cell]) -> list[Cell]:
        """Returns the results of one equation."""
        name = eqn.primitive.name
        if name in _CONTROL_FLOW:
            results = _CONTROL_FLOW[name](self, eqn, cells)
            return [cell._replace(number=_of(eqn, cells, at)) for at, cell in enumerate(results)]
        # Calls of other functions are followed as if they were written here.
        if name in CALLS:
            inner = next(eqn.params[param] for param in INNER if param in eqn.params)
            return self._call(inner, cells)
        if any(hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in eqn.params.values()):
            for cell in cells:
                self.notes.opaque |= {view.leaf: name for view in cell.views}
        if name in PRODUCTS:
            products = note_products(self.notes, eqn, cells)
            if self.measure is not None:
                for product in products:
                    self.add(self.measure(product))
        if name in RANKS:
            self.notes.ranked |= {
                leaf for cell in cells if len(cell.sources) == 1 for leaf in cell.sources
            }
        # Compute the values, then say what they are.
        outputs: Sequence[Any] = [None] * len(eqn.outvars)
        if self.measure:
            params = eqn.primitive.get_bind_params(eqn.params)
            result = eqn.primitive.bind(*(cell.value for cell in cells), **params)
            outputs = result if eqn.primitive.multiple_results else [result]
        data = any(cell.data for cell in cells)
        sources = frozenset().union(*(cell.sources for cell in cells))
        if name in PRODUCTS:
            leaves = [view.leaf for cell in cells if cell.is_weight for view in cell.views]
            sources = frozenset(leaves) if leaves and data else sources
        picked = picks(eqn, cells)
        found = [
            views_of(self.notes, eqn, cells, getattr(var.aval, "shape", ()), number, picked)
            for number, var in enumerate(eqn.outvars)
        ]
        if picked and any(found):
            data = name in PICKS and cells[0].data  # a weight that the data picks is a weight
        experts = experts_of(self.notes, eqn, cells, found)
        index = index_of(self.notes, eqn, cells)
        return [
            Cell(value, held, data, sources, experts, index, _of(eqn, cells, at))
            for at, (value, held) in enumerate(zip(outputs, found, strict=True))
        ]

    def _call(self, inner: Any, cells: list[Cell]) -> list[Cell]:
        closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
        results, sums = self.run(closed, cells)
        self.add(sums)
        return results

    def add(self, sums: Sums) -> None:
        """Adds sums to those of the jaxpr that is being walked."""
        for key, value in sums.items():
            self._sums[key] = (
                jax.tree.map(jnp.add, self._sums[key], value) if key in self._sums else value
            )


def _of(eqn: Any, cells: list[Cell], at: int) -> int:
    """Returns the number of a result, which values computed alike have in common."""
    given = tuple(cell.number for cell in cells)
    whole = eqn.primitive.name in _PARTS and eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    if eqn.primitive.name in _SAME or whole:
        return given[0]
    try:
        how = hash(tuple(eqn.params.items()))
    except TypeError:
        how = id(eqn)
    return _number(eqn.primitive.name, how, given, at)


def _number(*what: Any) -> int:
    return hash(what) or 1
