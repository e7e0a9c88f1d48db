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

Each buffer is one float32 per weight. A float32 forgets increments below half its last place: a
mean of 100,000 snapshots of a weight that drifts is wrong by 1e-3, one of 200 by less than 1e-5
(both in tests/trajectory_test.py). For runs that long, `compensated=True` lets each mean and sum
carry its rounding error (TwoSum; Knuth, TAOCP 2, 4.2.2) in a bfloat16 beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from swe_prune import tree
from swe_prune.errors import InputError, check_choice

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

_CARRIED = ("late_mean", "late_mean_abs", "mean", "sum_of_squares", "mean_abs", "path_length")
_CARRY = "_carry"  # what a buffer's rounding error is called, added to the buffer's name
_HOLD_INITIAL = ("first", "last")  # start as the weights at init; the others start at zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryStats:
    """Statistics of the snapshots start + 1 … start + count.

    Attributes:
        start: snapshots that came before the first of these, int32.
        count: snapshots seen, int32.
        weight_sum: Σ wₜ as a float32 and the rounding error it carries, shape (2,).
        buffers: per buffer a float32 pytree like the parameters, None where dense; of the means
            and sums also "…_carry" in bfloat16, when compensated.
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
    compensated: bool = False,
) -> TrajectoryStats:
    """Returns empty statistics for the prunable weights, laid out and sharded like them.

    The weights given here are θ(0) of `displacement`, `path_length` and `sign_flips`; they are not
    a snapshot and enter no mean.

    Args:
        params: pytree of weights of any floating dtype; statistics are float32.
        measures: names from the module's table.
        prunable: bool pytree like `params`; None: `tree.prunable(params)`.
        power: exponent of the weights of the late means, −3 to 3; 0 is the plain mean, 1 linear.
        window_start: the first snapshot that the late means count; E − K + 1 for the last K of E.
        vote_rate: for `votes`.
        start: snapshots taken before, when these statistics continue others (see `merge`).
        compensated: carry rounding errors along, for two more bytes a weight and mean or sum;
            worth it beyond some hundred snapshots.

    Raises:
        InputError: unknown or no measure, nothing to track, a window that starts before
            snapshot 1, or a power that float32 sums of it would overflow with.
    """
    measures = (measures,) if isinstance(measures, str) else tuple(measures)
    check_measures(measures)
    if window_start < 1:
        raise InputError(
            f"window_start = {window_start}, but snapshots count from 1; give 1 or more"
        )
    if not -3 <= power <= 3:
        raise InputError(
            f"power = {power!r} would overflow the sum of t'^power; give a number from -3 to 3"
        )
    prunable = tree.prunable(params) if prunable is None else prunable
    if not any(jax.tree.leaves(prunable)):
        raise InputError("no weight is prunable, so there is nothing to track; widen the rules")

    def buffer(name: str) -> PyTree:
        def leaf(path: str, weight: Any, tracked: bool) -> Any:
            if not tracked:
                return None
            if not tree.is_weight(weight):
                raise InputError(
                    f"{path!r} is marked prunable but is no floating-point array; mark it False"
                )
            if name.endswith(_CARRY):
                return jnp.zeros_like(weight, jnp.bfloat16)
            # A copy where the dtype is float32 already: the caller may donate params next.
            initial = jnp.array(weight, jnp.float32, copy=True)
            return initial if name in _HOLD_INITIAL else jnp.zeros_like(initial)

        return tree.map_named(leaf, params, prunable)

    needed = _needed(measures, compensated)
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


def _needed(measures: Sequence[str], compensated: bool) -> set[str]:
    needed = {name for measure in measures for name in BUFFERS[measure]}
    return needed | {name + _CARRY for name in needed & set(_CARRIED) if compensated}


def check_measures(measures: Sequence[str]) -> None:
    """Raises InputError for no measure or an unknown one."""
    if not measures:
        raise InputError(f"no measure was asked for; give some of {', '.join(BUFFERS)}")
    for measure in measures:
        check_choice(measure, BUFFERS, "measure")


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

    def leaf(_: Any, weight: Any, *old: Array) -> dict[str, Array]:
        before = dict(zip(stats.buffers, old, strict=True))
        return _advance(before, weight.astype(jnp.float32), late_share, share, stats.vote_rate)

    buffers = _per_leaf(leaf, stats.buffers, params, *stats.buffers.values())
    return dataclasses.replace(stats, count=count, weight_sum=weight_sum, buffers=buffers)


def _advance(
    old: dict[str, Array], weight: Array, late_share: Array, share: Array, vote_rate: float
) -> dict[str, Array]:
    """Returns the buffers of one weight after a snapshot; only those that exist are computed."""
    size = jnp.abs(weight)
    new = dict(old)

    def beyond(buffers: dict[str, Array], name: str, value: Array) -> Array:
        return (value - buffers[name]) - buffers.get(name + _CARRY, 0.0)

    def add(name: str, increment: Array) -> None:
        carry = old.get(name + _CARRY)
        if carry is None:
            new[name] = old[name] + increment
        else:
            new[name], error = _two_sum(old[name], increment + carry.astype(jnp.float32))
            new[name + _CARRY] = error.astype(carry.dtype)

    for name, value, step in (
        ("late_mean", weight, late_share),
        ("late_mean_abs", size, late_share),
        ("mean", weight, share),
        ("mean_abs", size, share),
    ):
        if name in old:
            add(name, step * beyond(old, name, value))
    if "sum_of_squares" in old:
        add("sum_of_squares", beyond(old, "mean", weight) * beyond(new, "mean", weight))
    if "path_length" in old:
        add("path_length", jnp.abs(weight - old["last"]))
    if "votes" in old:
        new["votes"] += size > jnp.std(size, ddof=min(1, size.size - 1)) * vote_rate
    if "sign_flips" in old:
        new["sign_flips"] += jnp.sign(weight) * jnp.sign(old["last"]) < 0
    if "last" in old:
        new["last"] = weight
    return new


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns the rounded sum and its rounding error, whichever of the two is the larger."""
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)


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
    if set(a.buffers) != set(b.buffers):
        raise InputError(
            "statistics with and without compensation cannot be merged; give both the same "
            "compensated= at trajectory.init"
        )
    count = a.count + b.count
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1)
    total = a.weight_sum[0] + b.weight_sum[0]
    late_share = jnp.where(total > 0, b.weight_sum[0] / jnp.where(total > 0, total, 1.0), 0.0)
    between = share * a.count.astype(jnp.float32)

    def leaf(_: Any, *both: Array) -> dict[str, Array]:
        x = dict(zip(a.buffers, both[: len(a.buffers)], strict=True))
        y = dict(zip(a.buffers, both[len(a.buffers) :], strict=True))
        return _joined(x, y, late_share, share, between, b.count > 0)

    return dataclasses.replace(
        a,
        count=count,
        weight_sum=_add_compensated(a.weight_sum, b.weight_sum[0] - b.weight_sum[1]),
        buffers=_per_leaf(
            leaf, a.buffers, *a.buffers.values(), *(b.buffers[name] for name in a.buffers)
        ),
    )


def _joined(
    x: dict[str, Array],
    y: dict[str, Array],
    late_share: Array,
    share: Array,
    between: Array,
    y_has_any: Array,
) -> dict[str, Array]:
    """Returns the buffers of one weight over the snapshots of x and then y."""

    def carry_of(part: dict[str, Array], name: str) -> Array:
        return part.get(name + _CARRY, jnp.zeros_like(part[name])).astype(jnp.float32)

    new = {}
    for name in x:
        if name == "first":
            new[name] = x[name]
        elif name == "last":
            new[name] = jnp.where(y_has_any, y[name], x[name])
        elif name in ("votes", "sign_flips"):
            new[name] = x[name] + y[name]
        elif name in _CARRIED:
            x_carry, y_carry = carry_of(x, name), carry_of(y, name)
            if name in ("path_length", "sum_of_squares"):
                increment, carry = y[name], x_carry + y_carry
            else:
                step = late_share if name.startswith("late") else share
                increment = step * (y[name] - x[name])
                carry = x_carry + step * (y_carry - x_carry)
            if name == "sum_of_squares":
                apart = (y["mean"] - x["mean"]) + (carry_of(y, "mean") - carry_of(x, "mean"))
                carry = carry + between * apart**2
            partial, error = _two_sum(x[name], increment)
            new[name], rest = _two_sum(partial, carry + error)
            if name + _CARRY in x:
                new[name + _CARRY] = rest.astype(jnp.bfloat16)
    return {name: new[name] for name in x}


def _per_leaf(f: Any, buffers: dict[str, PyTree], *trees: PyTree) -> dict[str, PyTree]:
    """Returns the buffers that `f(leaf, *leaves of trees)` gives for each tracked weight."""
    first = next(iter(buffers.values()))
    new = tree.map_tracked(f, first, *trees)
    return {
        name: tree.map_tracked(lambda _, of_leaf, name=name: of_leaf[name], first, new)
        for name in buffers
    }


def read(stats: TrajectoryStats, measure: str) -> PyTree:
    """Returns one measure as a float32 pytree like the parameters, None where dense.

    Before the first snapshot every mean, share and count reads 0.

    Raises:
        InputError: unknown measure, or one that was not tracked.
    """
    check_choice(measure, BUFFERS, "measure")
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
    params: PyTree,
    measures: Sequence[str],
    prunable: PyTree | None = None,
    *,
    compensated: bool = False,
) -> dict[str, int]:
    """Returns the bytes that each buffer of the measures takes, per buffer name.

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
    needed = sorted(_needed(measures, compensated))
    return {name: weights * (2 if name.endswith(_CARRY) else 4) for name in needed}
