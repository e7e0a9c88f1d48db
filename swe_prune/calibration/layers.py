"""Input rows that a layer multiplies with its kernel.

A layer is Dense-like if its output is x_NxR @ kernel_RxC up to reshaping. The matrix x_NxR then
holds everything that pruning by calibration needs. A convolution is Dense-like over its patches.
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

    N counts everything that the kernel is applied to: tokens of all sequences, or patches of all
    images. Inputs are taken before the layer casts them to its computation dtype.

    Args:
        name: Name of the kernel, for error messages.
        layer: Bound module that owns the kernel.
        x: Input that the module was called with.
        dense_like: Custom layer classes that compute x @ kernel over the last axis.

    Raises:
        InputError: If the layer is not Dense-like.
    """
    x = jnp.asarray(x).astype(jnp.float32)
    if isinstance(layer, (nn.Dense, *dense_like)):
        return x.reshape(-1, x.shape[-1]), (x.shape[-1],)
    if isinstance(layer, nn.DenseGeneral):
        return _general(name, layer, x)
    if isinstance(layer, nn.Conv):
        return _patches(name, layer, x)
    raise InputError(
        f"{name!r} belongs to a {type(layer).__name__}, whose inputs are not known; exclude it "
        "with prunable=, or pass dense_like=(its class,) if it computes x @ kernel"
    )


def _general(name: str, layer: nn.DenseGeneral, x: Array) -> tuple[Array, tuple[int, ...]]:
    if layer.batch_dims:
        raise InputError(
            f"{name!r} has a kernel for each of its batch_dims, which is not supported; exclude it "
            "with prunable="
        )
    axis = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    axes = sorted(a % x.ndim for a in axis)
    shape = tuple(x.shape[a] for a in axes)
    # Move the contracted axes to the end and flatten them.
    moved = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    return moved.reshape(-1, math.prod(shape)), shape


def _patches(name: str, layer: nn.Conv, x: Array) -> tuple[Array, tuple[int, ...]]:
    """Returns the patches that a convolution multiplies, ordered as its kernel (…, in)."""
    size = layer.kernel_size
    size = (size,) if isinstance(size, int) else tuple(size)

    def each(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value or 1,) * len(size)

    # Only plain convolutions multiply their patches with a single matrix.
    padding = canonicalize_padding(layer.padding, len(size))
    for what, plain in (
        ("grouped", layer.feature_group_count == 1),
        ("masked", layer.mask is None),
        ("input-dilated", set(each(layer.input_dilation)) == {1}),
        (f"{padding}-padded", padding not in ("CIRCULAR", "REFLECT", "CAUSAL")),
    ):
        if not plain:
            raise InputError(
                f"{name!r} belongs to a {what} convolution, which is not supported; exclude it "
                "with prunable="
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
        precision=jax.lax.Precision.HIGHEST,  # a product with ones, which must be exact
    )
    # Reorder the features from (in, …) to the kernel's (…, in).
    patches = patches.reshape(-1, x.shape[-1], *size)
    patches = jnp.moveaxis(patches, 1, -1)
    shape = (*size, x.shape[-1])
    return patches.reshape(patches.shape[0], -1), shape
