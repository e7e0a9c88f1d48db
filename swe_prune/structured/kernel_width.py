"""The width of the kernel that compares a unit's samples, by one of several rules.

A width near 0 tells all samples apart: every entropy and mutual information is log₂ N, every pair
"redundant". A wide one tells none apart, and all are 0. So the mean entropy belongs beside every
result.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from swe_prune.errors import InputError, check_choice
from swe_prune.structured.mutual_information import check_samples, entropies, gram_matrix

RULES = ("alignment_unsupervised", "alignment", "median", "knn", "silverman", "entropy")
SATURATED = 0.1
"""Share of log₂ N next to either end where an entropy says little."""
COARSE = 16
FINE = 7
PAIRS = 8192
"""Pairs of samples at most that an alignment is computed from, evenly spaced."""
CHUNK = 64
"""Units whose distances are in memory together."""


def standardized(samples_NxF: Float[Any, "N F"]) -> Float[Array, "N F"]:
    """Returns the samples with mean 0 and standard deviation 1 of each unit, 0 if it is constant.

    Raises:
        InputError: Fewer than two samples, or every unit is constant over them.
    """
    samples_NxF = check_samples(samples_NxF)
    centred_NxF = samples_NxF - samples_NxF.mean(0)
    spread_F = jnp.where(jnp.ptp(samples_NxF, axis=0) > 0, jnp.std(centred_NxF, axis=0), 0)
    if not bool(jnp.any(spread_F > 0)):
        raise InputError(
            f"all {len(samples_NxF)} samples are equal, so no unit can be told from another; "
            "calibrate on tokens that differ"
        )
    return jnp.where(spread_F > 0, centred_NxF / jnp.where(spread_F > 0, spread_F, 1), 0)


def widths(
    samples_NxF: Float[Any, "N F"],
    rule: str = "alignment_unsupervised",
    *,
    reference: Float[Any, "N D"] | None = None,
    previous: Float[Any, " F"] | None = None,
    beta: float = 0.5,
    nearest: int = 25,
    gamma: float = 0.8,
    grid: int = 300,
) -> Float[np.ndarray, " F"]:
    """Returns the kernel width of each unit, positive, for samples from `standardized`.

    "median": the median distance of two samples. "knn": the mean distance from a sample to its
    `nearest` neighbours, itself among them (Wickstrøm et al., arXiv 1909.11396). "silverman":
    γ N^(−1/5). "alignment": of `grid` widths from 0.1 to 10 times the mean distance the one that
    maximizes ⟨K, K_ref⟩ / ‖K‖ ‖K_ref‖, where K_ref is the Gram matrix of `reference`, such as
    labels (the IPDL library). "alignment_unsupervised": the same with the outputs of the layer as
    reference. "entropy": one width for all units, with which S₂ is half of log₂ N on average.

    An alignment often takes a width that tells next to nothing apart, or everything, since K_ref is
    large between all samples. Where it is best at an end of the grid, or S₂ is within a tenth of 0
    or log₂ N, the unit takes the median; where the median is 0, the mean distance. A constant unit
    has width 1.

    Args:
        samples_NxF: Samples of F units.
        rule: One of `RULES`.
        reference: Samples of what the alignment is to, together with the units.
        previous: Widths of an earlier sample, of which `1 − beta` remains in the result.
        beta: Weight of this sample against the previous widths.
        nearest: Number of neighbours of "knn", with the sample itself.
        gamma: Factor of "silverman".
        grid: Number of widths that an alignment is chosen from.

    Raises:
        InputError: Unknown rule, fewer than two samples, more neighbours than samples, or an
            alignment without a reference.
    """
    check_choice(rule, RULES, "width")
    samples_NxF = check_samples(samples_NxF)
    samples, units = samples_NxF.shape
    kernel_NxN = _reference_kernel(rule, reference, samples) if "alignment" in rule else None
    if not 2 <= nearest <= samples and rule == "knn":
        raise InputError(f"nearest must be 2 to {samples}, the number of samples, got {nearest}")
    if rule == "silverman":
        found_F = np.full(units, gamma * samples ** (-1 / 5), np.float32)
    elif rule == "entropy":
        found_F = np.full(units, _half_entropy(samples_NxF), np.float32)
    elif rule == "median":
        found_F = _medians(samples_NxF)
    elif rule == "knn":
        found_F = _or_median(np.asarray(_nearest(samples_NxF, nearest)), samples_NxF)
    else:
        assert kernel_NxN is not None
        found_F = np.array(_aligned(samples_NxF, kernel_NxN, grid))
        entropy_F = entropies(samples_NxF, np.where(found_F > 0, found_F, 1))
        found_F = _or_median(np.where(saturated(entropy_F, samples), 0, found_F), samples_NxF)
    return found_F if previous is None else beta * found_F + (1 - beta) * np.asarray(previous)


def saturated(entropy: Any, samples: int) -> Any:
    """Returns whether an entropy in bits is next to 0 or to its largest, log₂ of the samples."""
    share = entropy / math.log2(samples)
    return (share < SATURATED) | (share > 1 - SATURATED)


def _reference_kernel(rule: str, reference: Any, samples: int) -> Array:
    if reference is None:
        what = "outputs of the layer" if rule == "alignment_unsupervised" else "labels"
        raise InputError(f"width rule {rule!r} needs reference=, samples of the {what}")
    if len(reference) != samples:
        raise InputError(
            f"reference= must hold {samples} samples as the units, got {len(reference)}"
        )
    reference_NxD = jnp.reshape(jnp.asarray(reference, jnp.float32), (samples, -1))
    first, second = np.triu_indices(samples, 1)
    apart_P = jnp.linalg.norm(reference_NxD[first] - reference_NxD[second], axis=-1)
    return gram_matrix(reference_NxD, float(_median(np.asarray(apart_P))))


def _median(apart: np.ndarray) -> np.ndarray:
    """Returns the median distance, or the mean where it is 0, or 1 where that is too."""
    median, mean = np.median(apart, axis=-1), np.mean(apart, axis=-1)
    return np.where(median > 0, median, np.where(mean > 0, mean, 1)).astype(np.float32)


def _medians(samples_NxF: Any) -> np.ndarray:
    samples_FxN = np.asarray(samples_NxF).T
    first_P, second_P = np.triu_indices(samples_FxN.shape[1], 1)
    return np.concatenate(
        [_median(np.abs(some[:, first_P] - some[:, second_P])) for some in _chunks(samples_FxN)]
    )


def _chunks(samples_FxN: np.ndarray) -> list[np.ndarray]:
    return np.array_split(samples_FxN, -(-len(samples_FxN) // CHUNK))


def _or_median(widths_F: np.ndarray, samples_NxF: Any) -> np.ndarray:
    """Returns the widths, the median of the distances where a width is 0."""
    none_F = widths_F == 0
    if none_F.any():
        widths_F = widths_F.copy()
        widths_F[none_F] = _medians(np.asarray(samples_NxF)[:, none_F])
    return widths_F


@functools.partial(jax.jit, static_argnums=1)
def _nearest(samples_NxF: Array, nearest: int) -> Array:
    def one(samples_N: Array) -> Array:
        # The nearest samples of a number are next to it in order.
        sorted_N = jnp.sort(samples_N)
        reach = nearest - 1
        padded = jnp.pad(sorted_N, reach, constant_values=jnp.inf)
        apart = jnp.abs(
            jnp.stack([padded[at : at + len(sorted_N)] for at in range(2 * reach + 1)]) - sorted_N
        )
        return -jax.lax.top_k(-apart.T, nearest)[0].mean()

    return jax.lax.map(one, samples_NxF.T, batch_size=16)


@functools.partial(jax.jit, static_argnums=2)
def _aligned(samples_NxF: Array, reference_NxN: Array, grid: int) -> Array:
    """Returns the width of the best alignment, or 0 where it is at an end of the grid."""
    samples = len(samples_NxF)
    first_P, second_P = np.triu_indices(samples, 1)
    if len(first_P) > PAIRS:
        chosen = np.linspace(0, len(first_P) - 1, PAIRS).round().astype(int)
        first_P, second_P = first_P[chosen], second_P[chosen]
    # Each pair stands for two entries of the matrix and for the pairs left out.
    each = samples * (samples - 1) / len(first_P)
    reference_P = reference_NxN[first_P, second_P]
    coarse = np.unique(np.geomspace(1, grid, min(COARSE, grid)).round().astype(int)) - 1

    def one(samples_N: Array) -> Array:
        square_P = (samples_N[first_P] - samples_N[second_P]) ** 2
        mean = jnp.mean(jnp.sqrt(square_P))

        def width(number: Array) -> Array:
            return 0.1 + number / max(grid - 1, 1) * (10 * mean - 0.1)

        def alignment(number: Array) -> Array:
            kernel_P = jnp.exp(square_P * (-0.5 / width(number) ** 2))
            shared = samples + each * jnp.dot(kernel_P, reference_P)
            return shared / jnp.sqrt(samples + each * jnp.dot(kernel_P, kernel_P))

        def best(numbers: Array) -> tuple[Array, Array]:
            at = jnp.argmax(jax.lax.map(alignment, numbers))
            return numbers[jnp.maximum(at - 1, 0)], numbers[jnp.minimum(at + 1, len(numbers) - 1)]

        # The alignment has one peak: look where it is on a coarse grid, then closer and closer.
        bracket = best(jnp.asarray(coarse))
        for _ in range(math.ceil(math.log(max(grid, 2), FINE // 2)) - 1):
            bracket = best(jnp.round(jnp.linspace(*bracket, FINE)).astype(int))
        numbers = jnp.stack([bracket[0], (bracket[0] + bracket[1]) // 2, bracket[1]])
        found = numbers[jnp.argmax(jax.lax.map(alignment, numbers))]
        inside = (found > 0) & (found < grid - 1) & (mean > 0)
        return jnp.where(inside, width(found), 0.0)

    return jax.lax.map(one, samples_NxF.T, batch_size=16)


def _half_entropy(samples_NxF: Array) -> float:
    """Returns the width of which the mean entropy is half of the largest, by bisection."""
    low, high = 1e-3, 1e2
    for _ in range(24):
        middle = math.sqrt(low * high)
        found = entropies(samples_NxF, jnp.full(samples_NxF.shape[1], middle)).mean()
        low, high = (middle, high) if found > 0.5 * math.log2(len(samples_NxF)) else (low, middle)
    return math.sqrt(low * high)
