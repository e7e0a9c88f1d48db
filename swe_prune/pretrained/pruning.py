"""From a pretrained model to its masks: block after block, or at once on the dense model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import allocation, blockwise, calibration, importance, masks, patterns, tree
from swe_prune.blockwise import KernelReport
from swe_prune.blockwise.sparsegpt import check_sparsity
from swe_prune.config import literal
from swe_prune.errors import InputError, did_you_mean
from swe_prune.models import gpt
from swe_prune.pretrained.settings import PruneSettings
from swe_prune.training import step as step_lib
from swe_prune.trajectory import TrajectoryStats

SEQUENTIAL = ("wanda", "wanda_variant", "sparsegpt")
"""Criteria that go block after block, as their references do."""


def checked(settings: PruneSettings) -> None:
    """Refuses what cannot be done, before anything is read.

    Raises:
        InputError: an unknown name, a sparsity that is missing or beside an n:m pattern, or two
            settings that exclude each other.
    """
    known = [*importance.names(), *SEQUENTIAL]
    if settings.criterion not in known:
        raise InputError(
            f"unknown criterion {settings.criterion!r}; {did_you_mean(settings.criterion, known)}"
        )
    if settings.allocation is not None:
        allocation.get(settings.allocation).check_options(())
    n_of_m = settings.pattern is not None and patterns.is_n_of_m(settings.pattern)
    if n_of_m and (settings.sparsity is not None or settings.allocation is not None):
        raise InputError(
            f"--pattern={settings.pattern} fixes the sparsity of every tensor; leave out "
            "--sparsity and --allocation"
        )
    if not n_of_m and (settings.sparsity is None or not 0 <= settings.sparsity < 1):
        raise InputError(
            f"--sparsity={settings.sparsity} is no share to remove; give a number in [0, 1)"
        )
    if settings.scope not in masks.SCOPES:
        raise InputError(
            f"--scope={settings.scope} is unknown; {did_you_mean(settings.scope, masks.SCOPES)}"
        )
    if sequential(settings):
        if settings.scope != "tensor" or (settings.pattern is not None and not n_of_m):
            raise InputError(
                f"--criterion={settings.criterion} prunes kernel by kernel, unstructured or n:m; "
                "leave out --scope and other patterns, or give --at-once"
            )
    else:
        criterion = importance.get(settings.criterion)
        criterion.check_options(name for name, _ in options(settings))
        if "second_moment" in criterion.needs:
            raise InputError(
                f"criterion {criterion.name!r} needs the optimizer's second moment, which a "
                "checkpoint has not; use one that is measured, such as wanda or sparsegpt"
            )


def sequential(settings: PruneSettings) -> bool:
    """Returns whether blocks are pruned one after another."""
    one_way = settings.criterion not in importance.names()
    return settings.criterion in SEQUENTIAL and (one_way or not settings.at_once)


def options(settings: PruneSettings) -> list[tuple[str, Any]]:
    """Returns the criterion's own options.

    Raises:
        InputError: one that is not NAME=VALUE.
    """
    found = []
    for one in settings.options:
        name, equals, value = one.partition("=")
        if not equals:
            raise InputError(f"--option={one} has no value; write --option=NAME=VALUE")
        found.append((name, literal(value)))
    return found


def check_trajectory(settings: PruneSettings, tracked: bool) -> None:
    """Refuses a criterion of the trajectory where the model has none.

    Raises:
        InputError: it has none.
    """
    if sequential(settings):
        return
    criterion = importance.get(settings.criterion)
    if criterion.measures and not tracked:
        raise InputError(
            f"criterion {criterion.name!r} judges weights by their trajectory, and "
            f"{settings.model} has none of {', '.join(criterion.measures)}; make one with "
            "'python -m swe_prune finetune --track --model=… --out=DIR' and give --model=DIR"
        )


def needs_text(settings: PruneSettings) -> bool:
    """Returns whether anything is measured on calibration text."""
    if sequential(settings) or importance.get(settings.criterion).measured:
        return True
    rule = settings.allocation and allocation.get(settings.allocation)
    return bool(rule) and "batches" in rule.needs


def pruned(
    module: nn.Module,
    params: PyTree,
    batches: Sequence[Mapping[str, Any]],
    settings: PruneSettings,
    *,
    stats: TrajectoryStats | None = None,
    progress: Callable[[KernelReport], None] | None = None,
) -> tuple[PyTree, PyTree]:
    """Returns the parameters with exact zeros, and the masks.

    Args:
        module: the model.
        params: its weights; numpy arrays stay in host memory where blocks go one after another.
        batches: of calibration windows; none where nothing is measured.
        settings: checked.
        stats: the trajectory of a tracked fine-tuning, for criteria that read one.
        progress: called with the report of each kernel, block after block.

    Raises:
        InputError: shapes that do not fit, or a measure that was not tracked.
        RunError: a Hessian that no damping helps.
    """
    if sequential(settings):
        return _block_after_block(module, params, batches, settings, progress)
    criterion = importance.get(settings.criterion)
    loss = functools.partial(_loss, module)
    measured = calibration.measure(
        criterion.measured, module, {"params": params}, batches, loss=loss, at_once=1
    )
    scores = importance.score(
        settings.criterion,
        params,
        stats=stats,
        measured=measured,
        prunable=None if stats is not None and criterion.measures else tree.prunable(params),
        seed=settings.seed,
        **dict(options(settings)),
    )
    share: Any = settings.sparsity
    if settings.pattern is not None and patterns.is_n_of_m(settings.pattern):
        share, _ = check_sparsity(None, settings.pattern)
    if settings.allocation is not None:
        share = allocation.allocate(
            settings.allocation, share, scores=scores, params=params, loss=loss, batches=batches
        )
    mask = masks.by_sparsity(scores, share, settings.scope, pattern=settings.pattern)
    return masks.apply(params, mask), mask


def _block_after_block(
    module: nn.Module,
    params: PyTree,
    batches: Sequence[Mapping[str, Any]],
    settings: PruneSettings,
    progress: Any,
) -> tuple[PyTree, PyTree]:
    share: Any = settings.sparsity
    if settings.allocation is not None:
        scores = None
        if "scores" in allocation.get(settings.allocation).needs:
            scores = blockwise.dense_scores(module, {"params": params}, batches)
        share = allocation.allocate(
            settings.allocation,
            share,
            scores=scores,
            params=params,
            loss=functools.partial(_loss, module),
            batches=batches,
        )
    if settings.offload:
        params = jax.tree.map(np.asarray, params)
    new, mask, _ = blockwise.prune_blocks(
        module,
        {"params": params},
        batches,
        blocks=gpt.BLOCKS,
        sparsity=share,
        method=settings.criterion,
        pattern=settings.pattern,
        offload=settings.offload,
        progress=progress,
        **dict(options(settings)),
    )
    return masks.apply(new, mask), mask


def _loss(module: nn.Module, params: PyTree, batch: Mapping[str, Any]) -> Any:
    return step_lib.eval_step(params, dict(batch), model=module) / batch["targets"].size
