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
from swe_prune.blockwise import block_graph, nnx_blocks
from swe_prune.blockwise.kernels import METHODS, RESTORES, KernelReport, Plan, prune_kernel
from swe_prune.blockwise.runner import Runner, captured
from swe_prune.blockwise.sparsegpt import BLOCK, check_sparsity
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.errors import InputError, check_choice, did_you_mean
from swe_prune.layout import conventional_axes
from swe_prune.masks.fitting import check_mask


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
        damping: of "sparsegpt", "admm" and "least_squares". None: 0.01, 0.1 and 0.3.
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
    plan = Plan(method, given, restore, shares, pattern, block, damping, donate, keep_zeros)
    if is_nnx:
        run = nnx_blocks.runner(model, paths, call)
    else:
        run = functools.partial(call or measuring.applied, model)
    wires, states, counts, held_out = captured(run, variables, batches, holdout, paths, offload)
    plan = dataclasses.replace(plan, held_out=held_out)
    pruned: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    reports: list[KernelReport] = []
    runners: list[Runner] = []  # several where blocks differ, such as layers with a window
    for index, of_kinds in enumerate(wires):
        path = of_kinds[0].path
        wanted = {
            name.removeprefix(path + "/"): shape
            for name, shape in shapes.items()
            if name.startswith(path + "/")
        }
        runner = next((one for one in runners if one.fits(of_kinds, wanted)), None)
        if runner is None:
            runner = Runner(of_kinds, wanted, plan.hessian)
            runners.append(runner)
        own = block_graph.part(variables, path)
        new, kept = _one_block(runner, path, own, states, counts, plan, reports, progress)
        if index + 1 < len(wires):
            _advance(runner, own, new, states, wires[index + 1 :], offload)
        pruned |= {f"{path}/{name}": leaf for name, leaf in new.items()}
        masks |= {f"{path}/{name}": leaf for name, leaf in kept.items()}
    return _with(alike, pruned), _only(alike, masks), tuple(reports)


def _given_masks(
    params: PyTree, mask: PyTree, sparsity: Any, pattern: str | None
) -> dict[str, Array]:
    """Returns the given masks by name."""
    if sparsity is not None or pattern is not None:
        raise InputError(
            "a mask says itself what goes, so sparsity and pattern must be None; leave them out"
        )
    check_mask(mask, params)
    found = {name: keep for name, keep in tree.named_leaves(mask) if keep is not None}
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
    states: list[block_graph.Activations],
    counts: list[int],
    plan: Plan,
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
        *done, report = prune_kernel(
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
    runner: Runner,
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
