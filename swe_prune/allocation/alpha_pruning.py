"""AlphaPruning: a matrix with a heavier tail of eigenvalues is better trained and keeps more.

Lu, Zhou, Liu, Wang, Mahoney and Yang, "AlphaPruning: using heavy-tailed self regularization theory
for improved layer-wise pruning of large language models", NeurIPS 2024. It reads the weights alone.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.allocation import rounding
from swe_prune.allocation.groups import Groups, chosen, grouped
from swe_prune.allocation.rounding import Allocation
from swe_prune.errors import InputError


def alpha_pruning(
    params: PyTree,
    sparsity: float,
    *,
    epsilon: float = 0.3,
    tail: float = 0.5,
    groups: Groups = "block",
    prunable: PyTree | None = None,
    input_axes: Callable[[str, tuple[int, ...]], tuple[int, ...]] = tree.input_axes,
) -> Allocation:
    """Returns AlphaPruning's allocation: sparsity rises linearly with the tail exponent α.

    x_g = 1 − epsilon + 2 epsilon (α_g − min α) / (max α − min α), and s_g = min(1, η x_g) with η
    such that the total is exact; α_g is the mean of `hill_alpha` over the tensors of group g. A
    light tail, a large α, is read as less trained and pruned more. All alphas equal: uniform.

    Args:
        params: pytree of weights.
        sparsity: share to remove of all the prunable weights, in [0, 1).
        epsilon: half the spread of the sparsities relative to their middle, in [0, 1).
        tail: share of a matrix's eigenvalues that the exponent is fitted to, in (0, 1].
        groups: which tensors share a sparsity; see `grouped`.
        prunable: bool pytree; None: `tree.prunable(params)`.
        input_axes: along which axes the inputs of a kernel run; the default knows Flax.

    Raises:
        InputError: a number out of its range, groups that do not cover the tensors, or a weight
            whose exponent is undefined (see `tail_exponents`).
    """
    rounding.check_sparsity(sparsity)
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon = {epsilon} is not in [0, 1); give a spread such as 0.3")
    sizes = {name: tree.size(leaf) for name, leaf in chosen(params, prunable).items()}
    members = grouped(sizes, groups)
    alphas = tail_exponents(params, tail=tail, prunable=prunable, input_axes=input_axes)
    of_groups = [math.fsum(alphas[n] for n in names) / len(names) for names in members.values()]
    whole = [sum(sizes[name] for name in names) for names in members.values()]
    shares, _ = rounding.scale_to_total(
        alpha_shares(of_groups, epsilon), whole, rounding.removed_count(sum(whole), sparsity)
    )
    return rounding.shift_groups_to_total(shares, members, sizes, sparsity)


def alpha_shares(alphas: list[float], epsilon: float = 0.3) -> list[float]:
    """Returns how much more or less than the middle each group loses, within 1 ± epsilon.

    >>> alpha_shares([2.0, 3.0, 6.0], 0.5)
    [0.5, 0.75, 1.5]
    """
    low, width = min(alphas), max(alphas) - min(alphas)
    if width == 0:
        return [1.0] * len(alphas)
    return [1 - epsilon + 2 * epsilon * (alpha - low) / width for alpha in alphas]


def hill_alpha(eigenvalues: Float[np.ndarray, " n"], k: int) -> float:
    """Returns Hill's estimate of the exponent of a power law, from the k largest eigenvalues.

    α = 1 + k / Σ_{i=1..k} ln(λ_{n−i+1} / λ_{n−k+1}), λ in ascending order: the smallest of the k is
    the start of the tail, and counts as one of them.

    Args:
        eigenvalues: of one matrix, in any order.
        k: how many of the largest, 2 ≤ k ≤ n.

    Raises:
        InputError: k out of range, or k largest that are not positive or all equal, whose tail has
            no exponent.

    >>> round(hill_alpha(np.array([1.0, 2.0, 4.0, 8.0]), 3), 6)
    2.442695
    """
    if not 2 <= k <= len(eigenvalues):
        raise InputError(
            f"a tail of {k} of {len(eigenvalues)} eigenvalues has no exponent; give 2 or more"
        )
    largest = np.sort(np.asarray(eigenvalues, np.float64))[-k:]
    spread = float(np.log(largest / largest[0]).sum()) if largest[0] > 0 else 0.0
    if not 0 < spread < math.inf:
        raise InputError(
            f"the {k} largest eigenvalues run from {largest[0]:g} to {largest[-1]:g}, a tail "
            "without an exponent; they must be positive, finite and not all equal"
        )
    return 1 + k / spread


def tail_exponents(
    params: PyTree,
    *,
    tail: float = 0.5,
    prunable: PyTree | None = None,
    input_axes: Callable[[str, tuple[int, ...]], tuple[int, ...]] = tree.input_axes,
) -> dict[str, float]:
    """Returns the tail exponent α of the eigenvalues of WᵀW of every prunable tensor.

    The share `tail` of the eigenvalues, rounded up, is the tail; those that float32 cannot tell
    from 0 are left out first, as a matrix of low rank has them.

    The smaller of WᵀW and WWᵀ is formed on the device in float32, by a product that is divided
    over the devices along its sum; that square matrix alone is gathered, and its eigenvalues are
    found on the host in float64. It takes O(small² · large) operations there and O(small³) here.

    Args:
        params: pytree of weights; one of more than two axes is a matrix of inputs by outputs (the
            reference takes a convolution's positions as matrices of their own).
        tail: share of the eigenvalues, in (0, 1].
        prunable: bool pytree; None: `tree.prunable(params)`.
        input_axes: along which axes the inputs of a kernel run.

    Raises:
        InputError: tail out of range, or a weight that is not finite, zero, or too small for a
            tail, which has at least two eigenvalues.
    """
    if not 0 < tail <= 1:
        raise InputError(f"tail = {tail} is not in (0, 1]; give a share such as 0.5")
    exponents = {}
    for name, weight in chosen(params, prunable).items():
        axes = tuple(input_axes(name, weight.shape))
        sharding = _mesh_sharding(weight)
        matrix_LxS = _matrix(weight, axes, sharding.mesh.size if sharding else 1)
        gram_SxS = np.asarray(_gram(matrix_LxS, sharding), np.float64)
        if not np.isfinite(gram_SxS).all():
            raise InputError(
                f"{name!r} has weights that are not finite, or squares that overflow; find out "
                "where the training diverged"
            )
        values = np.linalg.eigvalsh(gram_SxS)
        least = values.max(initial=0.0) * len(values) * np.finfo(np.float32).eps
        distinct = values[values > least]
        try:
            exponents[name] = hill_alpha(distinct, math.ceil(tail * len(distinct)))
        except InputError as error:
            raise InputError(
                f"{name!r} has no tail exponent: {error}; leave it out by prunable= or allocate by "
                "another rule"
            ) from error
    return exponents


def _matrix_traced(weight: Array, axes: tuple[int, ...], multiple: int) -> Float[Array, "L S"]:
    """Returns the weight as a matrix, its long side first and filled up with zeros."""
    others = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    rows = math.prod(weight.shape[axis] for axis in axes)
    matrix_RxC = weight.astype(jnp.float32).transpose(*axes, *others).reshape(rows, -1)
    matrix_LxS = matrix_RxC if matrix_RxC.shape[0] >= matrix_RxC.shape[1] else matrix_RxC.T
    return jnp.pad(matrix_LxS, ((0, -matrix_LxS.shape[0] % multiple), (0, 0)))


def _gram_traced(
    matrix_LxS: Float[Array, "L S"], sharding: NamedSharding | None
) -> Float[Array, "S S"]:
    if sharding is not None:
        # Divided along the sum, a product needs no more of a weight than its part.
        matrix_LxS = jax.lax.with_sharding_constraint(matrix_LxS, sharding)
    gram_SxS = jnp.matmul(matrix_LxS.T, matrix_LxS, precision=jax.lax.Precision.HIGHEST)
    if sharding is not None:
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        gram_SxS = jax.lax.with_sharding_constraint(gram_SxS, whole)
    return gram_SxS


# Two programs: in one, the partitioner gathers a weight that has to be filled up.
_matrix = jax.jit(_matrix_traced, static_argnums=(1, 2))
_gram = jax.jit(_gram_traced, static_argnums=1)


def _mesh_sharding(weight: Any) -> NamedSharding | None:
    """Returns the first axis over all the devices of the weight's mesh; None: it has no mesh."""
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    names = sharding.mesh.axis_names
    return NamedSharding(sharding.mesh, PartitionSpec(names))  # type: ignore[arg-type]
