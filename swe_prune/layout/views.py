"""How a value inside a computation is laid out in terms of the axes of a weight.

A `View` gives the axes of a weight that each dimension of a value runs over. Shape operations map
views to views; None stands for an operation that mixes axes in any other way.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A factor of a weight's axis: index on the axis = Σ over pieces of index · stride."""

    axis: int
    size: int
    stride: int


Dim = tuple[Piece, ...]
"""Pieces of one dimension, outermost first; empty where the weight is repeated."""


@dataclasses.dataclass(frozen=True)
class View:
    """The axes of a weight in the dimensions of a value.

    Attributes:
        leaf: Index of the weight.
        dims: Pieces of each dimension.
        scanned: (depth, piece) of each axis that an enclosing scan runs over.
        picked: Pieces of the axes at which a single copy was picked.
        places: Position on each picked piece: an int or a traced integer, None if it is not one
            number. Not compared.
        inner: Axes that a product with another weight has summed over.
        whole: Whether the dimensions hold nothing besides this weight.
    """

    leaf: int
    dims: tuple[Dim, ...]
    scanned: tuple[tuple[int, Piece], ...] = ()
    picked: tuple[Piece, ...] = ()
    places: tuple[Any, ...] = dataclasses.field(default=(), compare=False)
    inner: tuple[int, ...] = ()
    whole: bool = True

    def with_dims(self, dims: Sequence[Dim], **changes: Any) -> "View":
        """Returns the view with other dimensions."""
        return dataclasses.replace(self, dims=tuple(dims), **changes)

    @property
    def wide(self) -> int:
        """Number of dimensions that run over an axis of the weight."""
        return sum(any(piece.size > 1 for piece in dim) for dim in self.dims)


def size(dim: Dim) -> int:
    """Returns how many positions on the axes of the weight a dimension runs over."""
    return math.prod(piece.size for piece in dim)


def of_leaf(leaf: int, shape: Sequence[int]) -> View:
    """Returns the view of a weight itself."""
    return View(leaf, tuple((Piece(axis, size, 1),) for axis, size in enumerate(shape)))


def transposed(view: View, permutation: Sequence[int]) -> View:
    """Returns the view with its dimensions permuted."""
    return view.with_dims([view.dims[axis] for axis in permutation])


def broadcast(
    view: View, shape: Sequence[int], old: Sequence[int], positions: Sequence[int]
) -> View:
    """Returns the view of `broadcast_in_dim`; a repeated dimension belongs to no axis."""
    dims: list[Dim] = [()] * len(shape)
    for dim, size, at in zip(view.dims, old, positions, strict=True):
        dims[at] = dim if shape[at] == size else ()
    return view.with_dims(dims)


def squeezed(view: View, dimensions: Sequence[int]) -> View:
    """Returns the view without dimensions of size 1; an axis of length 1 is a single copy."""
    gone = [piece for at in dimensions for piece in view.dims[at]]
    return view.with_dims(
        [dim for at, dim in enumerate(view.dims) if at not in set(dimensions)],
        picked=(*view.picked, *gone),
        places=(*view.places, *(0 for _ in gone)),
    )


def reshaped(view: View, old: Sequence[int], new: Sequence[int]) -> View | None:
    """Returns the view after a row-major reshape, or None if pieces would be cut unevenly."""
    dims: list[Dim] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # Take the fewest dimensions of both shapes that have the same product.
        start_i, start_j = i, j
        left, right = 1, 1
        if i < len(old) and j < len(new):
            left, right, i, j = old[i], new[j], i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
        elif i < len(old):
            i += 1
        else:
            j += 1
        part = _regrouped(view.dims[start_i:i], old[start_i:i], new[start_j:j])
        if part is None:
            return None
        dims += part
    return view.with_dims(dims)


def _regrouped(dims: Sequence[Dim], old: Sequence[int], new: Sequence[int]) -> list[Dim] | None:
    """Returns the dimensions of sizes `new` that hold the pieces of those of sizes `old`."""
    if list(old) == list(new):
        return list(dims)
    if all(not dim for dim in dims):
        return [()] * len(new)
    # Repeated dimensions take part as pieces of no axis.
    pieces = []
    for dim, size in zip(dims, old, strict=True):
        if dim and math.prod(piece.size for piece in dim) != size:
            return None
        pieces += dim or ([Piece(-1, size, 0)] if size > 1 else [])
    pieces = [piece for piece in pieces if piece.size > 1]
    found: list[Dim] = []
    for size in new:
        taken: list[Piece] = []
        missing = size
        while missing > 1:
            piece = pieces.pop(0)
            if missing % piece.size == 0:
                taken.append(piece)
                missing //= piece.size
            elif piece.size % missing == 0:
                rest = piece.size // missing
                taken.append(Piece(piece.axis, missing, piece.stride * rest))
                pieces.insert(0, Piece(piece.axis, rest, piece.stride))
                missing = 1
            else:
                return None
        own = [piece for piece in taken if piece.axis >= 0]
        if own and len(own) < len(taken):
            return None  # repeated and own values in one dimension
        found.append(tuple(own))
    return found


def sliced(view: View, old: Sequence[int], new: Sequence[int], starts: Sequence[Any]) -> View:
    """Returns the view of a slice; a single position of an axis is a copy that was picked."""
    dims, picked, places = list(view.dims), list(view.picked), list(view.places)
    for at, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after or not dims[at]:
            continue
        piece = dims[at][0]
        whole = len(dims[at]) == 1 and piece.size == before
        if whole and after == 1:
            picked.append(piece)
            places.append(starts[at])
            dims[at] = ()
        elif whole:
            dims[at] = (Piece(piece.axis, after, piece.stride),)
            if not isinstance(starts[at], int):  # another part in every iteration of a loop
                view = dataclasses.replace(view, whole=False)
        else:
            dims[at] = ()
            view = dataclasses.replace(view, whole=False)
    return view.with_dims(dims, picked=tuple(picked), places=tuple(places))


def enter_scan(view: View, depth: int) -> View:
    """Returns the view of one iteration's slice of a value that is scanned over."""
    first = view.dims[0]
    scanned = view.scanned + tuple((depth, piece) for piece in first)
    return view.with_dims(view.dims[1:], scanned=scanned)


def roles(
    view: View, shape: Sequence[int], roles_of_dims: Mapping[int, str], repeated: bool = False
) -> dict[str, tuple[int, ...]] | None:
    """Returns the axes by role in a product, or None if an axis is in two roles.

    Args:
        view: View of the operand.
        shape: Shape of the weight.
        roles_of_dims: "inputs", "outputs" or "copies" by dimension of the operand.
        repeated: Whether the product sums over a dimension along which the weight is repeated.
    """
    found: dict[int, str] = {}
    pieces = [(piece, roles_of_dims[at]) for at, dim in enumerate(view.dims) for piece in dim]
    for piece, role in pieces:
        if found.setdefault(piece.axis, role) != role:
            return None
    # A copy for each place, unless the product has other outputs along this axis.
    for piece in (*(piece for _, piece in view.scanned), *view.picked):
        if found.setdefault(piece.axis, "copies") == "inputs":
            return None
    for axis in view.inner:
        if found.get(axis, "outputs") != "outputs":
            return None
        # Summed with another weight first: an output if this product has inputs of its own.
        found[axis] = "outputs" if "inputs" in found.values() else "inputs"
    if "outputs" not in found.values():
        # The only output of a kernel (in, 1) may have been squeezed away.
        found |= {piece.axis: "outputs" for piece in view.picked if shape[piece.axis] == 1}
    # Axes of length 1 get lost in reshapes, and may be of either role.
    for axis, size in enumerate(shape):
        if axis not in found:
            if size > 1:
                return None
            summed = repeated or "inputs" in found.values()
            found[axis] = "outputs" if summed else "inputs"
    return {
        role: tuple(axis for axis in range(len(shape)) if found[axis] == role)
        for role in ("inputs", "outputs", "copies")
    }
