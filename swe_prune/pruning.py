"""One-call pruning with sensible defaults, which prints a summary."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jaxtyping import PyTree

from swe_prune import importance, masks, patterns, select, tree
from swe_prune.calibration.measures import OF_GRADIENTS
from swe_prune.choices import Restore, Scope, Zeros
from swe_prune.errors import InputError
from swe_prune.layout import layout as trace_layout
from swe_prune.masks import Summary
from swe_prune.recipe import Evidence, Recipe, check, measure
from swe_prune.recipe import prune as prune_by
from swe_prune.recipe.defaults import complete
from swe_prune.recipe.evidence import Loss
from swe_prune.trajectory import TrajectoryStats, restored


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Result of `prune`; printed, it says what was done.

    Attributes:
        params: What was given, with exact zeros: an object of the same kind and dtypes.
        masks: Bool pytree like the weights that the optimizer trains, None where dense; the
            argument of `masks.keep` for fine-tuning. For an NNX module it is like
            `nnx.state(module, nnx.Param)`, for a training state like its `params`, for Linen's
            variables like the variables.
        summary: Counts of retained weights, per tensor and in all.
        recipe: Request that was carried out.
        why: Reason for the criterion.
        dense: Number of weights that stay dense, by reason.
        zeros_before: Number of prunable weights that were 0 when they were given.
        zeros_after: Number of prunable weights that are 0 in `params`; more than the masks hold
            only with `zeros="free"`.
        output: Name of a pruned weight that alone gives the model's result by the traced layout,
            as an output head does, or None.
    """

    params: PyTree
    masks: PyTree
    summary: Summary
    recipe: Recipe
    why: str
    dense: dict[str, int]
    zeros_before: int = 0
    zeros_after: int = 0
    output: str | None = None

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
        if self.zeros_before:
            lines.append(self._told_of_zeros())
        if self.dense:
            told = ", ".join(f"{count:,} ({why})" for why, count in self.dense.items())
            lines.append(f"Dense, as they were: {told}.")
        if self.output is not None:
            lines.append(
                f"{self.output!r} gives the model's result; if it is the output head, exclude it "
                "with prunable=tree.prunable(params, exclude=…)."
            )
        lines.append("To fine-tune: masks.keep(optimizer, pruned.masks) holds the zeros.")
        return "\n".join(lines)

    def _told_of_zeros(self) -> str:
        before, after = self.zeros_before, self.zeros_after
        if self.recipe.zeros == "free":
            return (
                f"{before:,} were 0 already: {100 * after / self.summary.total:.1f} % of the "
                "result are 0, of which masks.keep holds those removed here."
            )
        asked = self.recipe.target
        less = asked is not None and self.summary.pruned == before
        start = f"Asked for {100 * (asked or 0):.1f} %; " if less else ""
        return f"{start}{before:,} were 0 already and stay so; zeros='free' lets them go."


def prune(
    params: Any,
    sparsity: float | None = None,
    *,
    stats: TrajectoryStats | Mapping[str, Any] | None = None,
    opt_state: PyTree | None = None,
    measured: Mapping[str, PyTree] | None = None,
    criterion: str | None = None,
    scope: Scope | None = None,
    pattern: str | None = None,
    rate: float | None = None,
    prunable: PyTree | None = None,
    seed: int = 0,
    zeros: Zeros = "keep",
    layout: PyTree | None = None,
    model: Any = None,
    batch: PyTree | None = None,
    loss: Loss | None = None,
    batches: Sequence[PyTree] = (),
    blocks: str | Sequence[str] | None = None,
    restore: Restore | None = None,
    max_sparsity: float | None = None,
    verbose: bool = True,
    **options: Any,
) -> Pruned:
    """Prunes with the best criterion that the given inputs allow, and prints a summary.

    Without a `criterion`: `forecast_curvature` when both the trajectory's late mean and an
    optimizer with a second moment are given; `magnitude_curvature` with the optimizer alone;
    `fisher` at power ½ with `loss` and `batches` in its place, one gradient an example; `magnitude`
    with nothing, since the trajectory alone does no better. Criteria with curvature rank all
    tensors together, and then none loses more than 95 %; with `fisher` each keeps at least half of
    what it would keep if all lost the same share. The others rank within each tensor. With a Linen
    `model`, `batches` and `blocks` the weights that stay are restored by ADMM. Embeddings, norms,
    biases and the output head stay dense.

    Where the optimizer has a second moment of some tensors only, such as Muon, `multi_transform` or
    frozen weights, the others rank by the same criterion with a constant in its place, which is
    `magnitude` or `forecast`. Scores with and without it have no common scale, so each tensor then
    loses the same share; with `scope="global"` all rank by `magnitude`. `Pruned.why` says so.

    Call it outside of jit. For block-by-block methods, allocations and schedules see `recipe`,
    `blockwise`, `allocation` and `schedules`.

    Args:
        params: Pytree of weights: a Linen dict, an nnx.State, an Equinox module, or any other. Or
            what holds weights, of which a new one is returned: an NNX module; a training state with
            `params`, whose `opt_state` is used unless one is given; Linen's variables, of which
            only "params" is pruned.
        sparsity: Share of the prunable weights to remove, in [0, 1). None: what an n:m pattern
            fixes, or 0.5.
        stats: Trajectory statistics, as `trajectory.update` returns them.
        opt_state: State of the optimizer that trained the weights, or an `nnx.Optimizer`.
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
        zeros: What becomes of weights that are 0 already. "keep": they count as removed first, so
            that the sparsity is never below theirs. "free": they rank like the others.
        layout: Pytree of `swe_prune.Axes`, as `swe_prune.layout` traces it, for rules that need
            the inputs of each output and for stacked tensors. None: it is traced if a batch is
            given, else Flax's naming convention is all that is known.
        model: Function of (params, batch), Linen module or NNX module to trace the layout of. None
            with a batch: `params` itself, which must be an NNX module.
        batch: Batch to trace `model` on, which may be abstract.
        loss: Function of (params, batch) that returns a scalar, for curvature and criteria that
            read gradients of it.
        batches: Calibration batches, for these and for `restore`.
        blocks: Rule that matches the paths of the blocks of `model`, to restore them one by one.
        restore: How the weights that stay make up for the others; see `blockwise.prune_blocks`.
            None: "admm" where no criterion is asked for and model, batches and blocks are given.
        max_sparsity: Largest share that any tensor loses, with scope "global".
        verbose: Whether to print the summary.
        **options: Options of the criterion.

    Raises:
        InputError: A request that cannot work, or missing inputs; statistics without a snapshot, or
            second moments that are all 0; see `recipe.check` and `importance.score`.

    >>> import jax.numpy as jnp
    >>> prune({"up": {"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]])}}, verbose=False).summary.kept
    2
    """
    # 1. Take the weights out of what holds them, and the rest as pytrees like the weights.
    holder = tree.held(params)
    weights = holder.weights
    _check_concrete(weights)
    evidence, prunable = _given(holder, stats, opt_state, measured, prunable)
    # 2. Trace the layout, and choose the weights by it.
    if batch is None and model is not None and len(batches):
        batch = batches[0]
    layout = _layout(params, holder, layout, model, batch)
    if prunable is None and evidence.stats is None:
        prunable = tree.prunable(weights, layout=layout)
    # 3. Complete the request by what is available, and check it.
    has_loss = loss is not None and len(batches) > 0
    asked = {
        "criterion": criterion,
        "options": options,
        "sparsity": _default_sparsity(sparsity, pattern, rate),
        "rate": rate,
        "scope": scope,
        "pattern": pattern,
        "seed": seed,
        "zeros": zeros,
        "max_sparsity": max_sparsity,
        **({} if restore is None else {"restore": restore}),
    }
    recipe, evidence, why = complete(
        asked,
        weights,
        evidence,
        prunable,
        measurable=OF_GRADIENTS if has_loss else (),
        restorable=isinstance(model, nn.Module) and blocks is not None and len(batches) > 0,
    )
    if recipe.restore is not None and not isinstance(model, nn.Module):
        raise InputError(
            f"restore={recipe.restore!r} runs the blocks of a Linen module, got a model of type "
            f"{type(model).__name__}; give one, with batches= and blocks=, or call "
            "blockwise.prune_blocks(mask=, restore=)"
        )
    check(recipe)
    # 4. Measure what the criterion reads of the loss and was not given.
    if loss is not None and has_loss and (recipe.needs & OF_GRADIENTS) - set(evidence.measured):
        evidence = measure(
            [recipe],
            model,
            weights,
            batches,
            loss=loss,
            prunable=prunable,
            stats=evidence.stats,
            opt_state=evidence.opt_state,
            measured=evidence.measured,
            at_once=1,
        )
    # 5. Prune, and put the weights back.
    new, mask = prune_by(
        recipe,
        weights,
        evidence,
        prunable=prunable,
        layout=layout,
        model=model if recipe.restore is not None else None,
        blocks=blocks,
        batches=batches,
        loss=loss,
        accepted=True,
    )
    pruned = Pruned(
        holder.put_back(new),
        holder.like(mask),
        masks.summary(mask),
        recipe,
        why,
        _dense(weights, mask, layout),
        masks.zeros(weights, mask),
        masks.zeros(new, mask),
        _pruned_output(mask, layout),
    )
    if verbose:
        print(pruned)
    return pruned


def _check_concrete(weights: PyTree) -> None:
    """Raises InputError for weights that are traced or abstract."""
    if select.is_traced(weights):
        raise InputError(
            "swe_prune.prune counts and reports, which a traced program cannot; call it outside "
            "of jit, or use importance.score and masks.by_sparsity inside"
        )
    for name, leaf in tree.named_leaves(weights):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InputError(
                f"{tree.short(name)!r} is abstract, a shape without numbers; give the weights "
                "themselves"
            )


def _default_sparsity(
    sparsity: float | None, pattern: str | None, rate: float | None
) -> float | None:
    """Returns 0.5 where neither a sparsity nor what takes its place was asked for."""
    fixed = rate is not None or (pattern is not None and patterns.is_n_of_m(pattern))
    return 0.5 if sparsity is None and not fixed else sparsity


def _given(
    holder: tree.Held,
    stats: TrajectoryStats | Mapping[str, Any] | None,
    opt_state: Any,
    measured: Mapping[str, PyTree] | None,
    prunable: PyTree | None,
) -> tuple[Evidence, PyTree | None]:
    """Returns what was given besides the weights, as pytrees like the weights alone."""
    if stats is None and isinstance(holder.stats, TrajectoryStats):
        stats = holder.stats
    if stats is not None:
        stats = restored(stats)
        importance.check_snapshots(stats, stats.measures)
        buffers = {name: holder.lower(part) for name, part in stats.buffers.items()}
        stats = dataclasses.replace(stats, buffers=buffers)
    if opt_state is None:
        opt_state = holder.opt_state
    else:
        opt_state = tree.opt_state_of(opt_state)
        importance.check_state(opt_state, holder.weights)
    measured = {need: holder.lower(values) for need, values in (measured or {}).items()}
    prunable = None if prunable is None else holder.lower(prunable)
    return Evidence(stats, opt_state, measured), prunable


def _layout(params: Any, holder: tree.Held, layout: Any, model: Any, batch: Any) -> PyTree | None:
    """Returns the layout that is given or traced, like the weights alone, or None."""
    if layout is not None:
        return holder.lower(layout)
    if batch is None:
        if model is not None:
            raise InputError("model= is traced on a batch, which is missing; give batch=")
        return None
    whole = params if isinstance(params, Mapping) else holder.weights
    if model is None:
        if not isinstance(params, nnx.Module):
            raise InputError(
                "batch= is for tracing a model, which is missing; give model=, a function of "
                "(params, batch) or a module"
            )
        model = params
    return holder.lower(trace_layout(model, whole, batch))


def _pruned_output(mask: PyTree, layout: PyTree | None) -> str | None:
    """Returns the name of a pruned weight that alone gives the model's result, or None."""
    axes = {} if layout is None else dict(tree.named_leaves(layout))
    for name, kept in tree.named_leaves(mask):
        if kept is not None and getattr(axes.get(name), "last", False):
            return name
    return None


def _dense(params: PyTree, mask: PyTree, layout: PyTree | None) -> dict[str, int]:
    axes = {} if layout is None else dict(tree.named_leaves(layout))
    pruned = tree.present(mask)
    counts: dict[str, int] = {}
    for name, leaf in tree.named_leaves(params):
        if tree.is_weight(leaf) and name not in pruned:
            why = tree.dense_reason(name, leaf, axes=axes.get(name)) or "not chosen"
            counts[why] = counts.get(why, 0) + tree.size(leaf)
    return counts
