"""One-call pruning with sensible defaults, which prints a summary."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from swe_prune import importance, masks, tree
from swe_prune.errors import InputError
from swe_prune.masks import Summary
from swe_prune.recipe import Evidence, Recipe, check
from swe_prune.recipe import prune as prune_by
from swe_prune.trajectory import TrajectoryStats


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Result of `prune`; printed, it says what was done.

    Attributes:
        params: Weights with exact zeros, of the same structure and dtypes as given.
        masks: Bool pytree, None where dense; the argument of `masks.keep` for fine-tuning.
        summary: Counts of retained weights, per tensor and in all.
        recipe: Request that was carried out.
        why: Reason for the criterion.
        dense: Number of weights that stay dense, by reason.
    """

    params: PyTree
    masks: PyTree
    summary: Summary
    recipe: Recipe
    why: str
    dense: dict[str, int]

    @property
    def criterion(self) -> str:
        """Name of the criterion that was used."""
        return self.recipe.name

    @property
    def scope(self) -> str:
        """Where the sparsity was met, in words."""
        recipe = self.recipe
        if recipe.rate is not None:
            return f"thresholds of {recipe.rate:g} standard deviations of each tensor"
        if recipe.n_of_m:
            return f"pattern {recipe.pattern!r}"
        ranked = {
            "global": "ranked over all tensors together",
            "tensor": "ranked within each tensor",
            "row": "ranked within each output",
        }[recipe.scope]
        return ranked if recipe.pattern is None else f"pattern {recipe.pattern!r}, {ranked}"

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
    sparsity: float | None = None,
    *,
    stats: TrajectoryStats | None = None,
    opt_state: PyTree | None = None,
    measured: Mapping[str, PyTree] | None = None,
    criterion: str | None = None,
    scope: str | None = None,
    pattern: str | None = None,
    rate: float | None = None,
    prunable: PyTree | None = None,
    seed: int = 0,
    verbose: bool = True,
    **options: Any,
) -> Pruned:
    """Prunes with the best criterion that the given inputs allow, and prints a summary.

    Without a `criterion`: `forecast_curvature` when both the trajectory's late mean and an
    optimizer with a second moment are given; `magnitude_curvature` with the optimizer alone;
    `magnitude` without one, since the trajectory alone does no better. Criteria with curvature
    rank all tensors together, the others rank within each tensor. Embeddings, norms, biases and
    the output head stay dense.

    Call it outside of jit. For block-by-block methods, allocations and schedules see `recipe`,
    `blockwise`, `allocation` and `schedules`.

    Args:
        params: Pytree of weights: a Linen dict, an nnx.State, an Equinox module, or any other.
        sparsity: Share of the prunable weights to remove, in [0, 1). None: what an n:m pattern
            fixes, or 0.5.
        stats: Trajectory statistics, as `trajectory.update` returns them.
        opt_state: State of the optimizer that trained the weights.
        measured: Calibration results by need, as `calibration.inputs` and `calibration.gradients`
            return them.
        criterion: Name of a registered criterion; see `importance.names()`.
        scope: Where the sparsity is met; see `masks.SCOPES`.
        pattern: Shape of what is removed, for example "2:4"; see `masks.by_sparsity`.
        rate: Multiple of the standard deviation, for the rule of arXiv 2502.17071, in place of a
            sparsity.
        prunable: Bool pytree. None: the weights that `stats` tracks, or the rules of
            `tree.prunable`.
        seed: Seed of criteria that draw random numbers.
        verbose: Whether to print the summary.
        **options: Options of the criterion.

    Raises:
        InputError: A request that cannot work, or missing inputs; see `recipe.check` and
            `importance.score`.

    >>> import jax.numpy as jnp
    >>> prune({"up": {"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]])}}, verbose=False).summary.kept
    2
    """
    why = "it was asked for"
    if criterion is None:
        criterion, why = _choose(params, stats, opt_state)
    if scope is None:
        curved = "second_moment" in importance.get(criterion).needs
        scope = "global" if curved and pattern is None and rate is None else "tensor"
    recipe = Recipe(criterion, options, None, sparsity, rate, scope, pattern, seed=seed)
    if sparsity is None and rate is None and not recipe.n_of_m:
        recipe = dataclasses.replace(recipe, sparsity=0.5)
    check(recipe)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise InputError(
            "swe_prune.prune counts and reports, which a traced program cannot; call it outside "
            "of jit, or use importance.score and masks.by_sparsity inside"
        )
    evidence = Evidence(stats, opt_state, measured or {})
    new_params, mask = prune_by(recipe, params, evidence, prunable=prunable)
    pruned = Pruned(new_params, mask, masks.summary(mask), recipe, why, _dense(params, mask))
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
