"""Mutual information of units from samples, by the matrix-based Rényi entropy.

With K the Gram matrix of a Gaussian kernel over N samples and A = K / N,

    K_ij = exp(−‖x_i − x_j‖² / 2σ²),   S_α(A) = log₂(Σ λ_i(A)^α) / (1 − α)    in bits, 0 to log₂ N,
    S_α(A, B) = S_α(A ∘ B / tr(A ∘ B)),   I_α(A; B) = S_α(A) + S_α(B) − S_α(A, B).

Source: Sánchez Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible
kernels", IEEE Trans. Inf. Theory 2015; for the neurons of language models Huang, Song and Pao,
arXiv 2406.00030.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from swe_prune import tree
from swe_prune.errors import InputError

TILE_VALUES = 1 << 25
"""Kernel values in a tile of units, 128 MiB of float32."""


def gram_matrix(x: Float[Array, "N ..."], width: float) -> Float[Array, "N N"]:
    """Returns the Gram matrix of a Gaussian kernel over samples, each a number or a vector.

    Args:
        x: Samples.
        width: Standard deviation σ of the kernel, positive.

    Raises:
        InputError: Fewer than two samples, or a width that is not positive.

    >>> float(gram_matrix(jnp.array([0.0, 1.0]), 1.0)[0, 0])
    1.0
    """
    x_NxD = jnp.reshape(x, (len(x), -1))
    check_samples(x_NxD)
    if not isinstance(width, Tracer) and not float(width) > 0:
        raise InputError(f"the kernel width must be positive, got {width}")
    return jnp.exp(-jnp.sum((x_NxD[:, None] - x_NxD[None]) ** 2, -1) / (2 * width**2))


def entropy(kernel_NxN: Float[Array, "N N"], alpha: float = 2.0) -> Float[Array, ""]:
    """Returns S_α of a Gram matrix in bits, from 0 (all samples equal) to log₂ N (all apart).

    Args:
        kernel_NxN: Gram matrix of ones on the diagonal, symmetric and positive semi-definite.
        alpha: Order of the entropy, positive. 2 needs no eigenvalues, 1 is the limit of Shannon.

    Raises:
        InputError: An order that is not positive.

    >>> float(entropy(jnp.eye(4))), float(entropy(jnp.ones((4, 4))))
    (2.0, -0.0)
    """
    if not alpha > 0:
        raise InputError(f"alpha, the order of the entropy, must be positive, got {alpha}")
    density_NxN = kernel_NxN / jnp.trace(kernel_NxN)
    if alpha == 2:
        return -jnp.log2(jnp.sum(density_NxN**2))
    # Rounding leaves some eigenvalues below 0.
    eigen_N = jnp.maximum(jnp.linalg.eigvalsh((density_NxN + density_NxN.T) / 2), 0)
    if alpha == 1:
        return -jnp.sum(jnp.where(eigen_N > 0, eigen_N * jnp.log2(jnp.maximum(eigen_N, 1e-37)), 0))
    return jnp.log2(jnp.sum(eigen_N**alpha)) / (1 - alpha)


def mutual_information(
    x: Float[Array, "N ..."],
    y: Float[Array, "N ..."],
    width_x: float,
    width_y: float,
    alpha: float = 1.01,
) -> Float[Array, ""]:
    """Returns I_α(x; y) in bits of two variables sampled together.

    Args:
        x: Samples of one variable.
        y: Samples of the other.
        width_x: Kernel width of x.
        width_y: Kernel width of y.
        alpha: Order of the entropies; 1.01 stands for Shannon's in this literature.

    Raises:
        InputError: Fewer than two samples, different numbers of them, or a width or an order that
            is not positive.

    >>> x, y = jnp.array([0.0, 1, 2, 3]), jnp.array([0.0, 1, 0, 1])
    >>> round(float(mutual_information(x, y, 1.0, 1.0, alpha=2)), 4)
    0.1856
    """
    if len(x) != len(y):
        raise InputError(f"x and y must be sampled together, got {len(x)} and {len(y)} samples")
    kernel_x, kernel_y = gram_matrix(x, width_x), gram_matrix(y, width_y)
    separate = entropy(kernel_x, alpha) + entropy(kernel_y, alpha)
    return separate - entropy(kernel_x * kernel_y, alpha)


def pairwise(
    samples_NxF: Float[Any, "N F"],
    widths_F: Float[Any, " F"],
    tile: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[np.ndarray, "F F"], Float[np.ndarray, " F"]]:
    """Returns I₂ of all pairs of units, and S₂ of each unit, in bits.

    With α = 2 all that two units share is Σ_ij (K_k K_l)_ij², so a matrix product gives all pairs.
    Tiles of it are computed at a time: in memory are the result, F² float32 numbers, and two tiles
    of 128 MiB.

    Args:
        samples_NxF: Samples of F units.
        widths_F: Kernel width of each unit, positive.
        tile: Number of units in a tile; None for as many as 128 MiB hold.
        progress: Called with the numbers of tiles that are done and of all.

    Raises:
        InputError: Fewer than two samples, or a width that is not positive.
    """
    samples_NxF = check_samples(samples_NxF)
    samples, units = samples_NxF.shape
    widths_F = np.broadcast_to(np.asarray(widths_F, np.float32), units)
    if not (widths_F > 0).all():
        raise InputError("every kernel width must be positive; see kernel_width.widths")
    if tile is None:
        tile = max(16, TILE_VALUES // (samples * (samples - 1) // 2))
    edges = np.linspace(0, units, -(-units // tile) + 1).astype(int)
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    bits_FxF = np.empty((units, units), np.float32)
    done = 0
    for at, rows in enumerate(spans):
        rows_TxP = _squares(samples_NxF[:, rows], widths_F[rows])
        for columns in spans[at:]:
            columns_TxP = rows_TxP
            if columns != rows:
                columns_TxP = _squares(samples_NxF[:, columns], widths_F[columns])
            joint_TxT = np.asarray(_joint(rows_TxP, columns_TxP, samples))
            bits_FxF[rows, columns] = joint_TxT
            bits_FxF[columns, rows] = joint_TxT.T
            done += 1
            if progress is not None:
                progress(done, len(spans) * (len(spans) + 1) // 2)
    # The joint entropies become mutual information in place.
    entropy_F = entropies(samples_NxF, widths_F)
    for rows in spans:
        bits_FxF[rows] = entropy_F[rows, None] + entropy_F[None] - bits_FxF[rows]
    return np.maximum(bits_FxF, 0, out=bits_FxF), entropy_F


def entropies(
    samples_NxF: Float[Any, "N F"], widths_F: Float[Any, " F"]
) -> Float[np.ndarray, " F"]:
    """Returns S₂ of each unit in bits."""
    return np.asarray(_entropies(jnp.asarray(samples_NxF), jnp.asarray(widths_F)))


@jax.jit
def _entropies(samples_NxF: Array, widths_F: Array) -> Array:
    samples = len(samples_NxF)

    def one(given: tuple[Array, Array]) -> Array:
        squares_1xP = _squares(given[0][:, None], given[1][None])
        return 2 * math.log2(samples) - jnp.log2(samples + 2 * squares_1xP.sum())

    return jax.lax.map(one, (samples_NxF.T, widths_F), batch_size=16)


@jax.jit
def _squares(samples_NxT: Array, widths_T: Array) -> Array:
    """Returns the squared kernel values of each unit, of each pair of samples once."""
    first_P, second_P = np.triu_indices(len(samples_NxT), 1)
    apart_TxP = (samples_NxT[first_P] - samples_NxT[second_P]).T / widths_T[:, None]
    return jnp.exp(-(apart_TxP**2))


@functools.partial(jax.jit, static_argnums=2)
def _joint(rows_TxP: Array, columns_TxP: Array, samples: int) -> Array:
    """Returns the joint entropies of the units of two tiles."""
    shared_TxT = jnp.matmul(rows_TxP, columns_TxP.T, precision=jax.lax.Precision.HIGHEST)
    return -jnp.log2((2 * shared_TxT + samples) / samples**2)


def check_samples(samples: Any) -> Float[Array, "N F"]:
    """Returns samples as float32.

    Raises:
        InputError: They are not N x F with two samples or more, or have NaN or inf.
    """
    if samples.ndim != 2 or len(samples) < 2:
        raise InputError(
            "samples must be two or more rows of one value a unit, since a kernel compares pairs "
            f"of them, got shape {tuple(samples.shape)}; calibrate on more tokens"
        )
    samples_NxF = jnp.asarray(samples, jnp.float32)
    fix = "find the batch or the weight that causes it"
    tree.check_finite("the array of samples", samples_NxF, fix)
    return samples_NxF
