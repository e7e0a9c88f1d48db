"""The devices as a grid with named axes."""

import math

import jax
from jax.sharding import AxisType, Mesh

from swe_prune.config import ParallelConfig
from swe_prune.errors import InputError

AXES = ("data", "fsdp", "tensor")


def mesh(settings: ParallelConfig) -> Mesh:
    """Returns all devices as a mesh with the axes `AXES`, of which any may have length 1.

    The axes are of the kind Auto, whose shardings the compiler propagates: Linen fails with others.

    Args:
        settings: the lengths; `data` None takes the devices that the other two leave.

    Raises:
        InputError: the lengths do not multiply to the number of devices.
    """
    devices = jax.device_count()
    data = settings.data
    if data is None:
        data = max(1, devices // (settings.fsdp * settings.tensor))
    shape = (data, settings.fsdp, settings.tensor)
    if math.prod(shape) != devices:
        named = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, shape, strict=True))
        raise InputError(
            f"config.parallel gives a mesh of {named} = {math.prod(shape)} devices and there are "
            f"{devices}; make the lengths multiply to {devices}, or leave config.parallel.data "
            "None and let fsdp x tensor divide it"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
