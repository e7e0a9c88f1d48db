"""TRAWL: weight matrices stacked into a tensor, approximated at low rank, and written back.

No data and no training: the residual of a low-rank approximation is taken for noise (Luo et al.,
arXiv 2406.17261; https://github.com/HettyPatel/Laser_T). Matrices of one shape are stacked to T
(m, p, q): the query, key, value and output kernels of attention, or up, gate and the transposed
down kernel of an MLP; of one layer, or of many.

    CP       T ~ sum_r a_r ∘ b_r ∘ c_r, by alternating least squares
    Tucker   T ~ core ×₁ A ×₂ B ×₃ C with orthonormal factors, by higher-order orthogonal iteration
    LASER    each matrix by itself, by its truncated SVD (Sharma et al., 2312.13558): the baseline

Written back dense, the model is as large and as slow as before. Kept as factors, a slice of the CP
form is x ↦ ((x B) * a_m) Cᵀ, which is smaller and faster where R (m + p + q) < m p q.
"""

import functools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice

RIDGE = 1e-8
"""Share of the Gram matrix's mean diagonal that is added to it."""

Stack = Mapping[str, bool]
"""Names of the kernels of one tensor, and whether each is transposed."""


class CP(NamedTuple):
    """A tensor as a sum of R outer products.

    T[i, j, k] = sum_r slices[i, r] rows[j, r] columns[k, r].

    Attributes:
        slices: (m, R).
        rows: (p, R).
        columns: (q, R).
    """

    slices: Array
    rows: Array
    columns: Array

    def dense(self) -> Array:
        """Returns the tensor, (m, p, q)."""
        return jnp.einsum("mr,pr,qr->mpq", *self)

    def product(self, x: Float[Array, "... p"], index: int) -> Float[Array, "... q"]:
        """Returns x times a slice, without making the slice.

        Args:
            x: Rows to multiply.
            index: Number of the slice, from 0.

        Raises:
            InputError: If there is no such slice, or x has another width.
        """
        count, width = len(self.slices), len(self.rows)
        if not isinstance(index, Tracer) and not 0 <= index < count:
            raise InputError(f"index must be between 0 and {count - 1}, got {index}")
        if np.shape(x)[-1:] != (width,):
            raise InputError(f"x must have {width} columns, got shape {np.shape(x)}")
        return ((x @ self.rows) * self.slices[index]) @ self.columns.T

    @property
    def size(self) -> int:
        """Number of its numbers, R (m + p + q)."""
        return sum(factor.size for factor in self)


class Tucker(NamedTuple):
    """A tensor as a small core and an orthonormal basis for each of its axes.

    Attributes:
        core: (R₁, R₂, R₃).
        slices: (m, R₁).
        rows: (p, R₂).
        columns: (q, R₃).
    """

    core: Array
    slices: Array
    rows: Array
    columns: Array

    def dense(self) -> Array:
        """Returns the tensor, (m, p, q)."""
        return jnp.einsum("abc,ma,pb,qc->mpq", *self)

    @property
    def size(self) -> int:
        """Number of its numbers."""
        return sum(factor.size for factor in self)


@functools.partial(jax.jit, static_argnames=("rank", "steps"))
def _als(tensor: Array, key: Array, rank: int, steps: int, tolerance: float) -> CP:
    m, p, q = tensor.shape
    drawn = [
        jax.random.normal(k, (n, rank))
        for k, n in zip(jax.random.split(key, 3), (m, p, q), strict=True)
    ]
    norm = jnp.linalg.norm(tensor)

    def solved(product: Array, x: Array, y: Array) -> Array:
        gram = (x.T @ x) * (y.T @ y)
        # Of a tensor of zeros the factors are 0, not 0 / 0.
        ridge = jnp.maximum(RIDGE * jnp.trace(gram) / rank, jnp.finfo(gram.dtype).tiny)
        # More outer products than the tensor needs make the Gram matrix singular, and rounding its
        # smallest eigenvalues negative, on which a Cholesky factorization fails.
        values, vectors = jnp.linalg.eigh(gram)
        return (product @ vectors / (jnp.maximum(values, 0) + ridge)) @ vectors.T

    def unit(factor: Array) -> tuple[Array, Array]:
        length = jnp.maximum(jnp.linalg.norm(factor, axis=0), jnp.finfo(factor.dtype).tiny)
        return factor / length, length

    def step(state: Any) -> Any:
        number, (_, b, c), _, fit = state
        a = solved(jnp.einsum("mpq,pr,qr->mr", tensor, b, c), b, c)
        a, _ = unit(a)
        b = solved(jnp.einsum("mpq,mr,qr->pr", tensor, a, c), a, c)
        b, _ = unit(b)
        c = solved(jnp.einsum("mpq,mr,pr->qr", tensor, a, b), a, b)
        error = jnp.linalg.norm(tensor - jnp.einsum("mr,pr,qr->mpq", a, b, c))
        return number + 1, (a, b, c), fit, 1 - error / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)

    def goes_on(state: Any) -> Array:
        number, _, before, fit = state
        return (number < steps) & (jnp.abs(fit - before) > tolerance)

    start = (0, tuple(drawn), jnp.float32(-2), jnp.float32(-1))
    _, factors, _, _ = jax.lax.while_loop(goes_on, step, start)
    return CP(*factors)


@checked
def cp(
    tensor: Float[Array, "m p q"],
    rank: int,
    *,
    steps: int = 100,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> CP:
    """Returns a CP form of a tensor, by alternating least squares from a random start.

    Each factor in turn is the exact least-squares solution for the other two (Kolda and Bader
    2009). The result depends on the start.

    Args:
        tensor: Tensor (m, p, q).
        rank: Number R of outer products.
        steps: Most rounds over the three factors.
        tolerance: Change of the fit, 1 - ||T - T'|| / ||T||, at which to stop.
        seed: Seed of the start.

    Raises:
        InputError: If the tensor has not three axes or a number that is not finite, or the rank is
            below 1 or above what any tensor of this shape needs.
    """
    tensor = jnp.asarray(tensor, jnp.float32)
    m, p, q = _shape(tensor)
    _check_rank("rank", rank, min(m * p, m * q, p * q))
    # A power of two, which changes no digit, keeps the squares of large and small numbers finite.
    _, exponent = jnp.frexp(jnp.abs(tensor).max())
    found = _als(jnp.ldexp(tensor, -exponent), jax.random.key(seed), int(rank), steps, tolerance)
    return found._replace(columns=jnp.ldexp(found.columns, exponent))


@checked
def tucker(
    tensor: Float[Array, "m p q"], ranks: tuple[int, int, int], *, steps: int = 10
) -> Tucker:
    """Returns a Tucker form of a tensor, by higher-order orthogonal iteration.

    It starts from the leading singular vectors of each unfolding (HOSVD), which the iteration can
    only improve (De Lathauwer, De Moor, Vandewalle 2000).

    Args:
        tensor: Tensor (m, p, q).
        ranks: Rank of each axis.
        steps: Number of rounds over the three factors.

    Raises:
        InputError: If the tensor has not three axes or a number that is not finite, or a rank is
            below 1 or above its axis.
    """
    tensor = jnp.asarray(tensor, jnp.float32)
    for axis, (rank, size) in enumerate(zip(ranks, _shape(tensor), strict=True)):
        _check_rank(f"rank of axis {axis}", rank, size)
    first, second, third = map(int, ranks)
    return _hooi(tensor, (first, second, third), steps)


@functools.partial(jax.jit, static_argnames=("ranks", "steps"))
def _hooi(tensor: Array, ranks: tuple[int, int, int], steps: int) -> Tucker:
    def basis(of: Array, axis: int) -> Array:
        unfolded = jnp.moveaxis(of, axis, 0).reshape(of.shape[axis], -1)
        return jnp.linalg.svd(unfolded, full_matrices=False)[0][:, : ranks[axis]]

    def projected(onto: Sequence[Array], but: int | None = None) -> Array:
        found = tensor
        for axis, factor in enumerate(onto):
            if axis != but:
                found = jnp.moveaxis(jnp.tensordot(factor.T, found, (1, axis)), 0, axis)
        return found

    def improved(_: Any, given: tuple[Array, ...]) -> tuple[Array, ...]:
        factors = list(given)
        for axis in range(3):
            factors[axis] = basis(projected(factors, axis), axis)
        return tuple(factors)

    factors = tuple(basis(tensor, axis) for axis in range(3))
    if steps > 0:
        # A rank above the product of the two others falls to it in the first round. The others are
        # a loop, since decompositions one after the other take minutes to compile.
        factors = jax.lax.fori_loop(1, steps, improved, improved(0, factors))
    return Tucker(projected(factors), *factors)


@checked
def laser(matrix: Float[Array, "p q"], rank: int) -> Array:
    """Returns the nearest matrix of a rank: the truncated SVD (LASER, 2312.13558).

    Args:
        matrix: Matrix (p, q).
        rank: Rank of the result.

    Raises:
        InputError: If the rank is below 1 or above the matrix's smaller side, or a number is not
            finite.
    """
    _check_finite("matrix", matrix)
    _check_rank("rank", rank, min(matrix.shape))
    u, s, vt = jnp.linalg.svd(jnp.asarray(matrix, jnp.float32), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _shape(tensor: Any) -> tuple[int, int, int]:
    if tensor.ndim != 3:
        raise InputError(f"a tensor to decompose must have three axes, got shape {tensor.shape}")
    _check_finite("tensor", tensor)
    return tensor.shape


def _check_finite(what: str, numbers_: Any) -> None:
    if not np.size(numbers_):
        raise InputError(f"{what} must have numbers to decompose, got shape {np.shape(numbers_)}")
    tree.check_finite(what, numbers_, "check where it comes from")


def _check_rank(what: str, rank: int, most: int) -> None:
    known = isinstance(rank, numbers.Integral | jax.Array) and not isinstance(rank, bool)
    if not known or not 1 <= rank <= most:
        raise InputError(f"{what} must be an integer between 1 and {most}, got {rank!r}")


@checked
def stacked(params: PyTree, stack: Stack) -> Array:
    """Returns the tensor of some kernels, float32.

    Args:
        params: Parameters.
        stack: Names of the kernels, and whether each is transposed.

    Raises:
        InputError: If there is no name or an unknown one, or the shapes differ.
    """
    leaves = _matrices(params, stack)
    slices = [leaves[name].T if turned else leaves[name] for name, turned in stack.items()]
    shapes = {name: one.shape for name, one in zip(stack, slices, strict=True)}
    if len(set(shapes.values())) != 1:
        raise InputError(
            f"matrices of one tensor must have one shape, got {shapes}; with grouped queries, "
            "stack query and output alone"
        )
    return jnp.stack([one.astype(jnp.float32) for one in slices])


def _matrices(params: PyTree, stack: Stack) -> dict[str, Array]:
    """Returns the parameters by name, all names of the stack among them as matrices."""
    if not stack:
        raise InputError("stack must name at least one kernel, got none")
    leaves = dict(tree.named_leaves(params))
    for name in stack:
        if getattr(leaves.get(name), "ndim", 0) != 2:
            raise InputError(f"{name!r} is not a matrix of the parameters; correct the names")
    return leaves


@checked
def written(params: PyTree, stack: Stack, tensor: Float[Array, "m p q"]) -> PyTree:
    """Returns the parameters with the slices of a tensor in place of kernels, in their dtypes.

    Args:
        params: Parameters.
        stack: Names of the kernels, and whether each is transposed, as for `stacked`.
        tensor: A slice for each kernel.

    Raises:
        InputError: If there is no name or an unknown one, or a slice has not its kernel's shape.
    """
    leaves = _matrices(params, stack)
    for name, turned in stack.items():
        shape = leaves[name].shape[:: -1 if turned else 1]
        if tensor.shape != (len(stack), *shape):
            raise InputError(
                f"tensor must have shape {(len(stack), *shape)}, a slice for each kernel such as "
                f"{name!r}, got {tensor.shape}"
            )
    slices = dict(zip(stack, tensor, strict=True))

    def leaf(name: str, value: Any) -> Any:
        if name not in slices:
            return value
        new = slices[name].T if stack[name] else slices[name]
        return new.astype(value.dtype)

    return tree.map_leaves(leaf, params)


METHODS: Mapping[str, Callable[[Array, int], Array]] = {
    "cp": lambda tensor, rank: cp(tensor, rank).dense(),
    "tucker": lambda tensor, rank: tucker(tensor, (len(tensor), rank, rank)).dense(),
    "laser": lambda tensor, rank: jnp.stack([laser(one, rank) for one in tensor]),
}
"""Approximations of a tensor (m, p, q) by rank. Tucker's first rank is m, as upstream."""


class Tried(NamedTuple):
    """One approximation and what the model lost under it.

    Attributes:
        method: Name in `METHODS`.
        stack: Name of the stack.
        rank: Rank.
        error: Relative error of the tensor, ||T - T'|| / ||T||.
        loss: Loss on the part of the text that selects.
    """

    method: str
    stack: str
    rank: int
    error: float
    loss: float


@checked
def search(
    params: PyTree,
    stacks: Mapping[str, Stack],
    ranks: Sequence[int],
    loss: Callable[[PyTree], Any],
    methods: Sequence[str] = tuple(METHODS),
) -> Iterator[Tried]:
    """Returns an iterator: every method, stack and rank, tried on the parameters as they came.

    The best of many by one text is better on it by chance alone, so what the best one gains must be
    measured on other text.

    Args:
        params: Parameters.
        stacks: Kernels of each tensor by a name for it.
        ranks: Ranks to try.
        loss: Function from parameters to the loss on the text that selects.
        methods: Names in `METHODS`.

    Raises:
        InputError: If there is nothing to try, a method is unknown, a rank is out of range, or a
            stack does not fit; before anything is tried.
    """
    if not stacks or not ranks or not methods:
        raise InputError(
            f"search needs stacks, ranks and methods to try, got {len(stacks)}, {len(ranks)} and "
            f"{len(methods)}"
        )
    for method in methods:
        check_choice(method, METHODS, "method")
    for stack in stacks.values():
        m, p, q = stacked(params, stack).shape
        most = min(min(m * p, m * q, p * q) if one == "cp" else min(p, q) for one in methods)
        for rank in ranks:
            _check_rank("rank", rank, most)
    return _searched(params, stacks, ranks, loss, methods)


def _searched(
    params: PyTree,
    stacks: Mapping[str, Stack],
    ranks: Sequence[int],
    loss: Callable[[PyTree], Any],
    methods: Sequence[str],
) -> Iterator[Tried]:
    for name, stack in stacks.items():
        tensor = stacked(params, stack)
        norm = jnp.maximum(jnp.linalg.norm(tensor), jnp.finfo(tensor.dtype).tiny)
        for method in methods:
            for rank in ranks:
                near = METHODS[method](tensor, rank)
                error = float(jnp.linalg.norm(tensor - near) / norm)
                yield Tried(method, name, rank, error, float(loss(written(params, stack, near))))


@checked
def stacks_of(params: PyTree, layers: int) -> dict[str, Stack]:
    """Returns the stacks of `models.gpt`'s layers: attention and MLP of each, by name.

    Attention is query, key, value and the transposed output kernel where they have one shape; an
    MLP is up, gate if it has one, and the transposed down kernel.

    Args:
        params: Parameters.
        layers: Number of layers.

    Raises:
        InputError: If there is no such number of layers.
    """
    leaves = dict(tree.named_leaves(params))
    blocks = {name.split("/")[0] for name in leaves if name.startswith("block_")}
    if not 1 <= layers <= len(blocks):
        raise InputError(
            f"layers must be between 1 and the {len(blocks)} of params, got {layers}; params must "
            "be those of a models.gpt without scanned layers"
        )
    found: dict[str, Stack] = {}
    for layer in range(layers):
        for part, names in (
            ("attention", {"query": False, "key": False, "value": False, "out": True}),
            ("mlp", {"up": False, "gate": False, "down": True}),
        ):
            stack = {
                f"block_{layer}/{part}/{name}/kernel": turned
                for name, turned in names.items()
                if f"block_{layer}/{part}/{name}/kernel" in leaves
            }
            shapes = {
                tuple(np.shape(leaves[name])[:: -1 if turned else 1])
                for name, turned in stack.items()
            }
            if len(shapes) == 1:
                found[f"{part} of layer {layer}"] = stack
    return found
