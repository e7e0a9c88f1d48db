"""Pruning block after block, each on the inputs that the already pruned blocks before it give.

What is in memory at a time: the weights of one block, the statistics of its kernels, and the
activations between two blocks of all the calibration batches.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, PyTree

from swe_prune import counting, importance, patterns, select, tree
from swe_prune.allocation import Allocation
from swe_prune.blockwise import block_graph, nnx_blocks, wanda
from swe_prune.blockwise.admm import admm, squared_error
from swe_prune.blockwise.sparsegpt import BLOCK, SolverReport, check_sparsity, sparsegpt
from swe_prune.calibration import batching as of_batches
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.errors import InputError, check_choice, did_you_mean
from swe_prune.layout import Axes, axes_by_name, axes_of, conventional_axes

METHODS = ("wanda", "wanda_variant", "sparsegpt", "admm", "magnitude")
RESTORES = (None, "admm")
DAMPING: Mapping[str, float] = {"sparsegpt": 0.01, "admm": 0.1}
"""Default share of the Hessian's mean diagonal that is added to it, by method."""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What was done to a kernel.

    Attributes:
        name: of the kernel.
        removed: weights that its mask removes.
        total: weights that it has.
        solver: of SparseGPT and ADMM, else None.
        restored: whether the weights that stay were restored and kept so; see `holdout`.
    """

    name: str
    removed: int
    total: int
    solver: SolverReport | None = None
    restored: bool = False

    @property
    def sparsity(self) -> float:
        """Share removed."""
        return self.removed / self.total


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How kernels are pruned: the method or the masks, the settings, and the sparsity of each."""

    method: str
    masks: Mapping[str, Any] | None
    restore: str | None
    shares: Mapping[str, float]
    pattern: str | None
    block: int
    damping: float | None
    donate: bool
    keep_zeros: bool
    held_out: int = 0

    @property
    def hessian(self) -> bool:
        return self.restore is not None or self.method in ("sparsegpt", "admm")

    @property
    def calibrated(self) -> bool:
        return self.hessian or (self.masks is None and self.method != "magnitude")

    def damping_of(self, solver: str) -> float:
        return DAMPING[solver] if self.damping is None else self.damping


def prune_blocks(
    model: Any,
    variables: PyTree,
    batches: Iterable[PyTree],
    *,
    blocks: str | Sequence[str],
    sparsity: float | Mapping[str, float] | Allocation | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    mask: PyTree | None = None,
    restore: str | None = None,
    holdout: Iterable[PyTree] = (),
    prunable: PyTree | None = None,
    call: Callable[..., Any] | None = None,
    block: int = BLOCK,
    damping: float | None = None,
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
            nn.scan, or an NNX module with a list of blocks.
        variables: {"params": …} and other collections; of an NNX module its state, a pure dict of
            it, or the module itself. Weights that are numpy arrays stay in host
            memory but for the block at work, and their results go back there.
        batches: as in `calibration.inputs`; they may be divided over devices.
        blocks: a rule that matches the blocks' whole paths, r"block_[0-9]+", or their paths; they
            are taken in the order in which the model calls them.
        sparsity: share of each kernel to remove; or by kernel name, or an allocation; None with a
            pattern, which fixes it.
        method: "wanda", "wanda_variant" (see `wanda`), "sparsegpt" or "admm", which also update the
            weights that stay, or "magnitude", by kernel and without calibration.
        pattern: None or "n:m".
        mask: Bool pytree like the parameters of masks that were chosen otherwise, None where
            dense. Then sparsity and pattern must be None and the method is not used.
        restore: "admm" updates the weights that stay by `admm`, for the mask that the method chose
            or that is given, towards the dense kernel's outputs on what the pruned blocks before
            it give. None leaves them as the method does.
        holdout: Batches that decide for each kernel whether its restored weights are kept: only if
            their outputs on these are nearer to the dense kernel's than with the mask alone. Of
            another text than `batches`, so that restoring does not fit that text alone.
        prunable: bool pytree; None: `tree.prunable(params)`. Kernels outside of the blocks stay.
        call: function (module, variables, batch) that runs a Linen module in another way; of an
            NNX module (module, batch).
        block: inputs at a time, of "sparsegpt".
        damping: of "sparsegpt" and "admm". None: 0.01 and 0.1.
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

    Sources: those of `sparsegpt`, `admm` and `wanda`, whose references all go block after block.
    """
    if isinstance(model, nnx.Module):
        return _prune_nnx(
            model,
            variables,
            batches,
            call=call,
            prunable=prunable,
            blocks=blocks,
            sparsity=sparsity,
            method=method,
            pattern=pattern,
            mask=mask,
            restore=restore,
            holdout=holdout,
            block=block,
            damping=damping,
            offload=offload,
            donate=donate,
            zeros=zeros,
            progress=progress,
        )
    if not isinstance(model, nn.Module | nnx_blocks.Functional):
        raise InputError(
            f"model must be a Linen or an NNX module whose blocks are modules, got "
            f"{type(model).__name__}; prune a plain function at once, by a criterion such as wanda "
            "with measured=calibration.inputs(fn, params, batches)"
        )
    params = measuring.params_of(variables)
    check_choice(method, METHODS, "method")
    check_choice(restore, RESTORES, "restore")
    check_choice(zeros, importance.ZEROS, "zeros")
    paths = block_graph.find([name for name, _ in tree.named_leaves(params)], blocks)
    given = None if mask is None else _given_masks(params, mask, sparsity, pattern)
    if given is not None:
        prunable = tree.map_leaves(lambda name, _: name in given, params)
    chosen = measuring.wanted_shapes(params, prunable)
    shapes = {
        name: shape
        for name, shape in chosen.items()
        if any(name.startswith(path + "/") for path in paths)
    }
    shares = dict.fromkeys(shapes, 0.0) if given else _shares(shapes, sparsity, pattern)
    keep_zeros = zeros == "keep"
    plan = _Plan(method, given, restore, shares, pattern, block, damping, donate, keep_zeros)
    run = functools.partial(call or measuring.applied, model)
    wires, states, counts, held_out = _captured(run, variables, batches, holdout, paths, offload)
    plan = dataclasses.replace(plan, held_out=held_out)
    pruned: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    reports: list[KernelReport] = []
    runners: list[_Runner] = []  # several where blocks differ, such as layers with a window
    for index, of_kinds in enumerate(wires):
        path = of_kinds[0].path
        wanted = {
            name.removeprefix(path + "/"): shape
            for name, shape in shapes.items()
            if name.startswith(path + "/")
        }
        runner = next((one for one in runners if one.fits(of_kinds, wanted)), None)
        if runner is None:
            runner = _Runner(of_kinds, wanted, plan.hessian)
            runners.append(runner)
        own = block_graph.part(variables, path)
        new, kept = _one_block(runner, path, own, states, counts, plan, reports, progress)
        if index + 1 < len(wires):
            _advance(runner, own, new, states, wires[index + 1 :], offload)
        pruned |= {f"{path}/{name}": leaf for name, leaf in new.items()}
        masks |= {f"{path}/{name}": leaf for name, leaf in kept.items()}
    return _with(params, pruned), _only(params, masks), tuple(reports)


def _given_masks(
    params: PyTree, mask: PyTree, sparsity: Any, pattern: str | None
) -> dict[str, Array]:
    """Returns the given masks by name."""
    if sparsity is not None or pattern is not None:
        raise InputError(
            "a mask says itself what goes, so sparsity and pattern must be None; leave them out"
        )
    found: dict[str, Array] = {}

    def one(name: str, weight: Any, keep: Any) -> None:
        if keep is None:
            return
        if keep.dtype != bool or keep.shape != weight.shape:
            raise InputError(
                f"the mask of {name!r} must be bool of shape {weight.shape}, got {keep.dtype} of "
                f"{keep.shape}; make it from these parameters"
            )
        found[name] = keep

    tree.map_leaves(one, params, mask)
    if not found:
        raise InputError("every mask is None, that is dense, so there is nothing to prune")
    return found


def _prune_nnx(
    model: nnx.Module,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    call: Callable[..., Any] | None,
    prunable: PyTree | None,
    mask: PyTree | None,
    blocks: str | Sequence[str],
    **settings: Any,
) -> tuple[PyTree, PyTree, tuple[KernelReport, ...]]:
    """Returns what `prune_blocks` returns, in the structure of an NNX module's parameters."""
    if prunable is None:
        prunable = tree.prunable(params)
    variables = nnx_blocks.variables_of(model, params)
    if mask is not None:
        mask = nnx_blocks.like(variables["params"], mask)
    names = [name for name, _ in tree.named_leaves(variables["params"])]
    run = nnx_blocks.runner(model, block_graph.find(names, blocks), call)
    pruned, masks, reports = prune_blocks(
        nnx_blocks.functional(model),
        variables,
        batches,
        call=lambda _, own, batch: run(own, batch),
        prunable=nnx_blocks.marks(variables["params"], prunable),
        mask=mask,
        blocks=blocks,
        **settings,
    )
    return nnx_blocks.like(params, pruned), nnx_blocks.like(params, masks), reports


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
    axes = runner.axes(part, states[0])
    used = len(states) - plan.held_out
    if runner.wanted and plan.calibrated:
        sums = runner.measured(part, states[:used], counts[:used])
    guard: dict[str, Any] = {}
    if runner.wanted and plan.restore is not None and plan.held_out:
        guard = runner.measured(part, states[used:], counts[used:])
    new, kept = {}, {}
    for name in runner.wanted:
        weight, given = (block_graph.leaf(tree_of["params"], name) for tree_of in (part, own))
        *done, report = _kernel(
            f"{path}/{name}",
            weight,
            axes[name],
            sums.pop(name, None),
            guard.pop(name, None),
            sum(counts[:used]),
            plan,
        )
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
            axes = conventional_axes(name, shape)  # before any work, where the name tells
            if n_of_m is not None and axes is not None:
                inputs = math.prod(shape[axis] for axis in axes.inputs)
                patterns.check_divides(name, inputs, n_of_m[1])
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


def _captured(
    run: Callable[[Any, Any], Any],
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    holdout: Iterable[PyTree],
    paths: list[str],
    offload: bool,
) -> tuple[list[list[block_graph.Wire]], list[block_graph.Activations], list[int], int]:
    """Returns the blocks, for each kind of batch; what goes into the first; the sequences.

    The last is the number of batches that are held out, which come last.
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
    marked = itertools.chain(((one, 0) for one in batches), ((one, 1) for one in holdout))
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
    if len(paths) > 1:
        _start_as_second(of_kinds, states)
    return [list(wires) for wires in zip(*of_kinds, strict=True)], states, counts, held_out


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
    ) -> None:
        self.wires, self.wanted = wires, dict(wanted)
        self.tracing = measuring.Tracing(self._run)
        self.measure = measuring.make_measure_fn(self.tracing, self.wanted, hessian=hessian)
        self.step = measuring.make_accumulate_step(self.measure)
        self.known: dict[str, Any] = {}
        self.forward = jax.jit(self._run)
        self.found: dict[str, Axes] | None = None

    def _run(self, variables: Any, state: block_graph.Activations) -> list[Array]:
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
    name: str,
    weight: Array,
    axes: Axes,
    sums: dict[str, Array] | None,
    guard: dict[str, Array] | None,
    n: int,
    plan: _Plan,
) -> tuple[Array, Array, KernelReport]:
    """Returns a kernel pruned, its mask, and the report."""
    weight_RxC = patterns.as_matrix(weight, axes)
    keep = None if plan.masks is None else patterns.as_matrix(plan.masks[name], axes)
    share = plan.shares[name]
    if not axes.copies:
        new, mask, report, restored = _matrix(name, weight_RxC, keep, sums, guard, n, share, plan)
    else:
        # Each copy, such as an expert, is a kernel of its own.
        stacked = weight_RxC.reshape(-1, *weight_RxC.shape[-2:])
        keeps: Any = [None] * len(stacked) if keep is None else keep.reshape(stacked.shape)
        done = []
        for at, one_RxC in enumerate(stacked):
            own, held = (_of_copy(some, at, len(stacked)) for some in (sums, guard))
            label = f"{name}[{at}]"
            done.append(_matrix(label, one_RxC, keeps[at], own, held, n, share, plan))
        news, kept, reports, kept_so = zip(*done, strict=True)
        new, mask = (jnp.stack(some).reshape(weight_RxC.shape) for some in (news, kept))
        report, restored = _joined(reports), any(kept_so)
    removed = mask.size - int(_count_true(mask))
    return (
        patterns.from_matrix(new, weight.shape, axes),
        patterns.from_matrix(mask, weight.shape, axes),
        KernelReport(name, removed, weight.size, report, restored),
    )


def _of_copy(sums: dict[str, Array] | None, at: int, copies: int) -> dict[str, Array] | None:
    """Returns the sums of one copy of a kernel."""
    if sums is None:
        return None
    return {
        kind: value.reshape(copies, *(value.shape[-2:] if kind == "outer" else (-1,)))[at]
        for kind, value in sums.items()
    }


def _matrix(
    name: str,
    weight_RxC: Array,
    keep_RxC: Array | None,
    sums: dict[str, Array] | None,
    guard: dict[str, Array] | None,
    n: int,
    share: float,
    plan: _Plan,
) -> tuple[Array, Array, SolverReport | None, bool]:
    """Returns a matrix pruned, its mask, the solver's report, and whether it was restored."""
    if plan.pattern is not None:
        patterns.check_divides(name, len(weight_RxC), patterns.parse_n_of_m(plan.pattern)[1])
    hessian: Any = None  # there where the plan needs it
    if sums is not None and plan.hessian:
        hessian = _scaled(sums.pop("outer").reshape([len(weight_RxC)] * 2), 2 / n)
    zeros = "keep" if plan.keep_zeros else "free"
    report: SolverReport | None = None
    # Choose the mask, unless it is given.
    if keep_RxC is not None:
        pruned_RxC = _zeroed(weight_RxC, keep_RxC)
    elif plan.method == "sparsegpt":
        damping = plan.damping_of("sparsegpt")
        pruned_RxC, keep_RxC, report = sparsegpt(
            weight_RxC, hessian, share, plan.pattern, plan.block, damping, zeros
        )
    elif plan.method == "admm":
        own = share if plan.pattern is None else None
        damping = plan.damping_of("admm")
        pruned_RxC, keep_RxC, report = admm(
            weight_RxC, hessian, own, plan.pattern, damping=damping, zeros=zeros
        )
    else:
        by_input = sums["square"] if sums is not None and plan.method != "magnitude" else None
        score_RxC = _scores(weight_RxC, by_input, n)
        if plan.keep_zeros:
            score_RxC = _zeros_last(score_RxC, weight_RxC)
        keep_RxC = _ranked(name, score_RxC, share, plan)
        pruned_RxC = _zeroed(weight_RxC, keep_RxC)
    if plan.restore is None or (plan.method == "admm" and plan.masks is None):
        return pruned_RxC, keep_RxC, report, False
    # Restore the weights that stay, if that holds on the inputs of the held-out batches.
    damping = plan.damping_of("admm")
    restored_RxC, _, solved = admm(weight_RxC, hessian, mask=keep_RxC, damping=damping)
    if guard is not None:
        outer_RxR = guard["outer"].reshape([len(weight_RxC)] * 2)
        alone, with_update = (
            float(squared_error(kernel, weight_RxC, outer_RxR))
            for kernel in (_zeroed(weight_RxC, keep_RxC), restored_RxC)
        )
        if with_update > alone:
            return pruned_RxC, keep_RxC, report, False
    return restored_RxC, keep_RxC, solved, True


def _joined(given: Sequence[SolverReport | None]) -> SolverReport | None:
    """Returns the report of all copies of a kernel, with the largest damping."""
    reports = [report for report in given if report is not None]
    if len(reports) < 2:
        return reports[0] if reports else None
    dead, removed, error = (
        sum(getattr(report, field) for report in reports) for field in ("dead", "removed", "error")
    )
    return SolverReport(max(report.damping for report in reports), dead, removed, error)


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
