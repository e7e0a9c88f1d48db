"""What every weight did while it trained, in O(1) memory per measure.

A snapshot is one look at the parameters; t = 1, 2, … counts snapshots, θ(t) is the weight at
snapshot t and θ(0) the weight that `init` saw. The measures:

    late_mean      Σ wₜ θ(t) / Σ wₜ,  wₜ = t'^power, t' counted from the window's first snapshot
    late_mean_abs  the same of |θ(t)|
    mean           Σ θ(t) / n
    variance       Σ (θ(t) − mean)² / n
    mean_abs       Σ |θ(t)| / n
    votes          share of the snapshots in which |θ(t)| > std(|θ(t)|) · vote_rate, per tensor
    path_length    Σ |θ(t) − θ(t−1)|
    displacement   θ(n) − θ(0)
    sign_flips     how many t have θ(t) θ(t−1) < 0
    last           θ(n)

`late_mean` is the "clone" of arXiv 2502.17071, in the streaming form of its equation; the default
power 0.5 is that of the authors' earlier public code (√t), since the paper's own exponent is not
known. The running mean and variance follow Welford (Technometrics 4(3), 1962) and their merge
Chan, Golub and LeVeque (Stanford STAN-CS-79-773, 1979).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from swe_prune import tree
from swe_prune.errors import InputError, did_you_mean

BUFFERS: Mapping[str, tuple[str, ...]] = {
    "late_mean": ("late_mean",),
    "late_mean_abs": ("late_mean_abs",),
    "mean": ("mean",),
    "variance": ("mean", "sum_of_squares"),
    "mean_abs": ("mean_abs",),
    "votes": ("votes",),
    "path_length": ("path_length", "last"),
    "displacement": ("first", "last"),
    "sign_flips": ("sign_flips", "last"),
    "last": ("last",),
}
"""The buffers each measure needs; a buffer that two measures share is allocated once."""

_HOLD_INITIAL = ("first", "last")  # start as the weights at init; the others start at zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryStats:
    """Statistics of the snapshots start + 1 … start + count.

    Attributes:
        start: snapshots that came before the first of these, int32.
        count: snapshots seen, int32.
        weight_sum: Σ wₜ as a float32 and the rounding error it carries, shape (2,).
        buffers: per buffer a float32 pytree like the parameters, None where dense.
        measures: what was asked for.
        power: exponent of t' in the weights of the late means.
        window_start: the snapshot that the late means begin with, counted from 1.
        vote_rate: multiple of the standard deviation that a weight must exceed for a vote.
    """

    start: Int[Array, ""]
    count: Int[Array, ""]
    weight_sum: Float[Array, "2"]
    buffers: dict[str, PyTree]
    measures: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    power: float = dataclasses.field(metadata={"static": True})
    window_start: int = dataclasses.field(metadata={"static": True})
    vote_rate: float = dataclasses.field(metadata={"static": True})


def init(
    params: PyTree,
    measures: Sequence[str] = ("late_mean",),
    prunable: PyTree | None = None,
    *,
    power: float = 0.5,
    window_start: int = 1,
    vote_rate: float = 1.0,
    start: int | Int[Array, ""] = 0,
) -> TrajectoryStats:
    """Returns empty statistics for the prunable weights, laid out and sharded like them.

    The weights given here are θ(0) of `displacement`, `path_length` and `sign_flips`; they are not
    a snapshot and enter no mean.

    Args:
        params: pytree of weights of any floating dtype; statistics are float32.
        measures: names from the module's table.
        prunable: bool pytree like `params`; None: `tree.prunable(params)`.
        power: exponent of the weights of the late means; 0 is the plain mean, 1 linear.
        window_start: the first snapshot that the late means count; E − K + 1 for the last K of E.
        vote_rate: for `votes`.
        start: snapshots taken before, when these statistics continue others (see `merge`).

    Raises:
        InputError: unknown or no measure, or a window that starts before snapshot 1.
    """
    measures = (measures,) if isinstance(measures, str) else tuple(measures)
    check_measures(measures)
    if window_start < 1:
        raise InputError(
            f"window_start = {window_start}, but snapshots count from 1; give 1 or more"
        )
    prunable = tree.prunable(params) if prunable is None else prunable

    def buffer(name: str) -> PyTree:
        def leaf(_: str, weight: Any, tracked: bool) -> Any:
            if not tracked:
                return None
            # A copy where the dtype is float32 already: the caller may donate params next.
            initial = jnp.array(weight, jnp.float32, copy=True)
            return initial if name in _HOLD_INITIAL else jnp.zeros_like(initial)

        return tree.map_named(leaf, params, prunable)

    needed = {name for measure in measures for name in BUFFERS[measure]}
    return TrajectoryStats(
        start=jnp.asarray(start, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        weight_sum=jnp.zeros(2, jnp.float32),
        buffers={name: buffer(name) for name in sorted(needed)},
        measures=measures,
        power=float(power),
        window_start=int(window_start),
        vote_rate=float(vote_rate),
    )


def check_measures(measures: Sequence[str]) -> None:
    """Raises InputError for no measure or an unknown one."""
    if not measures:
        raise InputError(f"no measure was asked for; give some of {', '.join(BUFFERS)}")
    for measure in measures:
        if measure not in BUFFERS:
            raise InputError(f"unknown measure {measure!r}; {did_you_mean(measure, BUFFERS)}")


def update(stats: TrajectoryStats, params: PyTree) -> TrajectoryStats:
    """Returns the statistics with one more snapshot; elementwise, so it fuses, donates and shards.

    Args:
        stats: from `init` or an earlier update.
        params: pytree of the structure given to `init`.
    """
    count = stats.count + 1
    position = stats.start + count - stats.window_start + 1  # t' of this snapshot in the window
    inside = position >= 1
    weight = jnp.where(inside, jnp.maximum(position, 1).astype(jnp.float32) ** stats.power, 0.0)
    weight_sum = _add_compensated(stats.weight_sum, weight)
    late_share = jnp.where(inside, weight / jnp.where(inside, weight_sum[0], 1.0), 0.0)
    share = 1.0 / count.astype(jnp.float32)

    def leaf(weight: Any, *old: Array) -> dict[str, Array]:
        before = dict(zip(stats.buffers, old, strict=True))
        return _advance(before, weight.astype(jnp.float32), late_share, share, stats.vote_rate)

    first = next(iter(stats.buffers.values()))
    updated = tree.map_tracked(
        lambda _, weight, *old: leaf(weight, *old), first, params, *stats.buffers.values()
    )
    buffers = {
        name: tree.map_tracked(lambda _, new, name=name: new[name], first, updated)
        for name in stats.buffers
    }
    return dataclasses.replace(stats, count=count, weight_sum=weight_sum, buffers=buffers)


def _advance(
    old: dict[str, Array], weight: Array, late_share: Array, share: Array, vote_rate: float
) -> dict[str, Array]:
    """Returns the buffers of one weight after a snapshot; only those that exist are computed."""
    size = jnp.abs(weight)

    def towards(buffer: Array, value: Array, step: Array) -> Array:
        return buffer + step * (value - buffer)

    rules = {
        "late_mean": lambda b: towards(b, weight, late_share),
        "late_mean_abs": lambda b: towards(b, size, late_share),
        "mean": lambda b: towards(b, weight, share),
        "sum_of_squares": lambda b: (
            b + (weight - old["mean"]) * (weight - towards(old["mean"], weight, share))
        ),
        "mean_abs": lambda b: towards(b, size, share),
        "votes": lambda b: b + (size > jnp.std(size, ddof=min(1, size.size - 1)) * vote_rate),
        "path_length": lambda b: b + jnp.abs(weight - old["last"]),
        "sign_flips": lambda b: b + (weight * old["last"] < 0),
        "first": lambda b: b,
        "last": lambda b: weight,
    }
    return {name: rules[name](buffer) for name, buffer in old.items()}


def _add_compensated(total: Float[Array, "2"], value: Float[Array, ""]) -> Float[Array, "2"]:
    """Returns the sum with its rounding error carried along (Kahan); t^p sums over long runs."""
    corrected = value - total[1]
    new = total[0] + corrected
    return jnp.stack([new, (new - total[0]) - corrected])


def merge(a: TrajectoryStats, b: TrajectoryStats) -> TrajectoryStats:
    """Returns the statistics of both: `b` continues where `a` ended.

    The result equals that of one run over all the snapshots when `b` was made by
    `init(params at a's last snapshot, …, start=a.start + a.count)`: the weights of the late means
    depend on t, and the path on where it continues. Means, variance and votes merge exactly
    whatever the start. The operation is associative.

    Raises:
        InputError: the two were made with different settings.
    """
    for field in ("measures", "power", "window_start", "vote_rate"):
        if getattr(a, field) != getattr(b, field):
            raise InputError(
                f"statistics with {field} = {getattr(a, field)!r} and {getattr(b, field)!r} cannot "
                "be merged; track both with the same settings"
            )
    count = a.count + b.count
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1)
    total = a.weight_sum[0] + b.weight_sum[0]
    late_share = jnp.where(total > 0, b.weight_sum[0] / jnp.where(total > 0, total, 1.0), 0.0)
    carried = _add_compensated(a.weight_sum, b.weight_sum[0] - b.weight_sum[1])

    def towards(step: Array):
        return lambda x, y: x + step * (y - x)

    rules: dict[str, Any] = {
        "late_mean": towards(late_share),
        "late_mean_abs": towards(late_share),
        "mean": towards(share),
        "mean_abs": towards(share),
        "first": lambda x, y: x,
        "last": lambda x, y: jnp.where(b.count > 0, y, x),
    }
    buffers = {
        name: tree.map_tracked(rules.get(name, jnp.add), a.buffers[name], b.buffers[name])
        for name in a.buffers
    }
    if "sum_of_squares" in buffers:
        between = share * a.count.astype(jnp.float32)
        buffers["sum_of_squares"] = tree.map_tracked(
            lambda total, x, y: total + between * (y - x) ** 2,
            buffers["sum_of_squares"],
            a.buffers["mean"],
            b.buffers["mean"],
        )
    return dataclasses.replace(a, count=count, weight_sum=carried, buffers=buffers)


def read(stats: TrajectoryStats, measure: str) -> PyTree:
    """Returns one measure as a float32 pytree like the parameters, None where dense.

    Before the first snapshot every mean, share and count reads 0.

    Raises:
        InputError: unknown measure, or one that was not tracked.
    """
    if measure not in BUFFERS:
        raise InputError(f"unknown measure {measure!r}; {did_you_mean(measure, BUFFERS)}")
    if any(name not in stats.buffers for name in BUFFERS[measure]):
        raise InputError(
            f"measure {measure!r} was not tracked; name it in "
            f"trajectory.init(params, measures=({measure!r}, …)) before training"
        )
    count = jnp.maximum(stats.count, 1).astype(jnp.float32)
    buffers = stats.buffers
    if measure == "variance":
        return tree.map_tracked(lambda m2: m2 / count, buffers["sum_of_squares"])
    if measure == "votes":
        return tree.map_tracked(lambda votes: votes / count, buffers["votes"])
    if measure == "displacement":
        return tree.map_tracked(jnp.subtract, buffers["last"], buffers["first"])
    return buffers[measure]


def memory(
    params: PyTree, measures: Sequence[str], prunable: PyTree | None = None
) -> dict[str, int]:
    """Returns the bytes that each buffer of the measures takes, float32, per buffer name.

    `params` may be abstract (`jax.eval_shape`). The sum is what tracking costs beside the model.
    """
    check_measures(measures)
    prunable = tree.prunable(params) if prunable is None else prunable
    weights = sum(
        tree.size(leaf)
        for (_, leaf), (_, tracked) in zip(
            tree.named_leaves(params), tree.named_leaves(prunable), strict=True
        )
        if tracked
    )
    return {name: 4 * weights for measure in measures for name in BUFFERS[measure]}
