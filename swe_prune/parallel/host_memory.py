"""Offload of the trajectory statistics to host memory between snapshots.

A train step that tracks keeps the statistics in device memory at every step, although it updates
them only every `track_every` steps. Here the compiled step has no statistics. At every snapshot the
statistics are copied to the devices tensor by tensor, updated there next to their weights, and
copied back, so the devices hold the statistics of at most one tensor at a time.
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
    """Returns a message if the devices cannot address host memory, else None."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST in kinds:
        return None
    return (
        f"config.parallel.statistics = 'host' needs memory of kind {HOST!r}, but {device.platform} "
        f"only has {', '.join(kinds)}; the statistics stay on the device"
    )


def to_host(stats: TrajectoryStats) -> TrajectoryStats:
    """Moves the buffers of the statistics to host memory; their sharding stays the same."""
    return _with_memory(stats, HOST)


def to_device(stats: TrajectoryStats) -> TrajectoryStats:
    """Moves the buffers of the statistics to device memory; their sharding stays the same."""
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
    """Wraps a train step to keep the statistics in host memory.

    Only the first call waits for the device, to read the step at which a resumed phase starts.

    Args:
        step: Compiled train step, called with states that have no statistics.
        track_every: Number of steps between snapshots.
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
    """Updates offloaded statistics with one snapshot, tensor by tensor.

    Args:
        stats: Statistics in host memory, from `to_host`.
        params: Parameters on the devices.
    """
    weights = dict(tree.named_leaves(params))
    leaves = {name: tree.present(buffer) for name, buffer in stats.buffers.items()}
    scalars = dataclasses.replace(stats, buffers={})
    updated: dict[str, dict[str, Any]] = {name: {} for name in leaves}
    for path in next(iter(leaves.values())):
        # Copy one tensor's buffers to the devices, update them, and copy them back.
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


# Without donation, because every tensor's update starts from the same scalars.
_update = jax.jit(trajectory.update)
