"""What an operation does to the views of the weights among its operands."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from swe_prune.layout import views
from swe_prune.layout.notes import Cell, Notes
from swe_prune.layout.primitives import (
    CALLS,
    ELEMENTWISE,
    JOINS,
    PICKS,
    PRODUCTS,
    RANKS,
    dot_sides,
)
from swe_prune.layout.views import Piece, View


def views_of(
    notes: Notes, eqn: Any, cells: list[Cell], shape: tuple[int, ...], number: int, picks: bool
) -> tuple[View, ...]:
    """Returns the views of one of the results, of the equation's operands that are weights."""
    by_data = any(cell.data for cell in cells) and eqn.primitive.name not in PICKS
    if by_data and not picks:
        # Activations, whatever they are made of.
        for view in (view for cell in cells for view in cell.views):
            pieces = (*(piece for _, piece in view.scanned), *view.picked)
            notes.copies.setdefault(view.leaf, set()).update(piece.axis for piece in pieces)
        if eqn.primitive.name not in ELEMENTWISE | PRODUCTS | JOINS | CALLS:
            for view in (view for cell in cells for view in cell.views if cell.is_weight):
                notes.opaque.setdefault(view.leaf, eqn.primitive.name)
        return ()
    found = []
    for at, cell in enumerate(cells):
        old = eqn.invars[at].aval.shape
        for view in cell.views:
            result = view_of(notes, eqn, cells, at, view, old, shape, number)
            if result is not None and by_data:
                result = _picked(eqn, at, view, result)
            if result is not None:
                found.append(result)
    return distinct(found)


def view_of(
    notes: Notes,
    eqn: Any,
    cells: list[Cell],
    at: int,
    view: View,
    old: tuple[int, ...],
    new: tuple[int, ...],
    number: int = 0,
) -> View | None:
    """Returns the view of a weight in a result of an equation, or None where it has none.

    Args:
        notes: Where lookups and operations that cannot be followed are noted.
        eqn: Equation.
        cells: Its operands.
        at: Index of the operand that holds the weight.
        view: View of the weight in that operand.
        old: Shape of that operand.
        new: Shape of the result.
        number: Index of the result.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "transpose":
        return views.transposed(view, params["permutation"])
    if name == "reshape":
        order = params.get("dimensions") or range(len(old))  # which it transposes first
        result = views.reshaped(views.transposed(view, order), [old[d] for d in order], new)
        if result is None and not any(cell.data for cell in cells):
            return view.with_dims([()] * len(new), whole=False)  # a product cannot be told
        return result
    if name == "broadcast_in_dim":
        return views.broadcast(view, new, old, params["broadcast_dimensions"])
    if name == "squeeze":
        return views.squeezed(view, params["dimensions"])
    if name == "expand_dims":
        return views.reshaped(view, old, new)
    if name == "slice":
        return views.sliced(view, old, new, params["start_indices"])
    if name == "split":
        starts = [0] * len(old)
        starts[params["axis"]] = int(sum(params["sizes"][:number]))
        return views.sliced(view, old, new, starts)
    if name == "unstack":  # a slice at each position, without the axis
        axis = params["axis"]
        starts = [0] * len(old)
        starts[axis] = number
        one = [1 if at == axis else size for at, size in enumerate(old)]
        return views.squeezed(views.sliced(view, old, one, starts), [axis])
    if name == "dynamic_slice" and at == 0:
        return views.sliced(view, old, new, [cell.value for cell in cells[1 : 1 + len(old)]])
    if name == "gather" and at == 0:
        return _gathered(notes, eqn, cells, view, old)
    if name in ("concatenate", "pad", "rev"):
        # The roles stay known. The place within the joined dimension does not, which its size
        # says where it runs over an axis of the weight.
        alone = any(
            a != b and not view.dims[at] for at, (a, b) in enumerate(zip(old, new, strict=True))
        )
        return dataclasses.replace(view, whole=view.whole and name != "rev" and not alone)
    if name == "stack":
        dims = list(view.dims)
        dims.insert(params["axis"], ())
        return view.with_dims(dims, whole=False)
    if name == "dot_general":
        return _of_product(eqn, cells, at, view)
    if name in ("reduce_sum", "reduce_max", "reduce_min") and eqn.outvars[0].aval.shape != old:
        if any(cell.data for cell in cells):
            return views.squeezed(view, params["axes"])
        return None  # a statistic of the weight, such as its norm
    if (name.startswith("reduce_") and "axes" in params) or name in RANKS:
        return None
    if name in ELEMENTWISE or name == "tile":
        return views.broadcast(view, new, old, range(len(old)))
    if old and new and not any(cell.data for cell in cells):
        notes.opaque.setdefault(view.leaf, name)
    return None


def _gathered(
    notes: Notes, eqn: Any, cells: list[Cell], view: View, old: tuple[int, ...]
) -> View | None:
    """Returns the view of the matrices that are looked up, or None for a lookup of vectors."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    kept = [
        axis
        for axis in range(len(old))
        if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    wide = [axis for axis in kept if view.dims[axis] and sizes[axis] == old[axis] > 1]
    if len(wide) < 2 or numbers.operand_batching_dims:
        notes.looked_up.add(view.leaf)
        return None
    out_ndim = eqn.outvars[0].aval.ndim
    dims: list[views.Dim] = [()] * out_ndim
    for axis, position in zip(kept, numbers.offset_dims, strict=True):
        dims[position] = view.dims[axis] if sizes[axis] == old[axis] else ()
    # A copy for each index; a single index is known where it has one element.
    indices = cells[1].value
    single = math.prod(eqn.invars[1].aval.shape) == 1
    place = indices.reshape(()) if single and indices is not None else None
    pieces = [piece for axis in numbers.start_index_map for piece in view.dims[axis]]
    picked, places = (*view.picked, *pieces), (*view.places, *(place for _ in pieces))
    return view.with_dims(dims, picked=picked, places=places, whole=view.whole and single)


def _of_product(eqn: Any, cells: list[Cell], at: int, view: View) -> View | None:
    """Returns the view of a weight in its product with another weight, as in LoRA."""
    (contracted, batched) = dot_sides(eqn.params["dimension_numbers"], at)
    (_, others) = dot_sides(eqn.params["dimension_numbers"], 1 - at)
    other_ndim = eqn.invars[1 - at].aval.ndim
    free = [d for d in range(len(view.dims)) if d not in (*contracted, *batched)]
    theirs = other_ndim - len(contracted) - len(others)
    own, blank = [view.dims[d] for d in free], [()] * theirs
    dims = [view.dims[d] for d in batched] + (own + blank if at == 0 else blank + own)
    inner = view.inner + tuple(piece.axis for d in contracted for piece in view.dims[d])
    return view.with_dims(dims, inner=inner, whole=False)


def _picked(eqn: Any, at: int, view: View, result: View) -> View:
    """Returns the view of a weight of which data has picked copies or chosen values."""
    pieces: list[Piece] = []
    if eqn.primitive.name == "dot_general":
        summed, _ = dot_sides(eqn.params["dimension_numbers"], at)
        pieces = [piece for d in summed for piece in view.dims[d]]
    return dataclasses.replace(
        result,
        picked=(*result.picked, *pieces),
        places=(*result.places, *(None for _ in pieces)),
        inner=view.inner,
        whole=False,
    )


def distinct(found: Sequence[View]) -> tuple[View, ...]:
    """Returns every view once, as where a weight is multiplied with a function of itself."""
    known = {}
    for view in found:
        places = tuple(at if isinstance(at, int) else id(at) for at in view.places)
        known.setdefault((view, places), view)
    return tuple(known.values())
