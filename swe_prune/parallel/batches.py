"""Batches over the devices: the first axis, which runs over the windows, is divided.

Each process hands out the windows that its own devices take, and cuts no others.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swe_prune.errors import InputError

BATCH = PartitionSpec(("data", "fsdp"))
"""How the first axis of a batch is divided."""


def check_batch(size: int, key: str, mesh: Mesh) -> None:
    """Checks that the devices can share a batch evenly.

    Args:
        size: windows in it.
        key: the setting that it comes from.
        mesh: the devices.

    Raises:
        InputError: they cannot.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise InputError(
            f"{key} = {size} cannot be divided over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {ways} devices; make it a multiple of {ways}, or give "
            "config.parallel.tensor more of them"
        )


def constrain_rows(x: Array, mesh: Mesh) -> Array:
    """Returns a traced array, to be laid out with its first axis divided as a batch's.

    Args:
        x: windows or their tokens along the first axis, in order; whole along the others.
        mesh: the devices.
    """
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def own_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Returns the rows of a batch that this process's devices take, sorted, int64.

    Args:
        size: windows in the batch.
        mesh: the devices.
    """
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,))
    parts = {range(*place[0].indices(size)) for place in places.values() if place is not None}
    return np.array(sorted({row for part in parts for row in part}), np.int64)


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh, *, size: int | None = None
) -> dict[str, jax.Array]:
    """Returns a batch as arrays divided over the devices.

    Args:
        batch: host arrays that share their first axis, which the devices divide evenly: of the
            whole batch, or of this process's rows of it.
        mesh: the devices.
        size: windows in the whole batch, where `batch` has those of `own_rows` alone.
    """
    sharding = NamedSharding(mesh, BATCH)
    if size is None and jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    rows = None if size is None else own_rows(size, mesh)

    def placed(host: Any) -> jax.Array:
        whole = (len(host) if size is None else size, *host.shape[1:])

        def part(place: Any) -> Any:
            if rows is None:
                return host[place]
            wanted = np.arange(*place[0].indices(whole[0]))
            return host[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback(whole, sharding, part)

    return {name: placed(np.asarray(host)) for name, host in batch.items()}


class ShardedBatches:
    """An iterator over batches divided over the devices, whose position can be saved."""

    def __init__(self, batches: Any, mesh: Mesh, size: int):
        """Wraps an iterator of host batches with `get_state` and `set_state`.

        Args:
            batches: of this process's rows (`own_rows`) of each batch.
            mesh: the devices.
            size: windows in the whole batch.
        """
        self._batches, self._mesh, self._size = batches, mesh, size

    def __next__(self) -> dict[str, jax.Array]:
        """Returns the next batch."""
        return shard_batch(next(self._batches), self._mesh, size=self._size)

    def get_state(self) -> Any:
        """Returns the position as something JSON can hold."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        self._batches.set_state(state)
