"""Pruning at the due steps of a schedule, inside the user's own train step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import importance, masks, schedules, select, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.layout import copies_of
from swe_prune.masks.fitting import check_fits

_NOT_MONOTONE = {"reduce": ("l2", "abs_sum"), "across": ("prod",)}


@checked
def all_kept(params: PyTree, prunable: PyTree | None = None) -> PyTree:
    """Returns the masks that training starts with: True everywhere, None where dense.

    Args:
        params: Pytree of weights.
        prunable: Bool pytree; None: `tree.prunable(params)`.

    >>> all_kept({"up": {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}})
    {'up': {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}}
    """
    return tree.map_prunable(lambda _, weight: jnp.ones_like(weight, dtype=bool), params, prunable)


@checked
def prune_on_schedule(
    schedule: schedules.Schedule,
    score: str | Callable[..., PyTree],
    *,
    scope: str = "tensor",
    regrow: bool = False,
    allocate: Callable[..., Any] | None = None,
    **options: Any,
) -> Callable[..., PyTree]:
    """Returns `update(step, mask, params, …)`, which gives new masks at due steps, else the same.

    At a due step the weights are scored and the lowest go until the schedule's share is gone,
    exactly: `allocation.removed_count(size, schedule.sparsity(step))` of each tensor, or of all
    together. What a due step costs is skipped at the others. With a traced step there is one
    program for the whole schedule; with a Python integer the same masks are made eagerly, checked.

        prune = sparse_training.prune_on_schedule(schedules.Cubic(0.9, 0, 1000, 100), "magnitude")

        @jax.jit
        def train_step(step, params, opt_state, mask, batch):
            mask = prune(step, mask, params)
            params = masks.apply(params, mask)
            ...                                # masks.keep(optimizer, mask).update(…)

    The schedule's share reaches a traced selection as a float32: the one nearest to it that gives
    the same counts. Where there is none, with 2^24 weights and more to rank at once, it is the
    nearest, whose counts differ by less than 1e-7 of the weights.

    Args:
        schedule: Schedule of `swe_prune.schedules`, or an object with the same methods.
        score: Name of a criterion, scored by `importance.score` on the tensors that have a mask; or
            a function of what follows the mask in a call, to scores with None where dense.
        scope: Scope of `masks.by_sparsity`.
        regrow: False: a pruned weight stays pruned, whatever its score; True: it may return, as
            long as its value is kept somewhere, as straight-through training does.
        allocate: Function of (scores, sparsity, *args of the call) to an `allocation.Allocation`,
            which may give a tensor more weights than before. None: the scope distributes the
            sparsity. Needs a Python step.
        **options: Options of `masks.by_sparsity`, such as `pattern` and `layout`.

    Raises:
        InputError: An unknown criterion, or a reduction of scores under which pruned units cannot
            be told from others. In a call: as `importance.score` and `masks.by_sparsity`.
    """
    if isinstance(score, str):
        importance.get(score)
    for option, names in _NOT_MONOTONE.items():
        if not regrow and options.get(option) in names:
            raise InputError(
                f"{option} = {options[option]!r} makes the scores of pruned weights positive, so "
                "they would come back; give another or regrow=True"
            )
    levels = _levels(schedule)

    def scored(mask: PyTree, args: tuple[Any, ...], named: dict[str, Any]) -> PyTree:
        if not isinstance(score, str):
            return score(*args, **named)
        if not args:
            raise InputError(
                f"criterion {score!r} has no weights to score; give the parameters after the mask"
            )
        prunable = tree.map_leaves(lambda _, weight, keep: keep is not None, args[0], mask)
        # Which zeros stay is the mask's to say, and one that regrows may bring them back.
        return importance.score(score, *args, prunable=prunable, **{"zeros": "free", **named})

    def renewed(mask: PyTree, share: Any, args: tuple[Any, ...], named: dict[str, Any]) -> PyTree:
        scores = tree.map_leaves(_fitting, mask, scored(mask, args, named))
        if regrow:
            return masks.by_sparsity(scores, share(scores), scope, **options)
        amount = share(scores)
        if allocate is not None:
            amount = allocate(scores, amount, *args)
        scores = tree.map_named(lambda name, keep, s: select.restrict(s, keep, name), mask, scores)
        if allocate is not None:
            scores = tree.map_tracked(_may_return, scores)
        made = masks.by_sparsity(scores, amount, scope, **options)

        def leaf(name: str, keep: Any, new: Any) -> Any:
            if new is None:  # a tensor that the pattern leaves as it is
                return keep
            return new if allocate is not None else keep & new

        return tree.map_leaves(leaf, mask, made)

    def update(step: schedules.Step, mask: PyTree, *args: Any, **named: Any) -> PyTree:
        if not isinstance(step, Tracer):
            step = int(step)
            if not schedule.is_due(step):
                return mask
            return renewed(mask, lambda _: schedule.sparsity(step), args, named)

        def share(scores: PyTree) -> Float[Array, ""]:
            sizes = _ranked_together(scores, scope, options)
            table = _as_float32(levels[1], sizes, options.get("rounding", "nearest"))
            last = jnp.searchsorted(jnp.asarray(levels[0]), step, side="right") - 1
            return jnp.asarray(table)[jnp.maximum(last, 0)]

        return jax.lax.cond(
            schedule.is_due(step),
            lambda mask, args, named: renewed(mask, share, args, named),
            lambda mask, args, named: mask,
            mask,
            args,
            named,
        )

    return update


def _may_return(score: Array) -> Array:
    """Returns scores in which what was pruned still ranks last, but is not lost: not −inf."""
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(score == -jnp.inf, lowest, jnp.maximum(score, jnp.nextafter(lowest, 0.0)))


def _fitting(name: str, keep: Any, score: Any) -> Any:
    if keep is None:
        return None
    check_fits(name, keep, score, "score")
    return score


def _levels(schedule: schedules.Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which the sparsity changes, int32, and what it is from there on."""
    endless = isinstance(schedule, schedules.Constant)
    steps = (schedule.begin,) if endless else schedule.due_steps()
    if not steps:
        raise InputError("the schedule is never due; give it at least one step")
    return np.asarray(steps, np.int32), np.asarray([schedule.sparsity(t) for t in steps])


def _ranked_together(scores: PyTree, scope: str, options: dict[str, Any]) -> Sequence[int]:
    """Returns the group sizes that the sparsity applies to; none for units and rows."""
    if scope == "row" or options.get("pattern") is not None:
        return ()
    if scope == "global":
        return [tree.size(scores)]
    copies = copies_of(options.get("layout"))
    return [
        math.prod(n for axis, n in enumerate(leaf.shape) if axis not in copies(name, leaf.shape))
        for name, leaf in tree.named_leaves(scores)
        if leaf is not None
    ]


def _as_float32(shares: np.ndarray, sizes: Sequence[int], rounding: str) -> np.ndarray:
    """Returns float32 shares of the same counts: the nearest, or a neighbour of it."""
    half = 0.0 if rounding == "down" else 0.5

    def differs(candidate: np.ndarray) -> np.ndarray:
        pairs = [(np.floor(n * s + half) for s in (candidate.astype(float), shares)) for n in sizes]
        return np.any([a != b for a, b in pairs], axis=0) if pairs else np.zeros(len(shares), bool)

    nearest = shares.astype(np.float32)
    best = nearest
    for towards in (np.float32(1), np.float32(0)):
        neighbour = np.nextafter(nearest, towards)
        best = np.where(differs(best) & ~differs(neighbour), neighbour, best)
    return best
