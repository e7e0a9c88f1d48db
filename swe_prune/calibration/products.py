"""Sums over the activations that each weight is multiplied with, in any function.

`layout.walk` follows every weight to its products and hands over the other operand; here it is
brought into the form (copies, N, R), with R in the order of the weight's input axes, and summed.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune.calibration import convolutions
from swe_prune.errors import InputError
from swe_prune.layout import walked
from swe_prune.layout.notes import Product, SumKey, Sums
from swe_prune.layout.trace import Traced, array_leaves
from swe_prune.layout.views import Piece
from swe_prune.layout.walk import Walk

PRECISION = jax.lax.Precision.HIGHEST  # accelerators round the factors of a product by default

Reduce = Callable[[Array, Product], dict[str, Array]]
"""Function of (x_KxNxR, product) to the sums over N that are wanted, whose leading axes are K's."""


def input_sums(
    traced: Traced,
    params: PyTree,
    batch: PyTree,
    wanted: Mapping[str, Any],
    *,
    hessian: bool = False,
    reduce: Reduce | None = None,
    beside: PyTree | None = None,
) -> dict[str, dict[str, Array]]:
    """Returns sums over the inputs of each wanted weight in one call of a function.

    Computes the traced function again with the sums next to it, so it belongs inside a jit; what
    the sums do not need is not computed.

    Args:
        traced: Function of (params, batch), from `layout.trace.trace`.
        params: Pytree of weights.
        batch: Pytree of arrays.
        wanted: Mapping whose keys are the names of the weights to measure.
        hessian: Whether to sum the outer products too.
        reduce: Other sums to compute in place of these two. They are added up over all products
            of a weight.
        beside: Pytree of arrays like `batch`, of the same tokens as another model sees them. None:
            no sums over pairs.

    Returns:
        Sums by name, float32: "square", Σ x², with the weight's shape along its copies and inputs
        and 1 along its outputs, or all of a grouped convolution; with `hessian` also "outer",
        Σ x xᵀ, copies x R x R; with `beside` also "cross", Σ x x'ᵀ, of each input x and the input
        x' that `beside` has in its place.
        Those of `reduce` have the copies in front.

    Raises:
        InputError: A wanted weight is used in a way that cannot be measured.
    """
    met: dict[str, list[Array]] = {}
    how = functools.partial(_reduced, hessian=hessian) if reduce is None else reduce

    def measure(product: Product) -> Sums:
        name = traced.names[product.view.leaf]
        if name not in wanted:
            return {}

        def first(x: Array, product: Product) -> dict[str, Array]:
            met.setdefault(name, []).append(x)
            return how(x, product)

        return _sums(name, product, first if beside is not None else how)

    def measure_pairs(product: Product) -> Sums:
        name = traced.names[product.view.leaf]
        if name not in wanted:
            return {}

        def paired(x: Array, product: Product) -> dict[str, Array]:
            # The second walk meets the same products in the same order.
            return _crossed(met[name].pop(0), name, x, product)

        return _sums(name, product, paired)

    found = _measured(traced, params, batch, measure)
    if beside is None:
        return found
    crossed = _measured(traced, params, beside, measure_pairs)
    return {name: {**own, "cross": crossed[name]["outer"]} for name, own in found.items()}


def _measured(
    traced: Traced, params: PyTree, batch: PyTree, measure: Callable[[Product], Sums]
) -> dict[str, dict[str, Array]]:
    notes = walked(traced)[0].notes
    parts: dict[int, dict[int, dict[int, float]]] = {}

    def direct(product: Product) -> Sums:
        # A weight divided by its spectral norm holds products of itself.
        if product.view.inner and notes.uses.get(product.view.leaf):
            return {}
        found = measure(product)
        if found:
            part, activations = product.numbers
            of_leaf = parts.setdefault(product.view.leaf, {})
            of_leaf.setdefault(activations, {})[part] = _share_of_outputs(product)
        return found

    walk = Walk(traced.shapes, direct, notes.members)
    _, sums = walk.run(traced.closed, traced.cells(array_leaves(params, batch)))
    for leaf, by_activations in parts.items():
        _check_shared(traced.names[leaf], by_activations)
    by_leaf: dict[int, list[tuple[SumKey, Any]]] = {}
    for key, value in sums.items():
        by_leaf.setdefault(key.leaf, []).append((key, value))
    return {
        traced.names[leaf]: _assembled(traced.names[leaf], traced.shapes[leaf], parts)
        for leaf, parts in by_leaf.items()
    }


def _sums(name: str, product: Product, reduce: Reduce) -> Sums:
    """Returns the sums of one product, which `reduce` makes of its inputs, copies x N x R."""
    view = product.view
    if not view.whole:
        raise InputError(
            f"{name!r} is cut, reshaped, reversed, looked up, or joined with other values before "
            "its product, where its inputs cannot be told apart; store it in the form that the "
            "product takes, or exclude it with prunable="
        )
    x, inputs, copies = {"dot": _of_dot, "ragged": _of_ragged, "conv": convolutions.patches}[
        product.kind
    ](name, product)
    # Of complex activations Σ |x|² and Re Σ x̄ xᵀ, which are sums over both parts.
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    ordered = [_ordered(part.astype(jnp.float32), inputs, len(copies)) for part in parts]
    sums = [reduce(x_KxNxR, product) for x_KxNxR in ordered]
    found = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), sums)
    if product.kind == "conv":
        copies, found = convolutions.each_output(name, product, copies, found)
    # Copies that all get these activations have the same sums.
    shared = [
        piece
        for at, dim in enumerate(view.dims)
        if product.roles[at] == "copies" and at not in (*product.contracted[0], *product.batched[0])
        for piece in dim
        if piece not in copies
    ]
    if shared and product.groups is None:
        sizes = [piece.size for piece in shared]
        found = {kind: jnp.broadcast_to(v, (*sizes, *v.shape)) for kind, v in found.items()}
        copies = [*shared, *copies]
    # A part of the outputs counts as that part of a product.
    part = _share_of_outputs(product)
    if part != 1:
        found = {kind: value * part for kind, value in found.items()}
    # Put the sums of a single copy in their place; fixed places are put together at the end.
    labels, fixed = tuple(copies), []
    for piece, place in zip(view.picked, view.places, strict=True):
        if isinstance(place, int):
            fixed.append((piece, place))
            continue
        found = {
            kind: jnp.zeros((piece.size, *value.shape), value.dtype).at[place].set(value)
            for kind, value in found.items()
        }
        labels = (piece, *labels)
    rest = (tuple(sorted(inputs)), tuple(fixed), product.data)
    key = SumKey(view.leaf, labels, view.scanned, rest)
    return {key: found}


def _of_dot(name: str, product: Product) -> tuple[Array, list[Piece], list[Piece]]:
    """Returns the activations as (copies…, N…, inputs…), and the pieces of the named axes."""
    inputs, copies = _matched(product)
    x = product.other
    # Where the weight is repeated along a summed dimension, it multiplies the sum.
    repeated = [at for pieces, at, role in _dims(product) if role == "inputs" and not pieces]
    named = [at for _, at in copies + inputs]
    rest = [at for at in range(x.ndim) if at not in (*named, *repeated)]
    order = [*(at for _, at in copies), *rest, *(at for _, at in inputs), *repeated]
    rows = math.prod(x.shape[at] for at in rest)  # -1 would not do for a weight of size 0
    x = jnp.transpose(x, order)
    if repeated:
        x = x.sum(axis=tuple(range(x.ndim - len(repeated), x.ndim)))
    # Expand every named dimension into its pieces.
    own = [piece for pieces, _ in copies for piece in pieces]
    summed = [piece for pieces, _ in inputs for piece in pieces]
    x = x.reshape(*(p.size for p in own), rows, *(p.size for p in summed))
    return x, summed, own


def _dims(product: Product) -> list[tuple[tuple[Piece, ...], int, str]]:
    """Returns the pieces, the other operand's dimension and the role of the shared dimensions."""
    found = []
    for own, other in (product.contracted, product.batched):
        for at, theirs in zip(own, other, strict=True):
            found.append((product.view.dims[at], theirs, product.roles[at]))
    return found


def _matched(product: Product) -> tuple[list[Any], list[Any]]:
    dims = [dim for dim in _dims(product) if dim[0]]
    inputs = [(pieces, at) for pieces, at, role in dims if role == "inputs"]
    copies = [(pieces, at) for pieces, at, role in dims if role == "copies"]
    return inputs, copies


def _of_ragged(name: str, product: Product) -> tuple[Array, list[Piece], list[Piece]]:
    numbers = product.params["ragged_dot_dimension_numbers"]
    plain = (tuple(numbers.lhs_ragged_dimensions), product.other.ndim) == ((0,), 2)
    if not plain or product.params.get("group_offset") is not None:
        raise InputError(
            f"{name!r} is used in a ragged product with other dimensions than (tokens, inputs); "
            "exclude it with prunable="
        )
    (own,), _ = product.contracted
    group = [at for at, role in product.roles.items() if role == "copies"]
    copies = [piece for at in group for piece in product.view.dims[at]]
    # The rows of a group come together; the sums separate them again.
    return product.other, list(product.view.dims[own]), copies


def _ordered(x: Array, inputs: list[Piece], copies: int) -> Array:
    """Returns (copies…, N, R) with R in the order of the weight's axes."""
    order = sorted(range(len(inputs)), key=lambda at: (inputs[at].axis, -inputs[at].stride))
    first = x.ndim - len(inputs)
    x = jnp.transpose(x, [*range(first), *(first + at for at in order)])
    rows = math.prod(x.shape[copies:first])
    return x.reshape(*x.shape[:copies], rows, math.prod(piece.size for piece in inputs))


def _reduced(x: Array, product: Product, hessian: bool) -> dict[str, Array]:
    if product.groups is None:
        sums = {"square": jnp.sum(x**2, axis=-2)}
        if hessian:
            sums["outer"] = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=PRECISION)
        return sums
    # Ragged: the rows that belong to each group, one group after the other.
    x_NxR = x.reshape(-1, x.shape[-1])
    ends = jnp.cumsum(product.groups)
    row_N = jnp.arange(len(x_NxR))

    def of_group(span: tuple[Array, Array]) -> dict[str, Array]:
        inside = (row_N >= span[0]) & (row_N < span[1])
        own_NxR = jnp.where(inside[:, None], x_NxR, 0)
        sums = {"square": jnp.sum(own_NxR**2, axis=0)}
        if hessian:
            sums["outer"] = jnp.matmul(own_NxR.T, own_NxR, precision=PRECISION)
        return sums

    return jax.lax.map(of_group, (ends - product.groups, ends))


def _crossed(first: Array, name: str, x: Array, product: Product) -> dict[str, Array]:
    """Returns Σ x x'ᵀ as "outer", where x are the inputs that the first walk met."""
    if product.groups is not None:
        raise InputError(
            f"{name!r} is used in a ragged product, where pairs of inputs may go to different "
            "groups; restore it with target='dense kernel'"
        )
    outer = jnp.matmul(jnp.swapaxes(first, -1, -2), x, precision=PRECISION)
    return {"square": jnp.sum(x**2, axis=-2), "outer": outer}


def _check_shared(name: str, parts: Mapping[int, Mapping[int, float]]) -> None:
    """Checks that all outputs of a weight get the same inputs.

    Args:
        name: Name of the weight.
        parts: Share of the outputs of each part of it, by the number of the activations.
    """
    if len(parts) > 1 and any(sum(shares.values()) < 0.999 for shares in parts.values()):
        raise InputError(
            f"{name!r} is cut along its outputs, and the parts get different inputs, as layers or "
            "experts do, so it has no one set of them; store it with an axis for the parts, or "
            "exclude it with prunable="
        )


def _share_of_outputs(product: Product) -> float:
    """Returns the share of the outputs that a product uses of a weight that was sliced."""
    sizes: dict[int, int] = {}
    for at, dim in enumerate(product.view.dims):
        for piece in dim if product.roles[at] == "outputs" else ():
            sizes[piece.axis] = sizes.get(piece.axis, 1) * piece.size
    return math.prod(
        size / product.shape[axis] for axis, size in sizes.items() if product.shape[axis]
    )


def _assembled(
    name: str, shape: tuple[int, ...], parts: Sequence[tuple[SumKey, dict[str, Array]]]
) -> dict[str, Array]:
    """Returns the sums of one weight over all its products, in the order of its axes."""
    # The singular vectors of a spectral norm are not activations.
    of_data = [part for part in parts if part[0].rest[2]]
    parts = of_data if len(_inputs(parts)) > 1 and of_data else parts
    if len(_inputs(parts)) > 1:
        raise InputError(
            f"{name!r} is used in products of different orientation, so it has no one set of "
            "inputs; exclude it with prunable="
        )
    total: dict[str, Array] | None = None
    for key, value in parts:
        inputs, fixed, _ = key.rest
        labels = key.labels
        for piece, place in fixed:
            value = {
                kind: jnp.zeros((piece.size, *x.shape), x.dtype).at[place].set(x)
                for kind, x in value.items()
            }
            labels = (piece, *labels)
        here = _by_axis(shape, labels, inputs, value)
        total = here if total is None else jax.tree.map(jnp.add, total, here)
    assert total is not None
    return total


def _inputs(parts: Sequence[tuple[SumKey, Any]]) -> set[frozenset[int]]:
    """Returns the sets of input axes that the products of a weight have."""
    return {frozenset(piece.axis for piece in key.rest[0]) for key, _ in parts}


def _by_axis(
    shape: tuple[int, ...],
    labels: tuple[Piece, ...],
    inputs: tuple[Piece, ...],
    value: dict[str, Array],
) -> dict[str, Array]:
    order = sorted(range(len(labels)), key=lambda at: (labels[at].axis, -labels[at].stride))
    copies = sorted({piece.axis for piece in labels})
    sizes = [shape[axis] for axis in copies]
    found = {}
    for kind, x in value.items():
        x = jnp.transpose(x, [*order, *range(len(labels), x.ndim)])
        found[kind] = x.reshape(*sizes, *x.shape[len(labels) :])
    if "square" not in found:
        return found
    # The squares get the weight's axes, of length 1 along its outputs.
    summed = sorted({piece.axis for piece in inputs})
    square = found["square"].reshape(*sizes, *(shape[axis] for axis in summed))
    axes = [*copies, *summed]
    square = jnp.transpose(square, sorted(range(len(axes)), key=lambda at: axes[at]))
    found["square"] = square.reshape([n if a in axes else 1 for a, n in enumerate(shape)])
    return found
