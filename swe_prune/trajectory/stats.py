"""The statistics themselves, and what they were tracked with."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from swe_prune.errors import InputError

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
"""Buffers that each measure needs; a buffer that two measures share is allocated once."""

SETTINGS = ("power", "window_start", "vote_rate", "index")
"""Settings of `trajectory.init` that the numbers depend on, in the order of their storage."""

INDICES = ("window", "absolute")
"""What a snapshot's number counts from in its weight; a setting stores the number of the name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryStats:
    """Statistics of the snapshots start + 1 … start + count.

    Attributes:
        start: Number of snapshots before the first of these, int32.
        count: Number of snapshots in these statistics, int32.
        weight_sum: Sum Σ wₜ as a float32 and its rounding error, shape (2,).
        buffers: Float32 pytrees like the parameters by buffer name, None where dense. If
            compensated, means and sums also have a bfloat16 buffer named "…_carry".
        measures: Names of the tracked measures.
        power: Exponent of t' in the weights of the late means.
        window_start: First snapshot of the late means, counted from 1.
        vote_rate: Multiple of the standard deviation that a weight must exceed for a vote.
        index: What a snapshot's number counts from in its weight, one of `INDICES`.
        settings: Power, window start, vote rate and the number of the index as float32, shape (4,).
            The four above are part of the structure, which a restored checkpoint takes from its
            target; these are stored, so that statistics restored under other settings are refused
            where they are used. Those of earlier versions have no index, which was "window".
    """

    start: Int[Array, ""]
    count: Int[Array, ""]
    weight_sum: Float[Array, "2"]
    buffers: dict[str, PyTree]
    settings: Float[Array, "4"]
    measures: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    power: float = dataclasses.field(metadata={"static": True})
    window_start: int = dataclasses.field(metadata={"static": True})
    vote_rate: float = dataclasses.field(metadata={"static": True})
    index: str = dataclasses.field(default="window", metadata={"static": True})


def check_settings(stats: TrajectoryStats) -> None:
    """Refuses statistics that were restored under other settings than they were tracked with.

    Traced or abstract statistics cannot be checked.

    Raises:
        InputError: A setting differs from the stored one.
    """
    if isinstance(stats.settings, Tracer | jax.ShapeDtypeStruct):
        return
    for name, stored in decoded(np.asarray(stats.settings)).items():
        ours = getattr(stats, name)
        if ours != stored and (isinstance(stored, str) or np.float32(ours) != stored):
            raise InputError(
                f"the statistics were tracked with {name} = {stored} and restored under {name} = "
                f"{ours}; restore them into trajectory.init(…, {name}={stored!r})"
            )


def encoded(power: float, window_start: int, vote_rate: float, index: str) -> list[float]:
    """Returns the settings as the numbers that are stored."""
    return [power, window_start, vote_rate, INDICES.index(index)]


def decoded(stored: Sequence[float] | np.ndarray) -> dict[str, float | str]:
    """Returns the settings of stored numbers by name; of three, the index is "window"."""
    power, window_start, vote_rate, *index = np.asarray(stored, np.float32)
    # The shortest decimal, which is what was given: 0.3 and not 0.30000001.
    numbers = [float(str(one)) for one in (power, window_start, vote_rate)]
    return dict(zip(SETTINGS, [*numbers, INDICES[int(index[0]) if index else 0]], strict=True))


def measures_of(buffers: Sequence[str]) -> tuple[str, ...]:
    """Returns the measures that buffers suffice for, in the order of `BUFFERS`."""
    return tuple(measure for measure, needed in BUFFERS.items() if set(needed) <= set(buffers))
