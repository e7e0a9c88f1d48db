"""Trajectory statistics in the host's memory, which visit the devices only for a snapshot.

A train step that tracks carries the statistics through the device's memory at every step, though it
changes them once in a cadence. Here the compiled step has none; after each step whose turn it is
the statistics come to the devices tensor by tensor, are updated there beside their weights, and go
back. At any moment the devices hold the statistics of one tensor at most.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from swe_prune import trajectory, tree
from swe_prune.training.state import TrainState
from swe_prune.trajectory import TrajectoryStats

HOST = "pinned_host"


def host_memory_missing(mesh: Mesh) -> str | None:
    """Returns a sentence where the devices cannot address their host's memory, else None."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST in kinds:
        return None
    return (
        f"config.parallel.statistics = 'host' needs memory of the kind {HOST!r}, which "
        f"{device.platform} has not (it has {', '.join(kinds)}); the statistics stay on the device"
    )


def to_host(stats: TrajectoryStats) -> TrajectoryStats:
    """Returns the statistics with their buffers in the host's memory, sharded as before."""
    return _with_memory(stats, HOST)


def to_device(stats: TrajectoryStats) -> TrajectoryStats:
    """Returns the statistics with their buffers in the devices' memory, sharded as before."""
    return _with_memory(stats, "device")


def _with_memory(stats: TrajectoryStats, kind: str) -> TrajectoryStats:
    def moved(leaf: Any) -> Any:
        sharding = leaf.sharding.with_memory_kind(kind)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return dataclasses.replace(stats, buffers=jax.tree.map(moved, stats.buffers))


def tracking_on_host(
    step: Callable[[TrainState, Any], tuple[TrainState, Any]], track_every: int
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """Returns a train step whose statistics live in the host's memory.

    Only the first call waits for the device, to learn at which step a resumed phase goes on.

    Args:
        step: the compiled train step; the states it is given have no statistics.
        track_every: take a snapshot after every so many steps.
    """
    number: int | None = None

    def tracked(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        nonlocal number
        number = int(state.step) if number is None else number
        stats = state.stats
        assert stats is not None
        state, metrics = step(dataclasses.replace(state, stats=None), batch)
        number += 1
        if number % track_every == 0:
            stats = snapshot(stats, state.params)
        return dataclasses.replace(state, stats=stats), metrics

    return tracked


def snapshot(stats: TrajectoryStats, params: PyTree) -> TrajectoryStats:
    """Returns host-resident statistics with one more snapshot, tensor by tensor.

    Args:
        stats: from `to_host`; their buffers are given up.
        params: on the devices.
    """
    weights = dict(tree.named_leaves(params))
    leaves = {
        name: {path: leaf for path, leaf in tree.named_leaves(buffer) if leaf is not None}
        for name, buffer in stats.buffers.items()
    }
    scalars = dataclasses.replace(stats, buffers={})
    updated: dict[str, dict[str, Any]] = {name: {} for name in leaves}
    for path in next(iter(leaves.values())):
        of_one = {name: {path: leaves[name][path]} for name in leaves}
        shardings = jax.tree.map(lambda leaf: leaf.sharding, of_one)
        one = to_device(dataclasses.replace(stats, buffers=of_one))
        one = _update(one, {path: weights[path]})
        scalars = dataclasses.replace(one, buffers={})
        for name, buffer in jax.device_put(one.buffers, shardings).items():
            updated[name] |= buffer
    buffers = {
        name: tree.map_named(lambda path, _, name=name: updated[name][path], buffer)
        for name, buffer in stats.buffers.items()
    }
    return dataclasses.replace(scalars, buffers=buffers)


# The scalars stay: every tensor's update starts from the same.
_update = jax.jit(trajectory.update)
