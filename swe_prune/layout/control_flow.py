"""Scans, loops and branches, with the sums over their products carried out of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from swe_prune.layout import views
from swe_prune.layout.notes import Cell, Measure, Notes, SumKey, Sums, with_values
from swe_prune.layout.operations import distinct
from swe_prune.layout.primitives import scan_counts


class Walker(Protocol):
    """What control flow needs of a walk; see `walk.Walk`."""

    notes: Notes
    measure: Measure | None
    depth: int

    def run(self, closed: Any, cells: Sequence[Cell]) -> tuple[list[Cell], Sums]:
        """Returns the results of a closed jaxpr, and the sums over its products."""
        ...

    def add(self, sums: Sums) -> None:
        """Adds sums to those of the jaxpr that is being walked."""
        ...


def scan(walk: Walker, eqn: Any, cells: list[Cell]) -> list[Cell]:
    """Returns the results of a scan; the axes that it runs over are copies inside."""
    params, body = eqn.params, eqn.params["jaxpr"]
    consts, carried = scan_counts(params)
    fixed, start = cells[:consts], cells[consts : consts + carried]
    rows = cells[consts + carried :]
    walk.depth += 1
    depth = walk.depth
    inside = [
        cell._replace(
            value=None,
            views=tuple(views.enter_scan(v, depth) for v in cell.views),
            experts=(),
            index=(),
        )
        for cell in rows
    ]
    known = _settle(
        walk, lambda start: _without_values(walk, body, [*fixed, *start, *inside]), start, carried
    )
    if walk.measure is None:
        results, _ = walk.run(body, [*fixed, *known, *inside])
        sums: Sums = {}
    else:
        results, sums = _scan_values(walk, params, fixed, start, known, rows, inside, depth)
    walk.depth -= 1
    walk.add(sums)
    return [
        # Stacked over the iterations, a weight in it is not followed any further.
        cell if at < carried else cell._replace(views=(), experts=(), index=())
        for at, cell in enumerate(results)
    ]


def _scan_values(
    walk: Walker,
    params: Mapping[str, Any],
    fixed: list[Cell],
    start: list[Cell],
    known: list[Cell],
    rows: list[Cell],
    inside: list[Cell],
    depth: int,
) -> tuple[list[Cell], Sums]:
    infos: list[Cell] = []
    _, carried = scan_counts(params)

    def iteration(carry: Any, row: Any) -> Any:
        cells = [*fixed, *with_values(known, carry), *with_values(inside, row)]
        results, sums = walk.run(params["jaxpr"], cells)
        infos[:] = [cell.without_value() for cell in results]
        values = [cell.value for cell in results]
        # The sums of a weight that the scan runs over are stacked, the others are added up.
        stacked = {k: v for k, v in sums.items() if _level(k) == depth}
        added = {k: v for k, v in sums.items() if _level(k) != depth}
        return values[:carried], values[carried:], stacked, added

    carry = [cell.value for cell in start]
    xs = [cell.value for cell in rows]
    first = jax.tree.map(lambda x: x[0], xs)
    total = _zeros(jax.eval_shape(iteration, carry, first)[3])

    def step(state: Any, row: Any) -> Any:
        carry, total = state
        carry, ys, stacked, added = iteration(carry, row)
        return (carry, jax.tree.map(jnp.add, total, added)), (ys, stacked)

    (carry, total), (ys, stacked) = jax.lax.scan(
        step, (carry, total), xs, params["length"], reverse=params["reverse"]
    )
    sums = {_left_scan(key): _unmerged(key, value) for key, value in stacked.items()} | total
    return with_values(infos, [*carry, *ys]), sums


def while_loop(walk: Walker, eqn: Any, cells: list[Cell]) -> list[Cell]:
    """Returns the results of a loop."""
    params = eqn.params
    a, b = params["cond_nconsts"], params["body_nconsts"]
    test, fixed, start = cells[:a], cells[a : a + b], cells[a + b :]
    known = _settle(
        walk,
        lambda start: _without_values(walk, params["body_jaxpr"], [*fixed, *start]),
        start,
        len(start),
    )
    if walk.measure is None:
        walk.run(params["cond_jaxpr"], [*test, *known])
        results, _ = walk.run(params["body_jaxpr"], [*fixed, *known])
        return results
    infos: list[Cell] = []

    def iteration(carry: Any) -> tuple[list[Any], Sums]:
        results, sums = walk.run(params["body_jaxpr"], [*fixed, *with_values(known, carry)])
        infos[:] = [cell.without_value() for cell in results]
        return [cell.value for cell in results], sums

    def more(state: Any) -> Any:
        given = [*test, *with_values(known, state[0])]
        return walk.run(params["cond_jaxpr"], given)[0][0].value

    def step(state: Any) -> Any:
        carry, sums = iteration(state[0])
        return carry, jax.tree.map(jnp.add, state[1], sums)

    carry = [cell.value for cell in start]
    total = _zeros(jax.eval_shape(iteration, carry)[1])
    carry, total = jax.lax.while_loop(more, step, (carry, total))
    walk.add(total)
    return with_values(infos, carry)


def cond(walk: Walker, eqn: Any, cells: list[Cell]) -> list[Cell]:
    """Returns the results of a switch: what may be known of them in any branch."""
    chosen, *cells = cells
    branches = eqn.params["branches"]
    runs = [_without_values(walk, branch, cells) for branch in branches]
    merged = [
        Cell(
            None,
            distinct([view for cell in some for view in cell.views]),
            chosen.data or any(cell.data for cell in some),
            frozenset().union(*(cell.sources for cell in some)),
        )
        for some in zip(*runs, strict=True)
    ]
    merged = [cell._replace(views=()) if cell.data else cell for cell in merged]
    if walk.measure is None:
        return merged
    operands = [cell.value for cell in cells]

    def taken(branch: Any) -> Callable[..., tuple[list[Any], Sums]]:
        def run(*operands: Any) -> tuple[list[Any], Sums]:
            results, sums = walk.run(branch, with_values(cells, operands))
            return [cell.value for cell in results], sums

        return run

    # Every branch returns the sums of all; those of the others are 0.
    shapes: Sums = {}
    for branch in branches:
        shapes |= jax.eval_shape(taken(branch), *operands)[1]

    def filled(branch: Any) -> Callable[..., tuple[list[Any], Sums]]:
        def run(*operands: Any) -> tuple[list[Any], Sums]:
            values, sums = taken(branch)(*operands)
            return values, _zeros(shapes) | sums

        return run

    values, sums = jax.lax.switch(chosen.value, [filled(b) for b in branches], *operands)
    walk.add(sums)
    return with_values(merged, values)


def _without_values(walk: Walker, closed: Any, cells: Sequence[Cell]) -> list[Cell]:
    measure, walk.measure = walk.measure, None
    results, _ = walk.run(closed, [cell.without_value() for cell in cells])
    walk.measure = measure
    return results


def _settle(
    walk: Walker, body: Callable[[list[Cell]], list[Cell]], start: list[Cell], carried: int
) -> list[Cell]:
    """Returns what is known of a carry in every iteration."""
    known = [cell.without_value() for cell in start]
    noted = copy.deepcopy(walk.notes)
    while True:
        after = body(known)[:carried]
        # What was seen before it is known what the carry is may not be so.
        walk.notes = copy.deepcopy(noted)
        for a, b in zip(known, after, strict=True):
            if a.views != b.views and not b.data:
                # Another part of the weight, or another orientation, in every iteration.
                noted.opaque |= {view.leaf: "a loop" for view in a.views}
        merged = [
            Cell(
                None,
                a.views if a.views == b.views and not b.data else (),
                a.data or b.data,
                a.sources | b.sources,
                a.experts if a.experts == b.experts else (),
            )
            for a, b in zip(known, after, strict=True)
        ]
        if merged == known:
            return known
        known = merged


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _level(key: SumKey) -> int:
    return key.scanned[-1][0] if key.scanned else 0


def _left_scan(key: SumKey) -> SumKey:
    depth = _level(key)
    pieces = tuple(piece for at, piece in key.scanned if at == depth)
    outer = tuple((at, piece) for at, piece in key.scanned if at != depth)
    return SumKey(key.leaf, (*pieces, *key.labels), outer, key.rest)


def _unmerged(key: SumKey, value: Any) -> Any:
    """Returns sums that a scan stacked, with an axis for each piece that it runs over."""
    sizes = [piece.size for at, piece in key.scanned if at == _level(key)]
    return jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), value)
