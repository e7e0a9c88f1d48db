"""How something is pruned: one request, one validation, one way from scores to masks.

    Recipe     what is asked for: a criterion or a method, how much, where, in which shape
    Evidence   what the criterion may read besides the weights
    measure    calibration data to Evidence, once for any number of recipes
    prune      scores -> allocation -> masks, or one block of the model after the other

`swe_prune.prune`, `prune --model` and every cell of a study hold a `Recipe` and call `prune`. The
model, the parameters, the batches and the loss are arguments.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import (
    allocation,
    blockwise,
    calibration,
    importance,
    masks,
    patterns,
    trajectory,
    tree,
)
from swe_prune.allocation import Allocation
from swe_prune.blockwise import KernelReport
from swe_prune.blockwise.sparsegpt import BLOCK, check_sparsity
from swe_prune.calibration.measures import MEASURES
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.importance.registry import check_value
from swe_prune.layout import axes_of
from swe_prune.trajectory import TrajectoryStats

METHOD_OPTIONS: Mapping[str, Any] = {"block": BLOCK, "damping": 0.01}
"""Options of the block-by-block methods, with their defaults; see `blockwise.prune_blocks`."""

MAX_SPARSITY = 0.95
"""Largest share that a tensor loses in a global ranking that nobody asked for otherwise."""

Loss = Callable[[PyTree, PyTree], Any]
"""(params, batch) -> scalar."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pruning request.

    Attributes:
        criterion: Name of a registered criterion, by whose scores all tensors are pruned at once.
        options: Options of the criterion or of the method, by name.
        allocation: Name of the rule that distributes the sparsity over tensors. None: the scope
            does.
        sparsity: Share of the prunable weights to remove, in [0, 1). None with a rate, or with an
            n:m pattern, which fixes it.
        rate: Multiple of the standard deviation, for the rule of arXiv 2502.17071: per tensor,
            weights whose score does not exceed `rate` standard deviations are removed.
        scope: Where the sparsity is met: "tensor", "global" or "row"; see `masks.by_sparsity`.
        pattern: Shape of what is removed, such as "2:4" or "row"; see `masks.by_sparsity`. None:
            single weights.
        method: Name of a method of `blockwise.METHODS`, which prunes one block after the other and
            takes the place of a criterion.
        seed: Seed of random draws.
        zeros: What becomes of weights that are 0 already: "keep" counts them as removed first,
            "free" treats them like the others; see `importance.score`.
        restore: "admm": the weights that stay make up for those that go, block after block, for
            the mask that the criterion or the method chose; "local": each block is trained towards
            the dense model's activations; "admm+local": both; see `blockwise.prune_blocks`.
            "least_squares": the exact update for masks of whole inputs.
        max_sparsity: Largest share that any tensor loses, with scope "global" and allocations that
            rank all tensors together; None: of the scope everything, of an allocation its default.
    """

    criterion: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allocation: str | None = None
    sparsity: float | None = None
    rate: float | None = None
    scope: str = "tensor"
    pattern: str | None = None
    method: str | None = None
    seed: int = 0
    zeros: str = "keep"
    restore: str | None = None
    max_sparsity: float | None = None

    @property
    def name(self) -> str:
        """What ranks the weights, as tables show it.

        >>> Recipe("swe", sparsity=0.5).name, Recipe(method="wanda", sparsity=0.5).name
        ('swe', 'blockwise:wanda')
        """
        ranked = str(self.criterion) if self.method is None else f"blockwise:{self.method}"
        return ranked if self.restore is None else f"{ranked}+{self.restore}"

    @property
    def n_of_m(self) -> bool:
        """Whether the pattern is n:m, which fixes the sparsity."""
        return self.pattern is not None and patterns.is_n_of_m(self.pattern)

    @property
    def target(self) -> float | None:
        """Share to remove; None with a rate.

        >>> Recipe("magnitude", pattern="1:4").target
        0.75
        """
        if self.rate is not None:
            return None
        return check_sparsity(self.sparsity, self.pattern if self.n_of_m else None)[0]

    @property
    def option_text(self) -> str:
        """Options and the largest sparsity as `name=value`, sorted by name and joined by commas.

        >>> Recipe("forecast", {"horizon": 1.0}, sparsity=0.5).option_text
        'horizon=1'
        """
        given = dict(self.options)
        if self.max_sparsity is not None:
            given["max_sparsity"] = self.max_sparsity
        shown = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in given.items()}
        return ",".join(f"{name}={shown[name]}" for name in sorted(shown))

    @property
    def needs(self) -> frozenset[str]:
        """What the scores read besides the weights: trajectory measures and `MEASURED` names."""
        # An allocation by curvature takes the optimizer's where the criterion does.
        curved = {"gradient_square"} if self._allocates_by("curvature") else set()
        if self.method is not None:
            # OWL reads Wanda's scores of the dense model, for SparseGPT as well.
            return frozenset(curved | ({"input_norm"} if self._allocates_by("scores") else set()))
        criterion = importance.get(str(self.criterion))
        own = {*criterion.measures, *criterion.measured}
        return frozenset(own if "second_moment" in own else own | curved)

    @property
    def reads_batches(self) -> bool:
        """Whether calibration batches are needed."""
        by_allocation = self._allocates_by("batches")
        return self.updates_weights or by_allocation or bool(self.needs & MEASURES)

    @property
    def updates_weights(self) -> bool:
        """Whether the weights that stay may change too."""
        return self.method is not None or self.restore is not None

    @property
    def scores_follow_weights(self) -> bool:
        """Whether scores can be computed again from the weights alone, while they still train."""
        if self.method is not None:
            return False
        return not set(importance.get(str(self.criterion)).needs) - {"weight", "key", "inputs"}

    def _allocates_by(self, need: str) -> bool:
        return self.allocation is not None and need in allocation.get(self.allocation).needs


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a criterion may read besides the weights.

    Attributes:
        stats: Trajectory statistics of the training run.
        opt_state: State of the optimizer that trained the weights.
        measured: Pytrees like the parameters by need, as `calibration` returns them.
    """

    stats: TrajectoryStats | None = None
    opt_state: PyTree | None = None
    measured: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)


def check(
    recipe: Recipe,
    params: PyTree | None = None,
    prunable: PyTree | None = None,
    *,
    layout: PyTree | None = None,
    unavailable: Mapping[str, str] | None = None,
) -> None:
    """Refuses everything about a recipe that cannot work, before any work is done.

    Args:
        recipe: Request to check.
        params: Parameters, which may be abstract, to check the shapes against. None: only names
            and values are checked.
        prunable: Bool pytree like the parameters. None: `tree.prunable(params, layout=layout)`.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.
        unavailable: Sentence on what to do instead, by need that cannot be provided.

    Raises:
        InputError: The first fault, in one sentence that says how to fix it.
    """
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe must be a recipe.Recipe, got {shown(recipe)}; make one")
    _check_ranking(recipe)
    _check_amount(recipe)
    _check_options(recipe)
    for need, reason in (unavailable or {}).items():
        if need in recipe.needs:
            raise InputError(f"criterion {recipe.name!r} needs {need!r}, {reason}")
    if params is not None and recipe.rate is None:
        prunable = tree.prunable(params, layout=layout) if prunable is None else prunable
        _check_shapes(recipe, params, prunable, layout)


def _check_ranking(recipe: Recipe) -> None:
    """Checks what ranks the weights, and what a block-by-block method excludes."""
    if (recipe.criterion is None) == (recipe.method is None):
        given = "neither was given" if recipe.criterion is None else "both were given"
        raise InputError(
            "a recipe must have a criterion (at once, by its scores) or a method (block by "
            f"block), {given}; give one of them"
        )
    if recipe.method is None:
        _, blockwise_name, method = str(recipe.criterion).partition("blockwise:")
        if blockwise_name:
            raise InputError(
                f"unknown criterion {recipe.criterion!r}; give method={method!r} in its place"
            )
        importance.get(str(recipe.criterion))
        return
    check_choice(recipe.method, blockwise.METHODS, "method")
    if recipe.scope != "tensor":
        raise InputError(
            f"method {recipe.method!r} prunes kernel by kernel, so scope must be 'tensor', got "
            f"{recipe.scope!r}; leave the scope out"
        )
    if recipe.pattern is not None and not recipe.n_of_m:
        raise InputError(
            f"method {recipe.method!r} knows no pattern {recipe.pattern!r}; give 'n:m' or None"
        )


def _check_amount(recipe: Recipe) -> None:
    """Checks sparsity, rate, scope and allocation, and that they fit together."""
    check_choice(recipe.scope, masks.SCOPES, "scope")
    check_choice(recipe.zeros, importance.ZEROS, "zeros")
    check_choice(recipe.restore, blockwise.RESTORES, "restore")
    if recipe.allocation is not None:
        allocation.get(recipe.allocation).check_options(())
    if recipe.rate is not None:
        _check_number("rate", recipe.rate)
        if not 0 <= recipe.rate < math.inf:
            raise InputError(
                f"rate must be a finite multiple of a standard deviation, 0 or more, got "
                f"{recipe.rate!r}; give for example 1.4"
            )
        clashing = {
            "sparsity": recipe.sparsity,
            "allocation": recipe.allocation,
            "pattern": recipe.pattern,
            "method": recipe.method,
            "max_sparsity": recipe.max_sparsity,
            "scope": None if recipe.scope == "tensor" else recipe.scope,
        }
        for setting, value in clashing.items():
            if value is not None:
                raise InputError(
                    f"{setting} = {value!r} and rate = {recipe.rate!r} exclude each other, since "
                    "a rate sets a threshold per tensor; leave one of them out"
                )
        return
    if recipe.max_sparsity is not None:
        _check_max_sparsity(recipe)
    if recipe.sparsity is not None:
        _check_number("sparsity", recipe.sparsity)
        allocation.check_sparsity(recipe.sparsity)
    elif not recipe.n_of_m:
        raise InputError(
            "a recipe must say how much to remove, got neither sparsity nor rate; give a sparsity "
            "in [0, 1), a rate, or an n:m pattern"
        )
    if recipe.n_of_m:
        check_sparsity(recipe.sparsity, recipe.pattern)
        if recipe.allocation is not None:
            raise InputError(
                f"pattern {recipe.pattern!r} fixes the sparsity of every tensor, so allocation "
                f"must be None, got {recipe.allocation!r}; leave it out"
            )
    if recipe.allocation is not None and recipe.scope == "global":
        raise InputError(
            f"scope 'global' would overrule allocation {recipe.allocation!r}; give scope 'tensor' "
            "or 'row'"
        )


def _check_max_sparsity(recipe: Recipe) -> None:
    allocation.least_kept(0, recipe.max_sparsity)  # type: ignore[arg-type]
    known = allocation.get(recipe.allocation).options if recipe.allocation is not None else ()
    if recipe.scope != "global" and "max_sparsity" not in known:
        raise InputError(
            "max_sparsity is for scope 'global' and for allocations that rank all tensors together "
            f"(curvature, global), got scope {recipe.scope!r} and allocation "
            f"{recipe.allocation!r}; leave it out"
        )
    if recipe.target is not None and recipe.max_sparsity < recipe.target:  # type: ignore[operator]
        raise InputError(
            f"max_sparsity = {recipe.max_sparsity:g} is below the sparsity {recipe.target:g} that "
            "all tensors together must lose; raise it"
        )


def _check_options(recipe: Recipe) -> None:
    """Checks options by name and by value, on a trace of the criterion over tiny arrays."""
    if not isinstance(recipe.options, Mapping):
        raise InputError(f"options must be a mapping of names to values, got {recipe.options!r}")
    if recipe.method is not None:
        known = METHOD_OPTIONS
        for name in recipe.options:
            if name not in known:
                raise InputError(
                    f"method {recipe.method!r} has no option {name!r}; its options: "
                    + ", ".join(known)
                )
    else:
        criterion = importance.get(str(recipe.criterion))
        criterion.check_options(recipe.options)
        signature = inspect.signature(criterion.function).parameters
        known = {name: signature[name].default for name in criterion.options}
    for name, value in recipe.options.items():
        check_value(f"option {name} of {recipe.name!r}", value, known[name])
    if recipe.method is not None and recipe.options.get("block", 1) < 1:
        raise InputError(f"option block must be 1 or more inputs, got {recipe.options['block']!r}")
    if recipe.method is not None and recipe.options.get("damping", 0) < 0:
        raise InputError(f"option damping must be 0 or more, got {recipe.options['damping']!r}")
    if recipe.method is None and recipe.options:
        _trace(recipe)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise InputError(f"{name} must be a number, got {value!r}; give for example 0.5")


def _trace(recipe: Recipe) -> None:
    """Runs the criterion abstractly, which meets the checks that it makes of its options."""
    criterion = importance.get(str(recipe.criterion))
    given: dict[str, Any] = dict.fromkeys(criterion.needs, jnp.ones((4, 4)))
    static = {"inputs": (0,)} if "inputs" in given else {}
    if "key" in given:
        given["key"] = jax.random.key(0)
    arrays = {need: value for need, value in given.items() if need not in static}
    jax.eval_shape(lambda arrays: criterion.function(**arrays, **static, **recipe.options), arrays)


def _check_shapes(recipe: Recipe, params: PyTree, prunable: PyTree, layout: PyTree) -> None:
    """Traces the selection, which refuses what the shapes and the sparsity do not admit."""
    if not any(jax.tree.leaves(prunable)):
        raise InputError("no weight is prunable, so there is nothing to prune; widen the rules")
    scores = tree.map_named(
        lambda _, leaf, chosen: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if chosen else None,
        params,
        prunable,
    )
    jax.eval_shape(lambda scores: select(recipe, scores, recipe.target, layout), scores)
    if recipe.method == "sparsegpt" and recipe.n_of_m:
        block, (_, m) = (
            recipe.options.get("block", BLOCK),
            patterns.parse_n_of_m(str(recipe.pattern)),
        )
        axes = axes_of(layout)
        for name, leaf in tree.named_leaves(scores):
            if leaf is None or block % m == 0:
                continue
            inputs = math.prod(leaf.shape[axis] for axis in axes(name, leaf.shape).inputs)
            if block < inputs:
                raise InputError(
                    f"option block = {block} would cut groups of {m} inputs of {name!r}; give a "
                    f"multiple of {m}"
                )


def measure(
    recipes: Iterable[Recipe],
    model: Any,
    params: PyTree,
    batches: Sequence[PyTree],
    *,
    loss: Loss,
    prunable: PyTree | None = None,
    stats: TrajectoryStats | None = None,
    opt_state: PyTree | None = None,
    at_once: int | None = None,
) -> Evidence:
    """Returns everything that the recipes read, measured in as few passes as possible.

    Args:
        recipes: Requests that share the calibration.
        model: Linen module, NNX module or function of (params, batch), run on the batches where
            inputs are measured.
        params: Weights that are scored.
        batches: Calibration batches; not touched when no recipe reads them.
        loss: Function of (params, batch), for criteria that read gradients.
        prunable: Bool pytree like the parameters. None: `tree.prunable(params)`.
        stats: Trajectory statistics, passed on.
        opt_state: Optimizer state, passed on.
        at_once: Sequences per gradient; see `calibration.gradients`.

    Raises:
        InputError: Batches or parameters that cannot be measured, as in `calibration.inputs` and
            `calibration.gradients`.
    """
    measured = calibration.measure(
        frozenset().union(*(recipe.needs for recipe in recipes)) & MEASURES,
        model,
        params,
        batches,
        loss=loss,
        prunable=prunable,
        at_once=at_once,
    )
    return Evidence(stats, opt_state, measured)


def prune(
    recipe: Recipe,
    params: PyTree,
    evidence: Evidence | None = None,
    *,
    values: PyTree | None = None,
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    batches: Sequence[PyTree] = (),
    loss: Loss | None = None,
    offload: bool = False,
    progress: Callable[[KernelReport], None] | None = None,
) -> tuple[PyTree, PyTree]:
    """Returns the parameters with exact zeros, and the masks.

    Args:
        recipe: Request, as `check` accepts it.
        params: Weights to score.
        evidence: What the criterion reads besides the weights.
        values: Weights that the masks are applied to, or that a block-by-block method prunes and
            updates. None: `params`.
        prunable: Bool pytree like the parameters. None: the weights that the statistics track, or
            `tree.prunable(params, layout=layout)` without statistics.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.
        model: Linen module whose blocks a method prunes or `restore` updates.
        blocks: Rule that matches the paths of the blocks, for these.
        batches: Calibration batches, for a method and for allocations that read them.
        loss: Function of (params, batch), for allocations that read it.
        offload: Whether a method keeps weights and activations in host memory.
        progress: Function called with the report of each kernel that a method has pruned.

    Returns:
        Parameters of the same dtypes; bool masks like them, None where dense.

    Raises:
        InputError: Missing evidence, NaN scores, or shapes that do not fit.
        RunError: A Hessian that no damping makes positive definite.

    >>> weights = {"up": {"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]])}}
    >>> pruned, _ = prune(Recipe("magnitude", sparsity=0.5), weights)
    >>> pruned["up"]["kernel"].tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
    evidence = Evidence() if evidence is None else evidence
    values = params if values is None else values
    context: dict[str, Any] = {"params": values, "loss": loss, "batches": batches}
    context |= {"prunable": prunable, "curvature": None}
    if recipe._allocates_by("curvature"):
        context["curvature"] = _curvature(recipe, values, evidence, prunable, layout)
    if recipe.method is None:
        # All tensors at once, by their scores.
        scores = score(recipe, params, evidence, prunable, layout)
        amount = allocate(recipe, scores, layout=layout, **context | {"params": params})
        mask = select(recipe, scores, amount, layout)
        if recipe.restore is None:
            return masks.apply(values, mask), mask
        amount = None
    else:
        mask = None
    # One block after the other, each on what the pruned blocks before it give.
    if model is None or blocks is None:
        what = f"method {recipe.method!r}" if recipe.method else f"restore {recipe.restore!r}"
        raise InputError(f"{what} goes block by block; give model= and blocks=")
    scores = None
    if recipe.method is not None and recipe._allocates_by("scores"):
        scores = importance.score(
            "wanda",
            values,
            measured=evidence.measured,
            prunable=prunable,
            layout=layout,
            zeros=recipe.zeros,
        )
    if recipe.method is not None:
        amount = allocate(recipe, scores, **context)
    if offload:
        values = jax.tree.map(np.asarray, values)
    how: dict[str, Any] = {"mask": mask}
    if recipe.method is not None:
        how = {"sparsity": amount, "method": recipe.method, "pattern": recipe.pattern}
        how |= recipe.options
    pruned, found, _ = blockwise.prune_blocks(
        model,
        {"params": values},
        batches,
        blocks=blocks,
        restore=recipe.restore,
        prunable=prunable,
        offload=offload,
        progress=progress,
        zeros=recipe.zeros,
        **how,
    )
    mask = found if mask is None else mask  # which may have tensors outside of the blocks
    return masks.apply(pruned, mask), mask


def _curvature(
    recipe: Recipe,
    values: PyTree,
    evidence: Evidence,
    prunable: PyTree | None,
    layout: PyTree | None,
) -> PyTree:
    """Returns scores that say what a weight costs the loss, for the allocation by curvature."""
    name = "fisher" if "gradient_square" in recipe.needs else "magnitude_curvature"
    ranked = Recipe(name, {"power": 0.5}, sparsity=recipe.target, zeros=recipe.zeros)
    return score(ranked, values, evidence, prunable, layout)


def score(
    recipe: Recipe,
    params: PyTree,
    evidence: Evidence,
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the scores of the recipe's criterion: float32 like the parameters, None where dense.

    Compiled once per criterion, whatever the sparsity. Where a leaf of the parameters is not an
    array, such as a function in an Equinox module, the same computation runs eagerly.

    Args:
        recipe: Request with a criterion.
        params: Weights to score.
        evidence: What the criterion reads besides the weights.
        prunable: Bool pytree like the parameters. None: the weights that the statistics track, or
            `tree.prunable(params, layout=layout)` without statistics.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.

    Raises:
        InputError: Evidence that the criterion needs and that is missing or of another shape.
    """
    criterion = importance.get(str(recipe.criterion))
    # Only what the criterion reads becomes an argument of the compiled program.
    reads_moment = "second_moment" in criterion.needs
    opt_state = evidence.opt_state if reads_moment else None
    measured = {need: evidence.measured[need] for need in recipe.needs & set(evidence.measured)}
    # The compiled program cannot look at values, so what says nothing is refused before it.
    moments = measured.get("second_moment")
    if moments is None and opt_state is not None:
        moments = importance.second_moment(opt_state, params)
    if moments is not None and prunable is not None:
        moments = tree.map_leaves(lambda _, chosen, v: v if chosen else None, prunable, moments)
    stats = None if evidence.stats is None else trajectory.restored(evidence.stats)
    importance.check_informative(criterion, stats, moments)
    options = tuple(sorted(recipe.options.items()))
    chosen, structure = jax.tree.flatten(prunable)
    axes, axes_structure = jax.tree.flatten(layout, is_leaf=tree.is_none)
    make = _compile_score if _all_arrays(params, opt_state) else _score_fn
    static = (structure, tuple(chosen), axes_structure, tuple(axes), recipe.seed)
    scored = make(str(recipe.criterion), *static, recipe.zeros, options)
    return scored(params, stats, opt_state, measured)


def _all_arrays(*trees: PyTree) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(trees))


def _score_fn(
    criterion: str,
    structure: Any,
    chosen: tuple[bool, ...],
    axes_structure: Any,
    axes: tuple[Any, ...],
    seed: int,
    zeros: str,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., PyTree]:
    prunable, layout = structure.unflatten(chosen), axes_structure.unflatten(axes)

    def scored(params: PyTree, stats: Any, opt_state: PyTree, measured: Any) -> PyTree:
        return importance.score(
            criterion,
            params,
            stats=stats,
            opt_state=opt_state,
            measured=measured,
            prunable=prunable,
            layout=layout,
            seed=seed,
            zeros=zeros,
            **dict(options),
        )

    return scored


@functools.cache
def _compile_score(*request: Any) -> Callable[..., PyTree]:
    """Returns the compiled scores of a criterion; a sweep over sparsities compiles it once."""
    return jax.jit(_score_fn(*request))


def allocate(
    recipe: Recipe,
    scores: PyTree | None,
    *,
    params: PyTree,
    curvature: PyTree | None = None,
    loss: Loss | None = None,
    batches: Sequence[PyTree] = (),
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
) -> float | Allocation:
    """Returns the rate, the sparsity, or the sparsity distributed by the recipe's allocation.

    Args:
        recipe: Request.
        scores: Scores of the weights, for allocations that read them.
        params: Weights to be pruned.
        curvature: Scores of a criterion with curvature, for allocations that read them.
        loss: Function of (params, batch), for allocations that read it.
        batches: Calibration batches, for allocations that read them.
        prunable: Bool pytree like the parameters. None: the tensors that have scores.
        layout: Pytree of `layout.Axes` like the parameters. None: Flax's naming convention.

    Raises:
        InputError: Something that the allocation needs and that is missing.
    """
    if recipe.rate is not None:
        return recipe.rate
    target = recipe.target
    assert target is not None
    if recipe.allocation is None:
        return target
    options: dict[str, Any] = {}
    if recipe.max_sparsity is not None:
        options["max_sparsity"] = recipe.max_sparsity
    return allocation.allocate(
        recipe.allocation,
        target,
        **options,
        scores=scores,
        curvature=curvature,
        params=params,
        loss=loss,
        batches=batches,
        prunable=prunable,
        layout=layout,
    )


def select(recipe: Recipe, scores: PyTree, amount: Any, layout: PyTree | None = None) -> PyTree:
    """Returns the masks that the recipe makes of scores.

    Args:
        recipe: Request with a criterion.
        scores: Float32 pytree, None where dense.
        amount: Rate, sparsity or allocation, as `allocate` returns it.
        layout: Pytree of `layout.Axes` like the scores. None: Flax's naming convention.

    Raises:
        InputError: NaN scores, or an amount that the shapes do not admit.
    """
    if recipe.rate is not None:
        spread = importance.get(str(recipe.criterion)).spread
        return masks.by_std(scores, amount, spread=spread, layout=layout)
    return masks.by_sparsity(
        scores,
        amount,
        recipe.scope,
        pattern=recipe.pattern,
        max_sparsity=recipe.max_sparsity if recipe.scope == "global" else None,
        layout=layout,
    )


def measures(recipes: Iterable[Recipe]) -> tuple[str, ...]:
    """Returns the trajectory measures that the recipes read, each once, in their order.

    >>> measures([Recipe("swe", sparsity=0.5), Recipe("magnitude", sparsity=0.5)])
    ('late_mean',)
    """
    criteria = (importance.get(str(one.criterion)) for one in recipes if one.method is None)
    return tuple(dict.fromkeys(m for criterion in criteria for m in criterion.measures))


__all__ = [
    "MAX_SPARSITY",
    "Evidence",
    "Recipe",
    "allocate",
    "check",
    "measure",
    "measures",
    "prune",
    "score",
    "select",
]
