"""Copies of a weight that all get the same activations: experts of a mixture, ensemble members."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from swe_prune.layout import views
from swe_prune.layout.notes import Cell, Notes
from swe_prune.layout.operations import view_of
from swe_prune.layout.primitives import dot_sides
from swe_prune.layout.views import View


def experts_of(notes: Notes, eqn: Any, cells: list[Cell], found: list[Any]) -> tuple[View, ...]:
    """Returns the dimensions of an activation that run over the copies of a weight."""
    name = eqn.primitive.name
    if name == "gather" or (not any(c.experts for c in cells) and name != "dot_general"):
        return ()
    shape = getattr(eqn.outvars[0].aval, "shape", ())
    moved = []
    for at, cell in enumerate(cells):
        given = cell.experts
        if name == "dot_general" and cell.is_weight and not any(found):
            # Only the copies of the weight remain; its outputs are new to the activation.
            batched = dot_sides(eqn.params["dimension_numbers"], at)[1]
            for view in cell.views:
                over = [i in batched or _over(notes, view, dim) for i, dim in enumerate(view.dims)]
                shown = any(over)
                if not shown:
                    over = _separable(notes, view, dot_sides(eqn.params["dimension_numbers"], at))
                dims = [dim if here else () for dim, here in zip(view.dims, over, strict=True)]
                given += (view.with_dims(dims, whole=shown),)
        for view in given:
            result = view_of(notes, eqn, cells, at, view, eqn.invars[at].aval.shape, shape)
            if result is not None and result.wide:
                moved.append(dataclasses.replace(result, inner=(), whole=view.whole))
    return tuple(dict.fromkeys(moved))


def expert_axis(notes: Notes, view: View, roles: Mapping[int, str]) -> dict[int, str]:
    """Returns the dimensions over experts that all get the same activations, as copies.

    To a product they are outputs like others. Members are shown by a product further on; the first
    axis of a weight (experts, in, out) is one over experts where a router before it ranks as many
    outputs.
    """
    shape, outputs = notes.shapes[view.leaf], [at for at in roles if roles[at] == "outputs"]
    members = notes.members.get(view.leaf, set())
    found = [at for at in outputs if _alone(view, at, shape) and view.dims[at][0].axis in members]
    if not found:
        free = [at for at, role in roles.items() if role != "copies"]
        first = _first_axis(view, shape, free)
        routed = first in outputs and view.dims[first][0].size in _routed(notes)
        found = [first] if routed else []
    notes.expert_axes.setdefault(view.leaf, set()).update(view.dims[at][0].axis for at in found)
    return dict.fromkeys(found, "copies")


def find_members(
    notes: Notes, view: View, other: Cell, batched: Sequence[int], theirs: Sequence[int]
) -> None:
    """Notes the weights before, of which this one's copies take one part of the result each.

    So it is in an ensemble under `vmap`, whose first weights all get the same activations.
    """
    for own, at in zip(batched, theirs, strict=True):
        for before in other.experts if view.dims[own] else ():
            if before.dims[at] and not before.whole:
                notes.members.setdefault(before.leaf, set()).add(before.dims[at][0].axis)


def over_experts(
    notes: Notes, view: View, other: Cell, contracted: Sequence[int], their: Sequence[int]
) -> dict[int, str]:
    """Returns the dimensions that a mixture of experts sums over together with the inputs."""
    if not notes.ranked or len(contracted) < 2:
        return {}
    found = {}
    for own, at in zip(contracted, their, strict=True):
        size = views.size(view.dims[own])
        if any(
            expert.whole and expert.dims[at] and views.size(expert.dims[at]) == size
            for expert in other.experts
        ):
            found[own] = "copies"
    return found


def _routed(notes: Notes) -> set[int]:
    """Returns the numbers of outputs of the routers that were seen."""
    return {
        math.prod(notes.shapes[leaf][axis] for axis in use["outputs"])
        for leaf in notes.ranked
        for use in notes.uses.get(leaf, [])
        if use is not None
    }


def _over(notes: Notes, view: View, dim: views.Dim) -> bool:
    return any(piece.axis in notes.expert_axes.get(view.leaf, ()) for piece in dim)


def _separable(notes: Notes, view: View, sides: tuple[Sequence[int], Sequence[int]]) -> list[bool]:
    """Returns which of several output dimensions may run over members, for each dimension."""
    outputs = [at for at, dim in enumerate(view.dims) if dim and at not in (*sides[0], *sides[1])]
    shape = notes.shapes[view.leaf]
    several = len(outputs) > 1
    return [several and at in outputs and _alone(view, at, shape) for at in range(len(view.dims))]


def _alone(view: View, at: int, shape: Sequence[int]) -> bool:
    """Returns whether a dimension runs over the whole of one axis and nothing else."""
    return len(view.dims[at]) == 1 and view.dims[at][0].size == shape[view.dims[at][0].axis]


def _first_axis(view: View, shape: Sequence[int], free: Sequence[int]) -> int | None:
    """Returns the dimension that runs over the first of three free axes alone, or None."""
    named = [at for at in free if view.dims[at]]
    if len(named) != 3:
        return None
    first = min(named, key=lambda at: view.dims[at][0].axis)
    return first if _alone(view, first, shape) else None
