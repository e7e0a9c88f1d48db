"""Batches sharded over the devices along their first axis, which runs over the windows.

Each process provides only the windows for its local devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swe_prune.errors import InputError

BATCH = PartitionSpec(("data", "fsdp"))
"""Partition of the first axis of a batch."""


def check_batch(size: int, key: str, mesh: Mesh) -> None:
    """Checks that a batch can be divided evenly over the devices.

    Args:
        size: Number of windows in the batch.
        key: Name of the setting that the size comes from.
        mesh: Mesh of devices.

    Raises:
        InputError: If the size is not a multiple of the number of shards.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise InputError(
            f"{key} = {size} cannot be divided over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {ways} devices; make it a multiple of {ways}, or give "
            "config.parallel.tensor more of them"
        )


def constrain_rows(x: Array, mesh: Mesh) -> Array:
    """Constrains a traced array to be sharded along its first axis like a batch.

    Args:
        x: Array with windows, or their tokens, along the first axis, in order.
        mesh: Mesh of devices.
    """
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def own_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Returns the sorted int64 indices of the rows of a batch for this process's devices.

    Args:
        size: Number of windows in the batch.
        mesh: Mesh of devices.
    """
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,))
    parts = {range(*index[0].indices(size)) for index in indices.values() if index is not None}
    return np.array(sorted({row for part in parts for row in part}), np.int64)


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh, *, size: int | None = None
) -> dict[str, jax.Array]:
    """Shards a host batch over the devices.

    Args:
        batch: Host arrays with a common first axis that the devices divide evenly, for the whole
            batch or for this process's rows.
        mesh: Mesh of devices.
        size: Number of windows in the whole batch, if `batch` has only the rows of `own_rows`. If
            None, `batch` is the whole batch.
    """
    sharding = NamedSharding(mesh, BATCH)
    if size is None and jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    rows = None if size is None else own_rows(size, mesh)

    def shard(host: Any) -> jax.Array:
        whole = (len(host) if size is None else size, *host.shape[1:])

        def part(index: Any) -> Any:
            if rows is None:
                return host[index]
            # Translate rows of the whole batch to rows of this process.
            wanted = np.arange(*index[0].indices(whole[0]))
            return host[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback(whole, sharding, part)

    return jax.tree.map(lambda host: shard(np.asarray(host)), dict(batch))


class ShardedBatches:
    """Iterator over batches sharded over the devices, whose position can be saved."""

    def __init__(self, batches: Any, mesh: Mesh, size: int):
        """Wraps an iterator of host batches with `get_state` and `set_state`.

        Args:
            batches: Iterator over this process's rows (`own_rows`) of each batch.
            mesh: Mesh of devices.
            size: Number of windows in the whole batch.
        """
        self._batches, self._mesh, self._size = batches, mesh, size

    def __next__(self) -> dict[str, jax.Array]:
        """Returns the next batch."""
        return shard_batch(next(self._batches), self._mesh, size=self._size)

    def get_state(self) -> Any:
        """Returns the position as a JSON-serializable value."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Moves to a position."""
        self._batches.set_state(state)
