"""Pruning in one call: the sensible thing for what is at hand, and a sentence on what it was."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from swe_prune import importance, masks, tree
from swe_prune.errors import InputError
from swe_prune.masks import Summary
from swe_prune.trajectory import TrajectoryStats


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What `prune` returns; printed, it says what was done.

    Attributes:
        params: the weights with exact zeros, same structure and dtypes as given.
        masks: bool pytree, None where dense; hand it to `masks.keep` to fine-tune.
        summary: how many weights of each tensor are kept.
        criterion: the name of the criterion that was used.
        scope: where the sparsity was met, or the pattern.
        why: why this criterion.
        dense: by reason, how many weights stay dense.
    """

    params: PyTree
    masks: PyTree
    summary: Summary
    criterion: str
    scope: str
    why: str
    dense: dict[str, int]

    def __str__(self) -> str:
        done = self.summary
        width = max(map(len, done.tensors))
        lines = [
            f"Removed {done.pruned:,} of {done.total:,} prunable weights "
            f"({100 * done.sparsity:.1f} %) by {self.criterion!r}, {self.scope}.",
            f"Why {self.criterion!r}: {self.why}.",
            *(
                f"  {name:{width}}  {tally.pruned:>12,} of {tally.total:>12,}  "
                f"{100 * tally.sparsity:5.1f} %"
                for name, tally in done.tensors.items()
            ),
        ]
        if self.dense:
            told = ", ".join(f"{count:,} ({why})" for why, count in self.dense.items())
            lines.append(f"Dense, as they were: {told}.")
        lines.append("To fine-tune: masks.keep(optimizer, pruned.masks) holds the zeros.")
        return "\n".join(lines)


def prune(
    params: PyTree,
    sparsity: float = 0.5,
    *,
    stats: TrajectoryStats | None = None,
    opt_state: PyTree | None = None,
    criterion: str | None = None,
    scope: str | None = None,
    pattern: str | None = None,
    prunable: PyTree | None = None,
    verbose: bool = True,
    **options: Any,
) -> Pruned:
    """Prunes trained weights by the best that is at hand, and says what it did.

    Without a `criterion`: `forecast_curvature` when both the trajectory's late mean and an
    optimizer with a second moment are given; `magnitude_curvature` with the optimizer alone;
    `magnitude` without one, since the trajectory alone does no better. Criteria with curvature
    rank all tensors together, the others rank within each: the README's tables show what each
    costs. Embeddings, norms, biases and the output head stay dense.

    Call it outside of jit. For calibrated criteria, allocations and schedules see `importance`,
    `allocation` and `schedules`.

    Args:
        params: pytree of weights: a Linen dict, nnx.State, an Equinox module, anything.
        sparsity: share of the prunable weights to remove, in [0, 1).
        stats: of `trajectory.update`.
        opt_state: of the optimizer that trained the weights.
        criterion: another of `importance.names()`.
        scope: another of `masks.SCOPES`.
        pattern: as in `masks.by_sparsity`, for example "2:4".
        prunable: bool pytree; None: what `stats` tracks, else the rules of `tree.prunable`.
        verbose: print the report.
        **options: of the criterion.

    Raises:
        InputError: as `importance.score` and `masks.by_sparsity`.

    >>> import jax.numpy as jnp
    >>> prune({"up": {"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]])}}, verbose=False).summary.kept
    2
    """
    why = "it was asked for"
    if criterion is None:
        criterion, why = _choose(params, stats, opt_state)
    if scope is None:
        scope = "global" if "second_moment" in importance.get(criterion).needs else "tensor"
        scope = scope if pattern is None else "tensor"
    scores = importance.score(
        criterion, params, stats=stats, opt_state=opt_state, prunable=prunable, **options
    )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(scores)):
        raise InputError(
            "swe_prune.prune counts and reports, which a traced program cannot; call it outside "
            "of jit, or use importance.score and masks.by_sparsity inside"
        )
    mask = masks.by_sparsity(scores, sparsity, scope, pattern=pattern)
    shown = {
        "global": "ranked over all tensors together",
        "tensor": "ranked within each tensor",
        "row": "ranked within each output",
    }[scope]
    if pattern is not None:
        shown = f"pattern {pattern!r}, {shown}" if ":" not in pattern else f"pattern {pattern!r}"
    pruned = Pruned(
        params=masks.apply(params, mask),
        masks=mask,
        summary=masks.summary(mask),
        criterion=criterion,
        scope=shown,
        why=why,
        dense=_dense(params, mask),
    )
    if verbose:
        print(pruned)
    return pruned


def _choose(
    params: PyTree, stats: TrajectoryStats | None, opt_state: PyTree | None
) -> tuple[str, str]:
    tracked = stats is not None and "late_mean" in stats.measures
    curved = opt_state is not None and importance.has_second_moment(opt_state, params)
    if tracked and curved:
        return "forecast_curvature", "it has the late mean and the optimizer's second moment"
    if curved:
        return "magnitude_curvature", "it has the optimizer's second moment, but no late mean"
    lacks = "no optimizer state" if opt_state is None else "an optimizer without a second moment"
    return "magnitude", f"it has {lacks}, and without curvature nothing does reliably better"


def _dense(params: PyTree, mask: PyTree) -> dict[str, int]:
    pruned = {name for name, leaf in tree.named_leaves(mask) if leaf is not None}
    counts: dict[str, int] = {}
    for name, leaf in tree.named_leaves(params):
        if tree.is_weight(leaf) and name not in pruned:
            why = tree.dense_reason(name, leaf) or "not chosen"
            counts[why] = counts.get(why, 0) + tree.size(leaf)
    return counts
