"""Statistics that come back from a file: by flax.serialization, or as the dict of a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from swe_prune.errors import InputError
from swe_prune.trajectory.stats import TrajectoryStats, check_settings, decoded, measures_of

_FIELDS = ("start", "count", "weight_sum", "buffers", "settings")


def restored(stats: TrajectoryStats | Mapping[str, Any]) -> TrajectoryStats:
    """Returns statistics to go on with, of statistics or of a dict that holds them.

    Args:
        stats: Statistics; or what orbax and flax.serialization restore without a target, a dict of
            their fields.

    Raises:
        InputError: They were restored under other settings, or the dict holds no statistics.
    """
    if isinstance(stats, Mapping):
        return from_dict(stats)
    if not isinstance(stats, TrajectoryStats):
        raise InputError(
            "statistics must come from trajectory.init, or be the dict that a checkpoint of them "
            f"restores to, got {type(stats).__name__}"
        )
    check_settings(stats)
    return stats


def from_dict(fields: Mapping[str, Any]) -> TrajectoryStats:
    """Returns the statistics of a dict of their fields, with the settings that are stored in it.

    The weights are then in dicts, which go together with any containers of the same names.

    Args:
        fields: What a checkpoint of statistics restores to without a target.

    Raises:
        InputError: A field is missing, or the buffers are of no measure.
    """
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise InputError(
            f"a dict of statistics must have {', '.join(_FIELDS)}, but has no {missing[0]!r}; "
            "restore it into trajectory.init(…) of the same settings"
        )
    buffers = {name: _tidy(part) for name, part in fields["buffers"].items()}
    measures = measures_of(list(buffers))
    settings: dict[str, Any] = decoded(np.asarray(fields["settings"], np.float32))
    if not measures:
        raise InputError(
            f"the buffers {', '.join(map(repr, buffers))} are of no measure; give the whole dict "
            "that was restored"
        )
    return TrajectoryStats(
        start=jnp.asarray(fields["start"], jnp.int32),
        count=jnp.asarray(fields["count"], jnp.int32),
        weight_sum=jnp.asarray(fields["weight_sum"], jnp.float32),
        buffers=buffers,
        settings=jnp.asarray(fields["settings"], jnp.float32),
        measures=measures,
        power=settings["power"],
        window_start=int(settings["window_start"]),
        vote_rate=settings["vote_rate"],
        index=settings["index"],
    )


def _tidy(part: Any) -> Any:
    """Returns a restored pytree of arrays, None where it has None."""
    if isinstance(part, Mapping):
        return {name: _tidy(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_tidy(value) for value in part]
    return None if part is None else jnp.asarray(part)


def _to_state(stats: TrajectoryStats) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(stats, name)) for name in _FIELDS}


def _from_state(target: TrajectoryStats, state: Mapping[str, Any]) -> TrajectoryStats:
    if set(state) != set(_FIELDS):
        odd = sorted(set(state) ^ set(_FIELDS))[0]
        raise InputError(f"restored value is not TrajectoryStats: {odd!r} is in one of them only")
    if set(state["buffers"]) != set(target.buffers):
        raise InputError(
            f"the statistics were tracked with the buffers {', '.join(sorted(state['buffers']))} "
            f"and restored under {', '.join(sorted(target.buffers))}; give trajectory.init the "
            "same measures= and compensated="
        )
    new = dataclasses.replace(
        target,
        **{
            name: serialization.from_state_dict(getattr(target, name), state[name], name=name)
            for name in _FIELDS
        },
    )
    check_settings(new)
    return new


serialization.register_serialization_state(TrajectoryStats, _to_state, _from_state)
