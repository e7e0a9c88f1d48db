"""Which rows of inputs a layer multiplies with its kernel.

A layer is Dense-like when its output is x_NxR @ kernel_RxC after some reshaping: then one matrix
x_NxR says all that pruning by calibration asks of it. A convolution is, over its patches.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import canonicalize_padding
from jaxtyping import Array, Float

from swe_prune.errors import InputError


def rows(
    name: str, layer: nn.Module, x: Any, dense_like: tuple[type, ...] = ()
) -> tuple[Float[Array, "N R"], tuple[int, ...]]:
    """Returns the inputs x_NxR of a layer, float32, and the shape of the kernel's input axes.

    N counts everything that a kernel sees: tokens of all sequences, or patches of all images. The
    inputs are taken as they come into the layer, before a cast to its computation dtype.

    Args:
        name: of the kernel, for errors.
        layer: bound module that owns the kernel.
        x: what it was called with.
        dense_like: classes of the user's own that compute x @ kernel over the last axis.

    Raises:
        InputError: a layer of another kind, or one whose kernel meets more than one matrix.
    """
    x = jnp.asarray(x).astype(jnp.float32)
    if isinstance(layer, (nn.Dense, *dense_like)):
        return x.reshape(-1, x.shape[-1]), (x.shape[-1],)
    if isinstance(layer, nn.DenseGeneral):
        return _general(name, layer, x)
    if isinstance(layer, nn.Conv):
        return _patches(name, layer, x)
    raise InputError(
        f"{name!r} belongs to a {type(layer).__name__}, whose inputs are not known; leave it out "
        "with prunable=, or if it computes x @ kernel pass dense_like=(its class,)"
    )


def _general(name: str, layer: nn.DenseGeneral, x: Array) -> tuple[Array, tuple[int, ...]]:
    if layer.batch_dims:
        raise InputError(
            f"{name!r} has one kernel for each of its batch_dims; leave it out with prunable="
        )
    axis = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    axes = sorted(a % x.ndim for a in axis)
    shape = tuple(x.shape[a] for a in axes)
    moved = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    return moved.reshape(-1, math.prod(shape)), shape


def _patches(name: str, layer: nn.Conv, x: Array) -> tuple[Array, tuple[int, ...]]:
    """Returns the patches that a convolution multiplies, ordered as its kernel (…, in)."""
    size = layer.kernel_size
    size = (size,) if isinstance(size, int) else tuple(size)

    def each(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value or 1,) * len(size)

    padding = canonicalize_padding(layer.padding, len(size))
    for what, plain in (
        ("grouped", layer.feature_group_count == 1),
        ("masked", layer.mask is None),
        ("input-dilated", set(each(layer.input_dilation)) == {1}),
        (f"{padding}-padded", padding not in ("CIRCULAR", "REFLECT", "CAUSAL")),
    ):
        if not plain:
            raise InputError(
                f"{name!r} belongs to a {what} convolution, whose inputs are not taken apart here; "
                "leave it out with prunable="
            )
    x = x.reshape(-1, *x.shape[-len(size) - 1 :])
    spatial = "DHW"[-len(size) :]
    patches = jax.lax.conv_general_dilated_patches(
        x,
        filter_shape=size,
        window_strides=each(layer.strides),
        padding=padding,
        rhs_dilation=each(layer.kernel_dilation),
        dimension_numbers=(f"N{spatial}C", f"OI{spatial}", f"N{spatial}C"),
        precision=jax.lax.Precision.HIGHEST,  # it is a product with ones, which must be exact
    )
    # Its features run (in, …); the kernel's run (…, in).
    patches = patches.reshape(-1, x.shape[-1], *size)
    patches = jnp.moveaxis(patches, 1, -1)
    shape = (*size, x.shape[-1])
    return patches.reshape(patches.shape[0], -1), shape
