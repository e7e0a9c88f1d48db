"""AlphaPruning: matrices with heavier-tailed eigenvalues are better trained and pruned less.

Lu, Zhou, Liu, Wang, Mahoney and Yang, "AlphaPruning: using heavy-tailed self regularization theory
for improved layer-wise pruning of large language models", NeurIPS 2024. It uses only the weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.allocation import rounding
from swe_prune.allocation.groups import Groups, grouped
from swe_prune.allocation.rounding import Allocation
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.layout import InputAxes, axes_of


@checked
def alpha_pruning(
    params: PyTree,
    sparsity: float,
    *,
    epsilon: float = 0.3,
    tail: float = 0.5,
    groups: Groups = "block",
    prunable: PyTree | None = None,
    input_axes: InputAxes | None = None,
) -> Allocation:
    """Returns AlphaPruning's allocation: sparsity rises linearly with the tail exponent α.

    x_g = 1 − epsilon + 2 epsilon (α_g − min α) / (max α − min α), and s_g = min(1, η x_g) with η
    such that the total is exact; α_g is the mean of `hill_alpha` over the tensors of group g. A
    light tail, that is a large α, indicates less training and is pruned more. If all alphas are
    equal, the allocation is uniform.

    Args:
        params: Pytree of weights.
        sparsity: Fraction of all the prunable weights to remove, in [0, 1).
        epsilon: Half the spread of the sparsities relative to their middle, in [0, 1).
        tail: Fraction of a matrix's eigenvalues to fit the exponent to, in (0, 1].
        groups: Grouping of the tensors that share a sparsity; see `grouped`.
        prunable: Bool pytree like `params`. If None, `tree.prunable(params)`.
        input_axes: Function from a tensor's name and shape to its input axes; the default follows
            Flax's conventions.

    Raises:
        InputError: If a number is out of range, the groups do not cover the tensors, or the
            exponent of a weight is undefined (see `tail_exponents`).
    """
    rounding.check_sparsity(sparsity)
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon must be in [0, 1), such as 0.3, got {epsilon}")
    sizes = {
        name: tree.size(leaf)
        for name, leaf in tree.prunable_leaves(params, prunable, "allocate").items()
    }
    # A tensor without weights has no exponent, and nothing of it can be removed.
    members = grouped([name for name, size in sizes.items() if size], groups)
    alphas = tail_exponents(params, tail=tail, prunable=prunable, input_axes=input_axes)
    # Average the exponents of each group, then scale the group sparsities to the total.
    of_groups = [math.fsum(alphas[n] for n in names) / len(names) for names in members.values()]
    whole = [sum(sizes[name] for name in names) for names in members.values()]
    shares, _ = rounding.scale_to_total(
        alpha_shares(of_groups, epsilon), whole, rounding.removed_count(sum(whole), sparsity)
    )
    return rounding.shift_groups_to_total(shares, members, sizes, sparsity)


@checked
def alpha_shares(alphas: list[float], epsilon: float = 0.3) -> list[float]:
    """Returns the relative sparsity of each group, within 1 ± epsilon.

    >>> alpha_shares([2.0, 3.0, 6.0], 0.5)
    [0.5, 0.75, 1.5]
    """
    if not len(alphas):
        raise InputError("alphas must have at least one exponent, got none")
    low, width = min(alphas), max(alphas) - min(alphas)
    if width == 0:
        return [1.0] * len(alphas)
    return [1 - epsilon + 2 * epsilon * (alpha - low) / width for alpha in alphas]


@checked
def hill_alpha(eigenvalues: Float[np.ndarray, " n"], k: int) -> float:
    """Returns Hill's estimate of the exponent of a power law, from the k largest eigenvalues.

    α = 1 + k / Σ_{i=1..k} ln(λ_{n−i+1} / λ_{n−k+1}), λ in ascending order. The smallest of the k
    eigenvalues is the start of the tail and counts as one of them.

    Args:
        eigenvalues: Eigenvalues of one matrix, in any order.
        k: Number of largest eigenvalues in the tail, 2 ≤ k ≤ n.

    Raises:
        InputError: If k is out of range, or the exponent is undefined because the k largest are
            not all positive or are all equal.

    >>> round(hill_alpha(np.array([1.0, 2.0, 4.0, 8.0]), 3), 6)
    2.442695
    """
    if not 2 <= k <= len(eigenvalues):
        raise InputError(
            f"a tail of {k} of {len(eigenvalues)} eigenvalues has no exponent; 2 or more are needed"
        )
    largest = np.sort(np.asarray(eigenvalues, np.float64))[-k:]
    spread = float(np.log(largest / largest[0]).sum()) if largest[0] > 0 else 0.0
    if not 0 < spread < math.inf:
        raise InputError(
            f"the {k} largest eigenvalues must be positive, finite and not all equal, got "
            f"{largest[0]:g} to {largest[-1]:g}, which have no exponent"
        )
    return 1 + k / spread


@checked
def tail_exponents(
    params: PyTree,
    *,
    tail: float = 0.5,
    prunable: PyTree | None = None,
    input_axes: InputAxes | None = None,
) -> dict[str, float]:
    """Returns the tail exponent α of the eigenvalues of WᵀW of every prunable tensor with weights.

    The tail is the fraction `tail` of the eigenvalues, rounded up. Eigenvalues that float32 cannot
    distinguish from 0, as in a matrix of low rank, are excluded first.

    The smaller of WᵀW and WWᵀ is computed on the device in float32, by a product that is sharded
    over the devices along the contracted axis. Only that square matrix is gathered, and its
    eigenvalues are computed on the host in float64. This takes O(small² · large) operations on the
    device and O(small³) on the host.

    Args:
        params: Pytree of weights. A weight with more than two axes is treated as a matrix of inputs
            by outputs (the reference treats a convolution's positions as separate matrices).
        tail: Fraction of the eigenvalues in the tail, in (0, 1].
        prunable: Bool pytree like `params`. If None, `tree.prunable(params)`.
        input_axes: Function from a tensor's name and shape to its input axes.

    Raises:
        InputError: If `tail` is out of range, or a weight is not finite, is zero, or has fewer
            than two eigenvalues in the tail.
    """
    if not 0 < tail <= 1:
        raise InputError(f"tail must be in (0, 1], such as 0.5, got {tail}")
    exponents = {}
    for name, weight in tree.prunable_leaves(params, prunable, "allocate").items():
        if not weight.size:
            continue
        # Compute the smaller Gram matrix on the device, and its eigenvalues on the host.
        # A matrix has the eigenvalues of its transpose, so its orientation does not matter.
        plain = weight.ndim == 2 and input_axes is None
        axes = (0,) if plain else axes_of(None, input_axes)(name, weight.shape).inputs
        sharding = _mesh_sharding(weight)
        matrix_LxS = _matrix(weight, axes, sharding.mesh.size if sharding else 1)
        gram_SxS = np.asarray(_gram(matrix_LxS, sharding), np.float64)
        if not np.isfinite(gram_SxS).all():
            raise InputError(
                f"{name!r} has weights that are not finite or whose squares overflow; find out "
                "where the training diverged"
            )
        values = np.linalg.eigvalsh(gram_SxS)
        # Exclude eigenvalues that are 0 within the precision of float32.
        least = values.max(initial=0.0) * len(values) * np.finfo(np.float32).eps
        distinct = values[values > least]
        try:
            exponents[name] = hill_alpha(distinct, math.ceil(tail * len(distinct)))
        except InputError as error:
            raise InputError(
                f"{name!r} has no tail exponent: {error}; exclude it with prunable= or use another "
                "rule"
            ) from error
    return exponents


def _matrix_traced(weight: Array, axes: tuple[int, ...], multiple: int) -> Float[Array, "L S"]:
    """Returns the weight as a matrix, with the long side first and padded with zeros."""
    others = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    rows = math.prod(weight.shape[axis] for axis in axes)
    matrix_RxC = weight.astype(jnp.float32).transpose(*axes, *others).reshape(rows, -1)
    matrix_LxS = matrix_RxC if matrix_RxC.shape[0] >= matrix_RxC.shape[1] else matrix_RxC.T
    return jnp.pad(matrix_LxS, ((0, -matrix_LxS.shape[0] % multiple), (0, 0)))


def _gram_traced(
    matrix_LxS: Float[Array, "L S"], sharding: NamedSharding | None
) -> Float[Array, "S S"]:
    if sharding is not None:
        # Sharded along the contracted axis, the product needs only the local shard of the weight.
        matrix_LxS = jax.lax.with_sharding_constraint(matrix_LxS, sharding)
    gram_SxS = jnp.matmul(matrix_LxS.T, matrix_LxS, precision=jax.lax.Precision.HIGHEST)
    if sharding is not None:
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        gram_SxS = jax.lax.with_sharding_constraint(gram_SxS, whole)
    return gram_SxS


# Two programs, because in a single one the partitioner gathers a weight that is padded.
_matrix = jax.jit(_matrix_traced, static_argnums=(1, 2))
_gram = jax.jit(_gram_traced, static_argnums=1)


def _mesh_sharding(weight: Any) -> NamedSharding | None:
    """Returns a sharding of the first axis over the weight's mesh, or None if it has no mesh."""
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    names = sharding.mesh.axis_names
    return NamedSharding(sharding.mesh, PartitionSpec(names))  # type: ignore[arg-type]
