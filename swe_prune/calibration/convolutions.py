"""What a convolution multiplies with its kernel, and which of its outputs get it."""

import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from swe_prune.errors import InputError
from swe_prune.layout import views
from swe_prune.layout.notes import Product
from swe_prune.layout.views import Piece


def patches(name: str, product: Product) -> tuple[Array, list[Piece], list[Piece]]:
    """Returns the patches that a convolution multiplies with its kernel, as (copies…, N, in, …)."""
    params, spec = product.params, product.params["dimension_numbers"]
    groups, outputs = params["feature_group_count"], product.view.dims[spec.rhs_spec[0]]
    copies = [*itertools.chain(*product.view.dims[len(spec.rhs_spec) :])]  # of members
    if _groups_of_outputs(product) > 1:
        size = product.shape[outputs[0].axis] if len(outputs) == 1 else 0
        if size != views.size(outputs):
            raise InputError(
                f"{name!r} is cut along the outputs of a grouped convolution, which is not "
                "supported; exclude it with prunable="
            )
        copies = [Piece(outputs[0].axis, groups, size // groups)]
    if params["batch_group_count"] > 1:
        raise InputError(
            f"{name!r} belongs to a convolution grouped by its batch, which is not supported; "
            "exclude it with prunable="
        )
    x = jnp.transpose(product.other, spec.lhs_spec)  # batch, in, spatial
    kernel_dims = spec.rhs_spec[1:]  # in, spatial
    size = [math.prod(p.size for p in product.view.dims[at]) for at in kernel_dims[1:]]
    found = jax.lax.conv_general_dilated_patches(
        x,
        filter_shape=size,
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,  # a product with ones, which must be exact
    )
    pieces = [piece for at in kernel_dims for piece in product.view.dims[at]]
    rows = jnp.moveaxis(found, 1, -1).reshape(-1, groups, *(piece.size for piece in pieces))
    rows = jnp.moveaxis(rows, 1, 0)
    return rows.reshape(*(piece.size for piece in copies), *rows.shape[1:]), pieces, copies


def each_output(
    name: str, product: Product, copies: list[Piece], sums: dict[str, Array]
) -> tuple[list[Piece], dict[str, Array]]:
    """Returns the pieces and the sums of copies, of groups among the outputs for each output.

    Each group has inputs of its own, which its outputs share.

    Raises:
        InputError: Sums other than of squares are wanted for each output.
    """
    groups = _groups_of_outputs(product)
    if groups == 1:
        return copies, sums
    if sums.keys() != {"square"}:
        raise InputError(
            f"{name!r} belongs to a grouped convolution, whose outputs get different inputs, of "
            "which only input_norm can be measured; exclude it with prunable=, or name other leaves"
        )
    (group,) = copies
    member = Piece(group.axis, product.shape[group.axis] // groups, 1)
    spread = {
        kind: jnp.broadcast_to(v[:, None], (groups, member.size, *v.shape[1:]))
        for kind, v in sums.items()
    }
    return [group, member], spread


def _groups_of_outputs(product: Product) -> int:
    """Returns the number of groups among the outputs of a weight, 1 if it is in no such product."""
    if product.kind != "conv":
        return 1
    members = len(product.view.dims) > len(product.params["dimension_numbers"].rhs_spec)
    return 1 if members else product.params["feature_group_count"]
