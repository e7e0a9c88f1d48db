"""Streaming statistics of every weight during training, in O(1) memory per measure.

A snapshot is one observation of the parameters. t = 1, 2, … counts snapshots, θ(t) is the weight at
snapshot t, and θ(0) is the weight given to `init`. The measures:

    late_mean      Σ wₜ θ(t) / Σ wₜ,  wₜ = t'^power, t' counted from the window's first snapshot, or
                   wₜ = t^power with index="absolute"
    late_mean_abs  Σ wₜ |θ(t)| / Σ wₜ
    mean           Σ θ(t) / n
    variance       Σ (θ(t) − mean)² / n
    mean_abs       Σ |θ(t)| / n
    votes          fraction of the snapshots with |θ(t)| > std(|θ(t)|) · vote_rate, per tensor
    path_length    Σ |θ(t) − θ(t−1)|
    displacement   θ(n) − θ(0)
    sign_flips     number of t with θ(t) θ(t−1) < 0
    last           θ(n)

`late_mean` is the "clone" of arXiv 2502.17071, in the streaming form of its equation; the default
power 0.5 is that of the authors' earlier public code (√t'), since we know no more than the paper's
abstract. A public review of the paper (themoonlight.io, March 2025, perhaps written by a machine)
prints Σ val(n − L) (n − L) / Σ (n − L) over L = 0 … k, with n the last epoch and val a "magnitude":
that is `power=1, index="absolute"`, of `late_mean_abs` or, as the abstract reads, of the signed
`late_mean`. The running mean and variance follow Welford (Technometrics 4(3), 1962) and their
merge Chan, Golub and LeVeque (Stanford STAN-CS-79-773, 1979).

Each buffer is one float32 per weight. Float32 drops increments below half a unit in the last place:
a mean of 100,000 snapshots of a drifting weight has an error of 1e-3, one of 200 snapshots less
than 1e-5 (both in tests/trajectory_test.py). For long runs, `compensated=True` stores the rounding
error of each mean and sum (TwoSum; Knuth, TAOCP 2, 4.2.2) in an additional bfloat16.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.bounds import COUNT, INDEX, NOT_NEGATIVE, Bound
from swe_prune.errors import InputError, check_choice, check_texts
from swe_prune.trajectory.mode_vote import mode_vote
from swe_prune.trajectory.recurrences import (
    CARRIED,
    CARRY,
    add_compensated,
    advance,
    joined,
)
from swe_prune.trajectory.restored import from_dict, restored
from swe_prune.trajectory.stats import (
    BUFFERS,
    INDICES,
    SETTINGS,
    TrajectoryStats,
    check_settings,
    encoded,
)

__all__ = [
    "BUFFERS",
    "TrajectoryStats",
    "check_measures",
    "check_settings",
    "encoded",
    "from_dict",
    "init",
    "memory",
    "merge",
    "mode_vote",
    "read",
    "restored",
    "update",
]

_HOLD_INITIAL = ("first", "last")  # start as the weights at init; the others start at zero


_POWER = Bound(-3.0, 3.0)  # others overflow the sum of t'^power


@checked
def init(
    params: PyTree,
    measures: str | Sequence[str] = ("late_mean",),
    prunable: PyTree | None = None,
    *,
    power: float = 0.5,
    window_start: int = 1,
    vote_rate: float = 1.0,
    index: str = "window",
    start: int | Int[Array, ""] = 0,
    compensated: bool = False,
) -> TrajectoryStats:
    """Returns empty statistics for the prunable weights, with the shardings of the weights.

    The given weights are θ(0) of `displacement`, `path_length` and `sign_flips`. They are not a
    snapshot and do not contribute to any mean.

    Args:
        params: Pytree of weights of any floating dtype; the statistics are float32.
        measures: Names of measures from the table in the module docstring.
        prunable: Bool pytree like `params`. If None, `tree.prunable(params)`.
        power: Exponent of the weights of the late means, −3 to 3; 0 gives the plain mean, 1 linear
            weights.
        window_start: First snapshot of the late means; E − K + 1 for the last K of E snapshots.
        vote_rate: Multiple of the standard deviation that a weight must exceed for a vote.
        index: What a snapshot's number counts from in its weight: "window", 1 at the window's first
            snapshot; "absolute", the number t among all snapshots, so that the weights of a late
            window are nearly equal.
        start: Number of earlier snapshots, if these statistics continue others (see `merge`).
        compensated: Whether to track rounding errors, for two more bytes per weight and mean or
            sum; worthwhile beyond some hundred snapshots.

    Raises:
        InputError: If a measure is unknown or none is given, no weight is prunable, the window
            starts before snapshot 1, or the power would overflow float32 sums.
    """
    # Check the settings before any buffer is allocated.
    measures = check_texts(measures, "measures")
    check_measures(measures)
    COUNT.check(window_start, "window_start")
    check_choice(index, INDICES, "index")
    _POWER.check(power, "power")
    NOT_NEGATIVE.check(vote_rate, "vote_rate")
    INDEX.check(start, "start")
    prunable = tree.check_marks(tree.prunable(params) if prunable is None else prunable, "track")

    def buffer(name: str) -> PyTree:
        def leaf(path: str, weight: Any, tracked: bool) -> Any:
            if not tracked:
                return None
            if not tree.is_weight(weight):
                raise InputError(
                    f"{path!r} is marked prunable but is not a floating-point array; mark it False"
                )
            if name.endswith(CARRY):
                return jnp.zeros_like(weight, jnp.bfloat16)
            # Copy even if the dtype is already float32, since the caller may donate params next.
            initial = jnp.array(weight, jnp.float32, copy=True)
            return initial if name in _HOLD_INITIAL else jnp.zeros_like(initial)

        return tree.map_named(leaf, params, prunable)

    needed = _needed(measures, compensated)
    # One pytree per buffer; measures that share a buffer share the memory.
    return TrajectoryStats(
        start=jnp.asarray(start, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        weight_sum=jnp.zeros(2, jnp.float32),
        buffers={name: buffer(name) for name in sorted(needed)},
        settings=jnp.asarray(encoded(power, window_start, vote_rate, index), jnp.float32),
        measures=measures,
        power=float(power),
        window_start=int(window_start),
        vote_rate=float(vote_rate),
        index=index,
    )


def _needed(measures: Sequence[str], compensated: bool) -> set[str]:
    needed = {name for measure in measures for name in BUFFERS[measure]}
    return needed | {name + CARRY for name in needed & set(CARRIED) if compensated}


def check_measures(measures: Sequence[str]) -> None:
    """Raises InputError if no measure is given or one is unknown."""
    if not measures:
        raise InputError(f"no measure was given; give some of {', '.join(BUFFERS)}")
    for measure in measures:
        check_choice(measure, BUFFERS, "measure")


@checked
def update(
    stats: TrajectoryStats | Mapping[str, Any],
    params: PyTree,
    *,
    when: bool | Bool[Array, ""] = True,
    layout: PyTree | None = None,
) -> TrajectoryStats:
    """Returns the statistics updated with one snapshot.

    All operations are elementwise, except the standard deviation of `votes`, so the update fuses,
    and buffers can be donated and sharded.

    Args:
        stats: Statistics from `init` or a previous update; or the dict that orbax restores without
            a target.
        params: Pytree of weights with the names and shapes given to `init`.
        when: Whether to take the snapshot, such as `step % 50 == 0`. Inside a jit that donates the
            statistics, a traced condition that is false costs nothing.
        layout: Pytree of `layout.Axes` like `params`: the threshold of `votes` is then one for
            each copy of a stacked tensor. Give the same in every update.

    Raises:
        InputError: If a weight has another shape than its statistics, the names differ, or the
            statistics were restored under other settings.
    """
    stats = restored(stats)
    if jnp.shape(when):
        raise InputError(
            f"when must be a single truth value, got an array of shape {jnp.shape(when)}; reduce "
            "it, as by .any()"
        )
    if isinstance(when, Tracer):
        # A fori_loop of 0 or 1 iterations, since XLA updates its carry in place; on either branch
        # of lax.cond it copies the statistics, in every step.
        turns = jnp.asarray(when).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, kept: _update(kept, params, layout), stats)
    return _update(stats, params, layout) if when else stats


def _update(stats: TrajectoryStats, params: PyTree, layout: PyTree | None) -> TrajectoryStats:
    count = stats.count + 1
    position = stats.start + count - stats.window_start + 1  # t' of this snapshot
    # Snapshots before the window get weight 0, so the late means stay 0 until it starts.
    inside = position >= 1
    number = position if stats.index == "window" else stats.start + count
    weight = jnp.where(inside, jnp.maximum(number, 1).astype(jnp.float32) ** stats.power, 0.0)
    weight_sum = add_compensated(stats.weight_sum, weight)
    late_share = jnp.where(inside, weight / jnp.where(inside, weight_sum[0], 1.0), 0.0)
    share = 1.0 / count.astype(jnp.float32)
    axes = {} if layout is None else dict(tree.named_leaves(layout))

    def leaf(name: str, _: Any, weight: Any, *old: Array) -> dict[str, Array]:
        before = dict(zip(stats.buffers, old, strict=True))
        _check_shapes(name, weight, old, "the weight")
        copies = getattr(axes.get(name), "copies", ())
        if not tree.is_weight(weight):
            raise InputError(
                f"the weight {tree.short(name)!r} must be a floating-point array, got "
                f"{weight.dtype}"
            )
        value = weight.astype(jnp.float32)
        return advance(before, value, late_share, share, stats.vote_rate, copies)

    buffers = _per_leaf(leaf, stats.buffers, params, *stats.buffers.values())
    return dataclasses.replace(stats, count=count, weight_sum=weight_sum, buffers=buffers)


@checked
def merge(a: TrajectoryStats, b: TrajectoryStats) -> TrajectoryStats:
    """Returns the statistics over the snapshots of `a` followed by those of `b`.

    The result equals that of one run over all the snapshots if `b` was created by
    `init(params at a's last snapshot, …, start=a.start + a.count)`, because the weights of the late
    means depend on t, and the path on its starting point. Means, variance and votes merge exactly
    for any start. The operation is associative.

    Args:
        a: Statistics of the earlier snapshots.
        b: Statistics of the later snapshots.

    Raises:
        InputError: If the two were created with different settings, or for weights of different
            names or shapes.
    """
    a, b = restored(a), restored(b)
    for field in ("measures", *SETTINGS):
        if getattr(a, field) != getattr(b, field):
            raise InputError(
                f"statistics with {field} = {getattr(a, field)!r} and {getattr(b, field)!r} cannot "
                "be merged; track both with the same settings"
            )
    if set(a.buffers) != set(b.buffers):
        raise InputError(
            "statistics with and without compensation cannot be merged; give both the same "
            "compensated= at trajectory.init"
        )
    # Weight of `b` in the plain means and in the late means of both.
    count = a.count + b.count
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1)
    total = a.weight_sum[0] + b.weight_sum[0]
    late_share = jnp.where(total > 0, b.weight_sum[0] / jnp.where(total > 0, total, 1.0), 0.0)
    between = share * a.count.astype(jnp.float32)

    def leaf(name: str, _: Any, *both: Array) -> dict[str, Array]:
        _check_shapes(name, both[0], both[1:], "the earlier statistics")
        x = dict(zip(a.buffers, both[: len(a.buffers)], strict=True))
        y = dict(zip(a.buffers, both[len(a.buffers) :], strict=True))
        return joined(x, y, late_share, share, between, b.count > 0)

    return dataclasses.replace(
        a,
        count=count,
        weight_sum=add_compensated(a.weight_sum, b.weight_sum[0] - b.weight_sum[1]),
        buffers=_per_leaf(
            leaf, a.buffers, *a.buffers.values(), *(b.buffers[name] for name in a.buffers)
        ),
    )


def _check_shapes(name: str, array: Any, others: Sequence[Any], what: str) -> None:
    """Refuses arrays of one tensor that differ in shape, since they would broadcast."""
    for other in others:
        if other is None or jnp.shape(other) != jnp.shape(array):
            found = "none" if other is None else f"of shape {jnp.shape(other)}"
            raise InputError(
                f"{what} of {tree.short(name)!r} has shape {jnp.shape(array)} and its statistics "
                f"are {found}; track and update the same parameters"
            )


def _per_leaf(f: Any, buffers: dict[str, PyTree], *trees: PyTree) -> dict[str, PyTree]:
    """Applies `f(name, leaf, *leaves of trees)` to each tracked tensor; returns the buffers."""
    first = next(iter(buffers.values()))
    new: dict[str, dict[str, Array]] = {}

    def leaf(name: str, *leaves: Any) -> Any:
        new[name] = f(name, *leaves)

    tree.map_named(leaf, first, *trees)
    return {
        name: tree.map_named(lambda path, _, name=name: new[path][name], buffer)
        for name, buffer in buffers.items()
    }


@checked
def read(stats: TrajectoryStats | Mapping[str, Any], measure: str) -> PyTree:
    """Returns one measure as a float32 pytree like the parameters, None where dense.

    Before the first snapshot every mean, fraction and count is 0.

    Args:
        stats: Statistics that track the measure; or the dict that orbax restores without a target.
        measure: Name of the measure.

    Raises:
        InputError: If the measure is unknown or was not tracked, or the statistics were restored
            under other settings.
    """
    check_choice(measure, BUFFERS, "measure")
    stats = restored(stats)
    if any(name not in stats.buffers for name in BUFFERS[measure]):
        raise InputError(
            f"measure {measure!r} was not tracked; include it in "
            f"trajectory.init(params, measures=({measure!r}, …)) before training"
        )
    count = jnp.maximum(stats.count, 1).astype(jnp.float32)
    buffers = stats.buffers
    # Some measures are computed from their buffers, the others are buffers.
    if measure == "variance":
        return tree.map_tracked(lambda m2: m2 / count, buffers["sum_of_squares"])
    if measure == "votes":
        return tree.map_tracked(lambda votes: votes / count, buffers["votes"])
    if measure == "displacement":
        return tree.map_tracked(jnp.subtract, buffers["last"], buffers["first"])
    return buffers[measure]


@checked
def memory(
    params: PyTree,
    measures: Sequence[str],
    prunable: PyTree | None = None,
    *,
    compensated: bool = False,
) -> dict[str, int]:
    """Returns the size in bytes of each buffer of the measures, by buffer name.

    The sum is the memory that tracking takes in addition to the model.

    Args:
        params: Pytree of weights, which may be abstract (`jax.eval_shape`).
        measures: Names of the measures.
        prunable: Bool pytree like `params`. If None, `tree.prunable(params)`.
        compensated: Whether rounding errors are tracked.
    """
    check_measures(measures)
    weights = tree.size(tree.prunable_leaves(params, prunable, "track"))
    needed = sorted(_needed(measures, compensated))
    return {name: weights * (2 if name.endswith(CARRY) else 4) for name in needed}
