"""Products, in which a weight meets the activations: the roles that they give to its axes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from swe_prune.layout import views
from swe_prune.layout.experts import expert_axis, find_members, over_experts
from swe_prune.layout.notes import Cell, Notes, Product
from swe_prune.layout.picks import by_one_hot, picks_matrices
from swe_prune.layout.primitives import conv_sides, dot_sides
from swe_prune.layout.views import View


def note_products(notes: Notes, eqn: Any, cells: list[Cell]) -> list[Product]:
    """Notes the roles of the axes of the weights in a product, and returns what can be measured."""
    kind, sides = _kind_and_sides(eqn)
    groups = cells[2].value if kind == "ragged" else None
    products = []
    for side in (0, 1):
        cell, other = cells[side], cells[1 - side]
        if not cell.is_weight:
            continue
        (contracted, batched), (their, theirs) = sides[side], sides[1 - side]
        for view in cell.views:
            sizes = [*eqn.invars[side].aval.shape]
            view = _by_group(eqn, view) if kind == "conv" and side == 1 else view
            roles = _dims_roles(len(view.dims), contracted, batched)
            if len(view.dims) > len(sizes):
                roles[len(sizes)] = "copies"
                sizes.append(eqn.params["feature_group_count"])
            roles |= over_experts(notes, view, other, contracted, their)
            if kind == "dot":
                find_members(notes, view, other, batched, theirs)
                roles |= expert_axis(notes, view, roles)
                hot = by_one_hot(view, other, contracted, their)
                if any(view.dims[at] and at not in hot for at in contracted):
                    roles |= dict.fromkeys(hot, "copies")
                elif hot and picks_matrices(eqn, cells):
                    continue
                elif hot:
                    notes.looked_up.add(view.leaf)
            # Repeated over the inputs it is a scale, not a kernel.
            repeated = any(sizes[at] > 1 and not view.dims[at] for at in contracted)
            found = views.roles(view, notes.shapes[view.leaf], roles, repeated)
            direct = other.data and not view.inner
            noted = (notes.uses if direct else notes.tentative).setdefault(view.leaf, [])
            if found not in noted:
                noted.append(found)
            if other.is_weight:
                continue
            view = _of_outputs(view, found)
            exact = all(
                roles[at] == "outputs" or not dim or views.size(dim) == sizes[at]
                for at, dim in enumerate(view.dims)
            )
            whole = view.whole and exact and found is not None
            whole = whole and _covers(view, roles, notes.shapes[view.leaf])
            product = Product(
                view=dataclasses.replace(view, whole=whole),
                roles=roles,
                kind=kind,
                other=other.value,
                contracted=(contracted, their),
                batched=(batched, theirs),
                params=eqn.params,
                groups=groups,
                shape=notes.shapes[view.leaf],
                data=other.data,
                numbers=(cell.number, other.number),
            )
            products.append(product)
    return products


def _kind_and_sides(eqn: Any) -> tuple[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Returns the kind of a product, and the summed and the shared dimensions of both operands."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return "conv", [conv_sides(eqn, side) for side in (0, 1)]
    if name == "dot_general":
        return "dot", [dot_sides(eqn.params["dimension_numbers"], side) for side in (0, 1)]
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    sides = [dot_sides(ragged.dot_dimension_numbers, side) for side in (0, 1)]
    # The groups of the weight are its copies.
    sides[1] = (sides[1][0], (*sides[1][1], *ragged.rhs_group_dimensions))
    return "ragged", sides


def _by_group(eqn: Any, view: View) -> View:
    """Returns the view of a kernel with one more dimension, over members that are its groups.

    So are the members of a `vmap` of convolutions: their outputs come one member after the other.
    """
    at, groups = eqn.params["dimension_numbers"].rhs_spec[0], eqn.params["feature_group_count"]
    dim = view.dims[at]
    first = next((i for i in range(len(dim)) if views.size(dim[:i]) == groups), 0)
    members, outputs = dim[:first], dim[first:]
    if groups == 1 or not members or {p.axis for p in members} & {p.axis for p in outputs}:
        return view
    dims = [*view.dims, members]
    dims[at] = outputs
    return view.with_dims(dims)


def _of_outputs(view: View, found: Mapping[str, Any] | None) -> View:
    """Returns the view without the places that were picked on an axis of outputs.

    A projection of queries, keys and values in one, of which each is taken, is such a weight.
    """
    outputs = () if found is None else found["outputs"]
    kept = [at for at, piece in enumerate(view.picked) if piece.axis not in outputs]
    picked, places = (tuple(some[at] for at in kept) for some in (view.picked, view.places))
    dropped = [at for at in range(len(view.picked)) if at not in kept]
    whole = view.whole and all(isinstance(view.places[at], int) for at in dropped)
    return dataclasses.replace(view, picked=picked, places=places, whole=whole)


def _covers(view: View, roles: Mapping[int, str], shape: Sequence[int]) -> bool:
    """Returns whether a product runs over the whole of every axis of inputs and of copies."""
    sizes: dict[int, int] = {}
    pieces = [piece for at, dim in enumerate(view.dims) if roles[at] != "outputs" for piece in dim]
    for piece in (*pieces, *(piece for _, piece in view.scanned), *view.picked):
        sizes[piece.axis] = sizes.get(piece.axis, 1) * piece.size
    return all(size == shape[axis] for axis, size in sizes.items())


def _dims_roles(ndim: int, contracted: Sequence[int], batched: Sequence[int]) -> dict[int, str]:
    return {
        at: "inputs" if at in contracted else "copies" if at in batched else "outputs"
        for at in range(ndim)
    }
