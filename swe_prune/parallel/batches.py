"""Batches over the devices: the first axis, which runs over the windows, is divided."""

from collections.abc import Mapping
from typing import Any

import jax
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


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch as arrays divided over the devices.

    Args:
        batch: host arrays that share their first axis, which the devices divide evenly.
        mesh: the devices.
    """
    return jax.device_put(dict(batch), NamedSharding(mesh, BATCH))


class PlacedBatches:
    """An iterator over batches divided over the devices, whose position can be saved."""

    def __init__(self, batches: Any, mesh: Mesh):
        """Wraps an iterator of host batches with `get_state` and `set_state`."""
        self._batches, self._mesh = batches, mesh

    def __next__(self) -> dict[str, jax.Array]:
        """Returns the next batch."""
        return place_batch(next(self._batches), self._mesh)

    def get_state(self) -> Any:
        """Returns the position as something JSON can hold."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        self._batches.set_state(state)
