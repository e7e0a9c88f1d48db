"""Mesh of all devices with named axes."""

import math

import jax
from jax.sharding import AxisType, Mesh

from swe_prune.config import ParallelConfig
from swe_prune.errors import InputError

AXES = ("data", "fsdp", "tensor")


def mesh(settings: ParallelConfig) -> Mesh:
    """Returns a mesh of all devices with the axes `AXES`, any of which may have length 1.

    The axis type is Auto, with which the compiler propagates shardings; Linen fails with others.

    Args:
        settings: Lengths of the axes; `data` = None uses the devices that the other axes leave.

    Raises:
        InputError: If the product of the lengths is not the number of devices.
    """
    devices = jax.device_count()
    data = settings.data
    if data is None:
        data = max(1, devices // (settings.fsdp * settings.tensor))
    shape = (data, settings.fsdp, settings.tensor)
    if math.prod(shape) != devices:
        named = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, shape, strict=True))
        raise InputError(
            f"config.parallel must give a mesh of {devices} devices, got {named} = "
            f"{math.prod(shape)}; make the lengths multiply to {devices}, or leave "
            "config.parallel.data None and let fsdp x tensor divide it"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
