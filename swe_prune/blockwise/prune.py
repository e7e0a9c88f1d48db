"""Pruning block after block, each on the inputs that the already pruned blocks before it give.

What is in memory at a time: the weights of one block, the statistics of its kernels, and the
activations between two blocks of all the calibration batches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, PyTree

from swe_prune import counting, importance, patterns, select, tree
from swe_prune.allocation import Allocation
from swe_prune.blockwise import block_graph, wanda
from swe_prune.blockwise.sparsegpt import BLOCK, SolverReport, check_sparsity, sparsegpt
from swe_prune.calibration import batching as of_batches
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.errors import InputError, check_choice, did_you_mean

METHODS = ("wanda", "wanda_variant", "sparsegpt", "magnitude")


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What was done to a kernel.

    Attributes:
        name: of the kernel.
        removed: weights that its mask removes.
        total: weights that it has.
        solver: of SparseGPT, else None.
    """

    name: str
    removed: int
    total: int
    solver: SolverReport | None = None

    @property
    def sparsity(self) -> float:
        """Share removed."""
        return self.removed / self.total


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How kernels are pruned: the method, its settings, the sparsity of each, and what is kept."""

    method: str
    shares: Mapping[str, float]
    pattern: str | None
    block: int
    damping: float
    donate: bool
    keep_zeros: bool

    @property
    def hessian(self) -> bool:
        return self.method == "sparsegpt"

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude"


def prune_blocks(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    *,
    blocks: str | Sequence[str],
    sparsity: float | Mapping[str, float] | Allocation | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    prunable: PyTree | None = None,
    call: Callable[[Any, Any, Any], Any] | None = None,
    dense_like: tuple[type, ...] = (),
    block: int = BLOCK,
    damping: float = 0.01,
    offload: bool = False,
    donate: bool = False,
    zeros: str = "keep",
    progress: Callable[[KernelReport], None] | None = None,
) -> tuple[PyTree, PyTree, tuple[KernelReport, ...]]:
    """Returns the parameters pruned, the masks, and a report of each kernel in its order.

    For every block: measure what comes into its kernels from the pruned blocks before it, prune
    them, and run it again for what goes into the next block. A block is run alone, as `block_graph`
    says; what the model does before the first block and after the last is not touched.

    Args:
        model: any Linen module that calls its blocks one after the other, outside of nn.remat and
            nn.scan.
        variables: {"params": …} and other collections. Weights that are numpy arrays stay in host
            memory but for the block at work, and their results go back there.
        batches: as in `calibration.inputs`; they may be divided over devices.
        blocks: a rule that matches the blocks' whole paths, r"block_[0-9]+", or their paths; they
            are taken in the order in which the model calls them.
        sparsity: share of each kernel to remove; or by kernel name, or an allocation; None with a
            pattern, which fixes it.
        method: "wanda", "wanda_variant" (see `wanda`), "sparsegpt", which also updates the
            weights that stay, or "magnitude", by kernel and without calibration.
        pattern: None or "n:m".
        prunable: bool pytree; None: `tree.prunable(params)`. Kernels outside of the blocks stay.
        call: as in `calibration.inputs`.
        dense_like: as in `calibration.inputs`.
        block: inputs at a time, of "sparsegpt".
        damping: of "sparsegpt".
        offload: keep the activations in host memory, and one batch of them on the device.
        donate: give up each kernel that is pruned, so that the weights are in memory once: jax
            arrays are deleted, and numpy arrays that can be written hold the result. An error
            half-way leaves some of them so.
        zeros: What becomes of weights that are 0 already: "keep", removed first and counted in the
            sparsity; or "free".
        progress: called with the report of every kernel as soon as it is pruned.

    Returns:
        Parameters of the same dtypes; masks like them, bool, None where dense; reports.

    Raises:
        InputError: as `calibration.inputs`, or blocks that cannot be run alone, an unknown method,
            or a sparsity that is missing for a kernel or named for none.
        RunError: a Hessian that no damping makes positive definite.

    Sources: those of `sparsegpt` and `wanda`, whose references both go block after block.
    """
    params = measuring.params_of(variables)
    check_choice(method, METHODS, "method")
    check_choice(zeros, importance.ZEROS, "zeros")
    paths = block_graph.find([name for name, _ in tree.named_leaves(params)], blocks)
    chosen = measuring.wanted_shapes(params, prunable)
    shapes = {
        name: shape
        for name, shape in chosen.items()
        if any(name.startswith(path + "/") for path in paths)
    }
    shares = _shares(shapes, sparsity, pattern)
    plan = _Plan(method, shares, pattern, block, damping, donate, zeros == "keep")
    run = functools.partial(call or measuring.applied, model)
    wires, states, counts = _captured(run, variables, batches, paths, offload)
    pruned: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    reports: list[KernelReport] = []
    runner: _Runner | None = None
    for index, of_kinds in enumerate(wires):
        path = of_kinds[0].path
        wanted = {
            name.removeprefix(path + "/"): shape
            for name, shape in shapes.items()
            if name.startswith(path + "/")
        }
        if runner is None or not runner.fits(of_kinds, wanted):
            runner = _Runner(of_kinds, wanted, plan.hessian, dense_like)
        own = block_graph.part(variables, path)
        new, kept = _one_block(runner, path, own, states, counts, plan, reports, progress)
        if index + 1 < len(wires):
            _advance(runner, own, new, states, wires[index + 1 :], offload)
        pruned |= {f"{path}/{name}": leaf for name, leaf in new.items()}
        masks |= {f"{path}/{name}": leaf for name, leaf in kept.items()}
    return _with(params, pruned), _only(params, masks), tuple(reports)


def _one_block(
    runner: "_Runner",
    path: str,
    own: Mapping[str, PyTree],
    states: list[block_graph.Activations],
    counts: list[int],
    plan: _Plan,
    reports: list[KernelReport],
    progress: Callable[[KernelReport], None] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns by name a block's pruned kernels and their masks, where its weights came from."""
    part = jax.tree.map(jnp.asarray, own)
    sums: dict[str, Any] = {}
    if runner.wanted and plan.calibrated:
        sums = runner.measured(part, states, counts)
    new, kept = {}, {}
    for name in runner.wanted:
        weight, given = (block_graph.leaf(tree_of["params"], name) for tree_of in (part, own))
        *done, report = _kernel(f"{path}/{name}", weight, sums.pop(name, None), sum(counts), plan)
        new[name], kept[name] = jax.device_get(done) if isinstance(given, np.ndarray) else done
        if plan.donate:
            new[name] = _in_place_of(given, new[name])
        reports.append(report)
        if progress is not None:
            progress(report)
    return new, kept


def _in_place_of(given: Any, new: Any) -> Any:
    """Returns a pruned kernel, where the given one was if it is one that can be written."""
    if isinstance(given, np.ndarray) and given.flags.writeable:
        given[...] = new
        return given
    if isinstance(given, jax.Array) and given is not new:
        given.delete()
    return new


def _advance(
    runner: "_Runner",
    own: Mapping[str, PyTree],
    new: Mapping[str, Any],
    states: list[block_graph.Activations],
    later: list[list[block_graph.Wire]],
    offload: bool,
) -> None:
    """Puts into `states` what the pruned block gives, one after the other: the old is freed."""
    part = jax.tree.map(jnp.asarray, {**own, "params": _with(own["params"], new)})
    for at, state in enumerate(states):
        states[at] = runner.advanced(part, state, later, offload)


def _with(params: PyTree, new: Mapping[str, Any]) -> PyTree:
    return tree.map_named(lambda name, leaf: new.get(name, leaf), params)


def _only(params: PyTree, new: Mapping[str, Any]) -> PyTree:
    return tree.map_named(lambda name, _: new.get(name), params)


def _shares(
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float | Mapping[str, float] | Allocation | None,
    pattern: str | None,
) -> dict[str, float]:
    """Returns the sparsity of every kernel."""
    if not shapes:
        raise InputError(
            "no weight of the blocks is prunable; widen prunable= or name other blocks"
        )
    named = sparsity.sparsities if isinstance(sparsity, Allocation) else sparsity
    if not isinstance(named, Mapping):
        share, n_of_m = check_sparsity(named, pattern)
        for name, shape in shapes.items():
            if n_of_m is not None:
                patterns.check_divides(name, _inputs(name, shape), n_of_m[1])
        return dict.fromkeys(shapes, share)
    for name in named:
        if name not in shapes:
            raise InputError(
                f"a sparsity is given for {name!r}, which is no prunable weight of the blocks; "
                f"{did_you_mean(name, shapes)}"
            )
    for name in shapes:
        if name not in named:
            raise InputError(f"no sparsity is given for {name!r}; name it, or exclude it")
    return {name: check_sparsity(named[name], pattern)[0] for name in shapes}


def _inputs(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in tree.input_axes(name, shape))


def _captured(
    run: Callable[[Any, Any], Any],
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    paths: list[str],
    offload: bool,
) -> tuple[list[list[block_graph.Wire]], list[block_graph.Activations], list[int]]:
    """Returns the blocks, for each kind of batch; what goes into the first; and the sequences."""
    kinds: dict[str, int] = {}
    of_kinds: list[list[block_graph.Wire]] = []
    states: list[block_graph.Activations] = []
    counts: list[int] = []
    before = block_graph.without(variables, paths)
    first = jax.jit(
        lambda variables, batch: block_graph.into_first(lambda: run(variables, batch), paths)
    )
    for number, batch in enumerate(batches):
        counts.append(of_batches.sequences(batch, number))
        shapes = str(of_batches.shapes(batch))
        if shapes not in kinds:
            kinds[shapes] = len(of_kinds)
            of_kinds.append(_wires(run, variables, batch, paths, number))
            _check_order(of_kinds, number)
        given = first(before, batch)
        states.append(block_graph.Activations(_kept(given, offload), [], kinds[shapes]))
    if not states:
        raise of_batches.nothing_given()
    if len(paths) > 1:
        _start_as_second(of_kinds, states)
    return [list(wires) for wires in zip(*of_kinds, strict=True)], states, counts


def _start_as_second(
    of_kinds: list[list[block_graph.Wire]], states: list[block_graph.Activations]
) -> None:
    """Puts what goes into the first block where the second finds what goes into it."""
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
    """Returns the numbers of what blocks ask for from a place."""
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


def _on_device(state: block_graph.Activations) -> block_graph.Activations:
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(leaf.value, leaf.sharding) if isinstance(leaf, _OnHost) else leaf
        ),
        state,
    )


class _Runner:
    """A block's compiled programs, which the blocks that are like it share."""

    def __init__(
        self,
        wires: list[block_graph.Wire],
        wanted: Mapping[str, Any],
        hessian: bool,
        dense_like: tuple[type, ...],
    ) -> None:
        self.wires, self.wanted = wires, dict(wanted)
        self.measure = measuring.make_measure_fn(
            wires[0].module,
            lambda _, variables, state: self._run(variables, state),
            self.wanted,
            hessian=hessian,
            dense_like=dense_like,
        )
        self.step = measuring.make_accumulate_step(self.measure)
        self.known: dict[str, Any] = {}
        self.forward = jax.jit(self._run)

    def _run(self, variables: Any, state: block_graph.Activations) -> list[Array]:
        return self.wires[state.kind].run(variables, state.given, state.made)

    def fits(self, wires: list[block_graph.Wire], wanted: Mapping[str, Any]) -> bool:
        """Returns whether another block is like this one."""
        pairs = zip(wires, self.wires, strict=True)
        return self.wanted == dict(wanted) and all(a.alike(b) for a, b in pairs)

    def measured(
        self, part: PyTree, states: list[block_graph.Activations], counts: list[int]
    ) -> dict[str, Any]:
        """Returns the sums of the block's kernels over all batches."""
        sums, _ = measuring.accumulate(
            self.measure,
            part,
            map(_on_device, states),
            step=self.step,
            count=lambda _, number: counts[number],
            known=self.known,
        )
        measuring.check_used(self.wanted, sums)
        return sums

    def advanced(
        self,
        part: PyTree,
        state: block_graph.Activations,
        later: list[list[block_graph.Wire]],
        offload: bool,
    ) -> block_graph.Activations:
        """Returns what goes into the next block, less what no later block asks for."""
        made = self.forward(part, _on_device(state))
        wires = [of_kinds[state.kind] for of_kinds in later]
        made = _less(made, _asked(wires[:1], "made"))
        given = _less(state.given, _asked(wires, "given"))
        return block_graph.Activations(given, _kept(made, offload), state.kind)


def _kernel(
    name: str, weight: Array, sums: dict[str, Array] | None, n: int, plan: _Plan
) -> tuple[Array, Array, KernelReport]:
    """Returns a kernel pruned, its mask, and the report."""
    if sums is None:
        axes = tree.input_axes(name, weight.shape)
    else:
        axes = tuple(range(sums["square"].ndim))  # the layer itself says which its inputs are
    weight_RxC = patterns.as_matrix(weight, axes)
    share, report = plan.shares[name], None
    if plan.pattern is not None:
        patterns.check_divides(name, len(weight_RxC), patterns.parse_n_of_m(plan.pattern)[1])
    if plan.method == "sparsegpt" and sums is not None:
        weight_RxC, mask_RxC, report = sparsegpt(
            weight_RxC,
            _scaled(sums.pop("outer"), 2 / n),
            share,
            plan.pattern,
            plan.block,
            plan.damping,
            "keep" if plan.keep_zeros else "free",
        )
    else:
        score_RxC = _scores(weight_RxC, sums and sums["square"], n)
        if plan.keep_zeros:
            score_RxC = _zeros_last(score_RxC, weight_RxC)
        mask_RxC = _ranked(name, score_RxC, share, plan)
        weight_RxC = _zeroed(weight_RxC, mask_RxC)
    removed = mask_RxC.size - int(_count_true(mask_RxC))
    return (
        patterns.from_matrix(weight_RxC, weight.shape, axes),
        patterns.from_matrix(mask_RxC, weight.shape, axes),
        KernelReport(name, removed, weight.size, report),
    )


@jax.jit
def _scores(weight_RxC: Array, square: Array | None, n: int) -> Array:
    score_RxC = jnp.abs(weight_RxC.astype(jnp.float32))
    return score_RxC if square is None else score_RxC * jnp.sqrt(square / n).reshape(-1, 1)


@jax.jit
def _zeros_last(score_RxC: Array, weight_RxC: Array) -> Array:
    return jnp.where((weight_RxC == 0) & ~jnp.isnan(score_RxC), -jnp.inf, score_RxC)


@jax.jit
def _zeroed(weight_RxC: Array, mask_RxC: Array) -> Array:
    return jnp.where(mask_RxC, weight_RxC, 0)


@jax.jit
def _count_true(mask_RxC: Array) -> counting.Count:
    return counting.count_true([mask_RxC])


@functools.partial(jax.jit, donate_argnums=0)  # a Hessian is large: not twice
def _scaled(sum_RxR: Array, factor: float) -> Array:
    return sum_RxR * factor


def _ranked(name: str, score_RxC: Array, share: float, plan: _Plan) -> Array:
    there_RxC = score_RxC != -jnp.inf  # what was 0 before
    if plan.pattern is not None:
        n, m = patterns.parse_n_of_m(plan.pattern)
        return patterns.n_of_m_mask(score_RxC, n, m, name) & there_RxC
    if plan.method == "magnitude":
        keep = score_RxC.size - int(score_RxC.size * share)
        return select.top_k_mask(score_RxC, keep, name=name) & there_RxC
    if plan.method == "wanda":  # rounded and with its ties broken as in the reference
        return wanda.wanda_mask(score_RxC, share, rounding="down", ties="last")
    # The variant adds scores up, to which a weight that is gone adds nothing.
    return wanda.wanda_variant_mask(jnp.where(there_RxC, score_RxC, 0), share) & there_RxC
