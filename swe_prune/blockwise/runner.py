"""The activations between blocks, and the compiled programs that take them through a block."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.blockwise import block_graph, guard
from swe_prune.calibration import batching as of_batches
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.errors import InputError
from swe_prune.layout import Axes, axes_by_name, axes_of


def captured(
    run: Callable[[Any, Any], Any],
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    holdout: Iterable[PyTree] | None,
    paths: list[str],
    offload: bool,
) -> tuple[list[list[block_graph.Wire]], list[block_graph.Activations], list[int], int]:
    """Returns the blocks by kind of batch, the first one's inputs, and two counts.

    The counts are the sequences of each batch and the held-out batches, which come last; with
    holdout=None the held-out batches are a share of all of them.
    """
    kinds: dict[str, int] = {}
    of_kinds: list[list[block_graph.Wire]] = []
    states: list[block_graph.Activations] = []
    counts: list[int] = []
    before = block_graph.without(variables, paths)
    first = jax.jit(
        lambda variables, batch: block_graph.into_first(lambda: run(variables, batch), paths)
    )
    held_out = 0
    given_batches, given_holdout = of_batches.each(batches), of_batches.each(holdout or ())
    marked = itertools.chain(((b, 0) for b in given_batches), ((b, 1) for b in given_holdout))
    for number, (batch, held) in enumerate(marked):
        held_out += held
        counts.append(of_batches.sequences(batch, number))
        shapes = str(of_batches.shapes(batch))
        if shapes not in kinds:
            kinds[shapes] = len(of_kinds)
            of_kinds.append(_wires(run, variables, batch, paths, number))
            _check_order(of_kinds, number)
        given = first(before, batch)
        states.append(block_graph.Activations(_kept(given, offload), [], kinds[shapes]))
    if len(states) == held_out:
        raise of_batches.nothing_given()
    if holdout is None:
        held_out = guard.share_held_out(len(states))
    if len(paths) > 1:
        _start_as_second(of_kinds, states)
    return [list(wires) for wires in zip(*of_kinds, strict=True)], states, counts, held_out


def _start_as_second(
    of_kinds: list[list[block_graph.Wire]], states: list[block_graph.Activations]
) -> None:
    """Stores the first block's inputs where the second block looks for its own."""
    moves = []
    for wires in of_kinds:
        wires[0], moved = block_graph.as_second(wires[0], wires[1])
        moves.append((moved, _asked(wires, "given")))
    for at, state in enumerate(states):
        moved, asked = moves[state.kind]
        made = [None] * (max(moved, default=-1) + 1)
        for number, given in moved.items():
            made[number] = state.given[given]
        states[at] = block_graph.Activations(_less(state.given, asked), made, state.kind)


def _asked(wires: Iterable[block_graph.Wire], kind: str) -> set[int]:
    """Returns the indices of the leaves that blocks read from a source, "given" or "made"."""
    return {source.value for wire in wires for source in wire.sources if source.kind == kind}


def _less(leaves: Sequence[Any], asked: set[int]) -> list[Any]:
    """Returns the leaves that are asked for, None in between for the others."""
    return [
        leaf if number in asked else None
        for number, leaf in enumerate(leaves[: max(asked, default=-1) + 1])
    ]


def _wires(
    run: Callable[[Any, Any], Any], variables: Any, batch: Any, paths: list[str], number: int
) -> list[block_graph.Wire]:
    found: list[block_graph.Wire] = []

    def traced(variables: Any, batch: Any) -> None:
        found.extend(block_graph.trace(lambda: run(variables, batch), paths))

    measuring.traced(traced, of_batches.shapes(variables), batch, number)
    return found


def _check_order(of_kinds: list[list[block_graph.Wire]], number: int) -> None:
    orders = [[wire.path for wire in wires] for wires in of_kinds]
    if orders[0] != orders[-1]:
        raise InputError(
            f"calibration batch {number} runs through the blocks in another order than batch 0; "
            "give batches that run through them alike"
        )


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """An array that was brought to host memory, and how it was divided over devices.

    `sharding` is None of one that jax was free to place: bound to its device it would be of another
    kind to the compiled programs, and they would be compiled again.
    """

    value: np.ndarray
    sharding: Any


def _kept(leaves: Sequence[Any], offload: bool) -> list[Any]:
    if not offload:
        return list(leaves)
    return [
        _OnHost(jax.device_get(leaf), leaf.sharding if leaf.committed else None)
        if isinstance(leaf, jax.Array)
        else leaf
        for leaf in leaves
    ]


def on_device(state: Any) -> Any:
    """Returns activations, or pairs of them, on the device where they were."""
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(leaf.value, leaf.sharding) if isinstance(leaf, _OnHost) else leaf
        ),
        state,
    )


class Runner:
    """A block's compiled programs, which the blocks that are like it share."""

    def __init__(
        self,
        wires: list[block_graph.Wire],
        wanted: Mapping[str, Any],
        hessian: bool,
        paired: bool = False,
    ) -> None:
        self.wires, self.wanted = wires, dict(wanted)
        self.tracing = measuring.Tracing(self.run)
        self.measure = measuring.make_measure_fn(
            self.tracing, self.wanted, hessian=hessian, paired=paired
        )
        self.step = measuring.make_accumulate_step(self.measure)
        self.known: dict[str, Any] = {}
        self.forward = jax.jit(self.run)
        self.found: dict[str, Axes] | None = None
        self.compiled: dict[str, Callable[..., Any]] = {}  # programs of others, by their names

    def run(self, variables: Any, state: block_graph.Activations) -> list[Array]:
        """Returns the leaves of what the block gives, not compiled."""
        return self.wires[state.kind].run(variables, state.given, state.made)

    def axes(self, part: PyTree, state: block_graph.Activations) -> dict[str, Axes]:
        """Returns the axes of the block's kernels by name, traced once."""
        if self.found is None:
            # The shapes are enough: nothing comes back from host memory for them.
            given = of_batches.shapes(
                jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, _OnHost) else leaf, state)
            )
            of = axes_of(axes_by_name(self.tracing(part, given)))
            self.found = {name: of(name, shape) for name, shape in self.wanted.items()}
        return self.found

    def fits(self, wires: list[block_graph.Wire], wanted: Mapping[str, Any]) -> bool:
        """Returns whether another block is like this one."""
        pairs = zip(wires, self.wires, strict=True)
        return self.wanted == dict(wanted) and all(a.alike(b) for a, b in pairs)

    def measured(self, part: PyTree, states: Sequence[Any], counts: list[int]) -> dict[str, Any]:
        """Returns the sums of the block's kernels over all batches, or pairs of them."""
        sums, _ = measuring.accumulate(
            self.measure,
            part,
            map(on_device, states),
            step=self.step,
            count=lambda _, number: counts[number],
            known=self.known,
        )
        measuring.check_used(self.wanted, sums)
        return sums

    def whole(self, part: PyTree, state: block_graph.Activations) -> list[Array]:
        """Returns everything that the block gives, on the device."""
        return self.forward(part, on_device(state))

    def advanced(
        self,
        part: PyTree,
        state: block_graph.Activations,
        later: list[list[block_graph.Wire]],
        offload: bool,
    ) -> block_graph.Activations:
        """Returns what goes into the next block, less what no later block asks for."""
        made = self.forward(part, on_device(state))
        wires = [of_kinds[state.kind] for of_kinds in later]
        made = _less(made, _asked(wires[:1], "made"))
        given = _less(state.given, _asked(wires, "given"))
        return block_graph.Activations(given, _kept(made, offload), state.kind)


def variables_with(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a block's variables with other kernels by name."""
    params = tree.map_named(lambda name, leaf: new.get(name, leaf), own["params"])
    return {**own, "params": params}
