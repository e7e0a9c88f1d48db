"""Weights that data picks: by lookup, by a switch under `vmap`, or by a product with a one-hot."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from swe_prune.layout.notes import Cell, Notes
from swe_prune.layout.operations import view_of
from swe_prune.layout.primitives import PICKS, dot_sides
from swe_prune.layout.views import Piece, View

_INDEX, _ONE_HOT = -1, -2
"""In place of a weight in the view of 0, 1, 2, …, and of what is 0 but where data equals it."""
_MOVES = ("convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze")
_WEIGHS = ("mul", "reduce_sum", "dot_general")
"""What leaves an index an index and a one-hot a selection, and what the latter alone."""


def picks(eqn: Any, cells: list[Cell]) -> bool:
    """Returns whether an equation picks weights or parts of them."""
    return eqn.primitive.name in PICKS or _chooses(eqn, cells) or picks_matrices(eqn, cells)


def _chooses(eqn: Any, cells: list[Cell]) -> bool:
    """Returns whether data chooses between weights, as a switch under `vmap` does."""
    chosen = eqn.primitive.name == "select_n" and cells[0].data
    return chosen and not any(cell.data for cell in cells[1:])


def picks_matrices(eqn: Any, cells: list[Cell]) -> bool:
    """Returns whether a product with a one-hot picks matrices out of a stack of them."""
    if eqn.primitive.name != "dot_general":
        return False
    for at, (cell, other) in enumerate(zip(cells, reversed(cells), strict=True)):
        summed, _ = dot_sides(eqn.params["dimension_numbers"], at)
        their, _ = dot_sides(eqn.params["dimension_numbers"], 1 - at)
        for view in cell.views if cell.is_weight and other.data else ():
            rest = view.with_dims([dim for d, dim in enumerate(view.dims) if d not in summed])
            named = [d for d in summed if view.dims[d]]
            if named and named == by_one_hot(view, other, summed, their) and rest.wide >= 2:
                return True
    return False


def by_one_hot(
    view: View, other: Cell, contracted: Sequence[int], their: Sequence[int]
) -> list[int]:
    """Returns the dimensions of a weight that a product sums over with a one-hot."""
    hot = [one for one in other.index if one.leaf == _ONE_HOT]
    pairs = zip(contracted, their, strict=True)
    return [own for own, at in pairs if view.dims[own] and any(one.dims[at] for one in hot)]


def index_of(notes: Notes, eqn: Any, cells: list[Cell]) -> tuple[View, ...]:
    """Returns the dimensions of a value that count 0, 1, 2, …, or that a one-hot has."""
    name, shape = eqn.primitive.name, getattr(eqn.outvars[0].aval, "shape", ())
    if name == "iota":
        counted = Piece(0, eqn.params["shape"][eqn.params["dimension"]], 1)
        dims = [(counted,) if at == eqn.params["dimension"] else () for at in range(len(shape))]
        return (View(_INDEX, tuple(dims)),)
    moved = []
    for at, cell in enumerate(cells):
        for view in cell.index:
            compared = name == "eq" and view.leaf == _INDEX and cells[1 - at].data
            weighed = name in _WEIGHS and view.leaf == _ONE_HOT
            if compared or weighed or name in _MOVES:
                result = view_of(notes, eqn, cells, at, view, eqn.invars[at].aval.shape, shape)
                if result is not None and result.wide:
                    leaf = _ONE_HOT if compared else view.leaf
                    moved.append(dataclasses.replace(result, leaf=leaf, whole=True))
    return tuple(moved)
