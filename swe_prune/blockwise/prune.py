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
from flax import nnx
from jaxtyping import Array, PyTree

from swe_prune import importance, patterns, tree
from swe_prune.allocation import Allocation
from swe_prune.arguments import check_concrete, checked
from swe_prune.blockwise import block_graph, guard, local, nnx_blocks
from swe_prune.blockwise.kernels import (
    METHODS,
    RESTORES,
    KernelReport,
    Plan,
    Sums,
    prune_kernel,
    zeroed,
)
from swe_prune.blockwise.runner import Runner, captured, variables_with
from swe_prune.blockwise.sparsegpt import BLOCK, check_mask_alone, check_sparsity
from swe_prune.blockwise.streams import TARGETS, Streams
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.errors import InputError, check_choice, did_you_mean
from swe_prune.layout import conventional_axes
from swe_prune.masks.fitting import check_mask


@checked
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
    target: str = "pruned_inputs",
    holdout: Iterable[PyTree] | None = None,
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
        model: Any Linen module that calls its blocks one after the other, outside of nn.remat and
            nn.scan, or an NNX module with a list of blocks.
        variables: {"params": …} and other collections; of an NNX module its state, a pure dict of
            it, or the module itself. Weights that are numpy arrays stay in host
            memory but for the block at work, and their results go back there.
        batches: Calibration batches, see `calibration.inputs`; they may be divided over devices.
        blocks: Regular expression that matches the blocks' whole paths, such as r"block_[0-9]+", or
            their paths; they are taken in the order in which the model calls them.
        sparsity: Share of each kernel to remove; or by kernel name, or an allocation; None with a
            pattern, which fixes it.
        method: "wanda", "wanda_variant" (see `wanda`), "sparsegpt" or "admm", which also update the
            weights that stay, or "magnitude", by kernel and without calibration.
        pattern: None or "n:m".
        mask: Bool pytree like the parameters of masks that were chosen otherwise, None where
            dense. Then sparsity and pattern must be None and the method is not used.
        restore: How the weights that stay make up for the others, for the mask that the method
            chose or that is given: "admm" updates each kernel by `admm`; "local" trains the kernels
            of a block together towards the dense model's activations, see `local`; "admm+local"
            does the one and then the other. None leaves the weights as the method does.
        target: What "admm" aims at when it restores, one of `TARGETS`: the outputs of the dense
            kernel on "pruned_inputs", those that the pruned blocks before it give, or on
            "dense_inputs", those that the dense model has; or "dense_outputs", the outputs that the
            dense model has in their place, on the inputs that the pruned blocks give.
        holdout: Batches that judge what is restored: a kernel keeps its restored weights only if
            its block's outputs on these are then no farther from the dense model's, and so do the
            block and in the end the model against the masks alone; the reports say which. None: the
            last eighth of `batches`, which then calibrate nothing; of a single batch nothing is
            judged. (): nothing is. Better of another text than `batches`, so that restoring does
            not fit that alone.
        prunable: Bool pytree; None: `tree.prunable(params)`. Kernels outside of the blocks stay.
        call: Function (module, variables, batch) that runs a Linen module in another way; for an
            NNX module (module, batch).
        block: Number of inputs at a time in "sparsegpt".
        damping: Damping of "sparsegpt", "admm" and "least_squares". None: 0.01, 0.1 and 0.3.
        offload: Whether the activations stay in host memory, with one batch of them on the device.
        donate: Whether to give up each kernel that is pruned, so that the weights are in memory
            once (those of a block twice where they are restored): jax arrays are deleted, and numpy
            arrays that can be written hold the result. After an error
            some of them are lost. The model as a whole cannot return to the masks alone.
        zeros: What becomes of weights that are 0 already: "keep", removed first and counted in the
            sparsity; or "free".
        progress: Function called with the report of every kernel as soon as it is pruned.

    Returns:
        Parameters of the same dtypes; masks like them, bool, None where dense; reports.

    Raises:
        InputError: Errors of `calibration.inputs`, blocks that cannot be run alone, an unknown
            method, or a sparsity that is missing for a kernel or named for none.
        RunError: A Hessian that no damping makes positive definite.

    Sources: those of `sparsegpt`, `admm` and `wanda`, whose references all go block after block.
    """
    check_concrete((variables, batches), "the variables and batches")
    is_nnx = isinstance(model, nnx.Module)
    if not is_nnx and not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a Linen or an NNX module whose blocks are modules, got "
            f"{type(model).__name__}; prune a plain function at once, by a criterion such as wanda "
            "with measured=calibration.inputs(fn, params, batches)"
        )
    # Results are like what was given; an NNX module is run from nested dicts of the same names.
    alike = variables if is_nnx else measuring.params_of(variables)
    if is_nnx:
        variables = nnx_blocks.variables_of(model, variables)
    params = variables["params"]
    check_choice(method, METHODS, "method")
    check_choice(restore, RESTORES, "restore")
    check_choice(target, TARGETS, "target")
    check_choice(zeros, importance.ZEROS, "zeros")
    paths = block_graph.find([name for name, _ in tree.named_leaves(params)], blocks)
    given = None if mask is None else _given_masks(params, mask, sparsity, pattern)
    if restore == "least_squares":
        _check_whole_inputs(given)
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
    plan = Plan(method, given, restore, target, shares, pattern, block, damping, donate, keep_zeros)
    if is_nnx:
        run = nnx_blocks.runner(model, paths, call)
    else:
        run = functools.partial(call or measuring.applied, model)
    if restore is None:
        holdout = ()
    wires, states, counts, held_out = captured(run, variables, batches, holdout, paths, offload)
    both = "local" in plan.steps or ("admm" in plan.steps and target != "pruned_inputs")
    streams = Streams.of(states, counts, held_out, both)
    del states
    found: dict[str, Any] = {}
    reports: list[KernelReport] = []
    runners: list[Runner] = []  # several where blocks differ, such as layers with a window
    verdict: guard.Verdict | None = None
    for index, of_kinds in enumerate(wires):
        path = of_kinds[0].path
        wanted = {
            name.removeprefix(path + "/"): shape
            for name, shape in shapes.items()
            if name.startswith(path + "/")
        }
        runner = next((one for one in runners if one.fits(of_kinds, wanted)), None)
        if runner is None:
            runner = Runner(of_kinds, wanted, plan.hessian, plan.paired)
            runners.append(runner)
        own = block_graph.part(variables, path)
        later = wires[index + 1 :]
        done, of_block, verdict = _one_block(runner, path, own, streams, plan, later, offload)
        found |= {f"{path}/{name}": leaves for name, leaves in done.items()}
        reports += of_block
        if progress is not None:
            for report in of_block:
                progress(report)
    pruned = {name: new for name, (new, _, _) in found.items()}
    masks = {name: keep for name, (_, keep, _) in found.items()}
    if verdict and not donate and guard.worse(verdict.kept, verdict.all_alone):
        # The whole is better off with the masks alone, whatever each block was.
        weights = dict(tree.named_leaves(params))
        for name, (_, keep, alone) in found.items():
            pruned[name] = alone if alone is not None else _where(keep, weights[name])
        reports = [dataclasses.replace(one, restored=False, gave_up="model") for one in reports]
    return _with(alike, pruned), _only(alike, masks), tuple(reports)


def _given_masks(
    params: PyTree, mask: PyTree, sparsity: Any, pattern: str | None
) -> dict[str, Array]:
    """Returns the given masks by name."""
    check_mask_alone(sparsity, pattern)
    check_mask(mask, params)
    found = tree.present(mask)
    if not found:
        raise InputError("every mask is None, that is dense, so there is nothing to prune")
    return found


def _check_whole_inputs(masks: Mapping[str, Array] | None) -> None:
    """Refuses masks that do not remove whole inputs, or outputs, of kernels in Flax's layout."""
    for name, keep in (masks or {"": None}).items():
        outer = None if keep is None else keep.any(-1, keepdims=True) & keep.any(-2, keepdims=True)
        if keep is None or (keep.ndim > 1 and not bool((keep == outer).all())):
            what = f"that of {name!r} removes single weights" if name else "there is no mask"
            raise InputError(
                f"restore='least_squares' needs mask= that removes whole inputs, and {what}; give "
                "structured.unit_mask(params, groups, keep), or take restore='admm'"
            )


def _one_block(
    runner: Runner,
    path: str,
    own: Mapping[str, PyTree],
    streams: Streams,
    plan: Plan,
    later: list[list[block_graph.Wire]],
    offload: bool,
) -> tuple[dict[str, Any], list[KernelReport], guard.Verdict | None]:
    """Prunes a block and takes the activations through it.

    Returns:
        By name the pruned kernels, their masks and, where masks alone do not give them, the kernels
        before they were restored, where its weights came from; the reports; what the held-out
        batches say of the block, if any judge.
    """
    part = jax.tree.map(jnp.asarray, own)
    axes = runner.axes(part, streams.pruned[0])
    sums, n = {}, 0
    if runner.wanted and plan.calibrated:
        sums, n = streams.sums(runner, part, plan.target)
    new, alone, kept, reports = {}, {}, {}, []
    for name in runner.wanted:
        weight = block_graph.leaf(part["params"], name)
        own_sums = Sums(sums.pop(name), n) if sums else None
        new[name], alone[name], kept[name], report = prune_kernel(
            f"{path}/{name}", weight, axes[name], own_sums, plan
        )
        reports.append(report)
    if "local" in plan.steps and runner.wanted:
        used = streams.used
        some = streams.pruned[:used], streams.dense[:used]
        new = local.reconstruct(runner, part, new, kept, *some)
        reports = [dataclasses.replace(one, restored=True) for one in reports]
    verdict = None
    if plan.restore is not None and streams.held_out:
        verdict = streams.judge(runner, part, alone, new)
        new = verdict.kernels
        reports = [_judged(one, path, verdict) for one in reports]
    parts = {"dense": part, "alone": variables_with(part, alone)}
    parts["restored"] = variables_with(part, new)
    if later:
        streams.advance(runner, parts, later, offload)
    done = {}
    for name in runner.wanted:
        given = block_graph.leaf(own["params"], name)
        updated = verdict is not None and plan.masks is None and plan.method == "sparsegpt"
        leaves = new[name], kept[name], alone[name] if updated else None
        result, *rest = jax.device_get(leaves) if isinstance(given, np.ndarray) else leaves
        done[name] = (_in_place_of(given, result) if plan.donate else result, *rest)
    return done, reports, verdict


def _judged(report: KernelReport, path: str, verdict: guard.Verdict) -> KernelReport:
    """Returns the report of a kernel with what the held-out batches say of it."""
    gave_up = verdict.gave_up.get(report.name.removeprefix(path + "/"))
    return dataclasses.replace(
        report,
        restored=report.restored and gave_up is None,
        held_out=(verdict.alone, verdict.restored, verdict.kept),
        gave_up=gave_up,
    )


def _where(keep: Any, weight: Any) -> Any:
    """Returns the weights that a mask keeps, where the given ones are."""
    return np.where(keep, weight, 0) if isinstance(weight, np.ndarray) else zeroed(weight, keep)


def _in_place_of(given: Any, new: Any) -> Any:
    """Returns a pruned kernel, where the given one was if it is one that can be written."""
    if isinstance(given, np.ndarray) and given.flags.writeable:
        given[...] = new
        return given
    if isinstance(given, jax.Array) and given is not new:
        given.delete()
    return new


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
                f"a sparsity is given for {name!r}, which is not a prunable weight of the blocks; "
                f"{did_you_mean(name, shapes)}"
            )
    for name in shapes:
        if name not in named:
            raise InputError(f"no sparsity is given for {name!r}; name it, or exclude it")
    return {name: check_sparsity(named[name], pattern)[0] for name in shapes}
