"""Rényi entropies and kernel widths against float64 numpy and the check values of METHODS 17."""

import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.errors import InputError
from swe_prune.structured import kernel_width
from swe_prune.structured import mutual_information as mi

X, Y = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1])


def gram64(x, width):
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * width**2))


def entropy64(kernel, alpha):
    eigen = np.clip(np.linalg.eigvalsh(kernel / np.trace(kernel)), 0, None)
    return np.log2((eigen**alpha).sum()) / (1 - alpha)


@pytest.mark.parametrize(
    ("alpha", "values"),
    [
        (2, (1.349055, 0.548059, 1.711534, 0.185580, 0.965152)),
        (1.01, (1.551007, 0.713099, 1.843681, 0.420425, 1.256861)),
    ],
)
def test_check_values(alpha, values):
    kernel_x, kernel_y = mi.gram_matrix(jnp.array(X), 1.0), mi.gram_matrix(jnp.array(Y), 1.0)
    found = (
        mi.entropy(kernel_x, alpha),
        mi.entropy(kernel_y, alpha),
        mi.entropy(kernel_x * kernel_y, alpha),
        mi.mutual_information(X, Y, 1.0, 1.0, alpha),
        mi.mutual_information(X, X, 1.0, 1.0, alpha),
    )
    # For 1.01, a sum near 1 is divided by 0.01: 1e-7 becomes 1.4e-5 bits.
    np.testing.assert_allclose(found, values, atol=1e-6 if alpha == 2 else 6e-5)


@pytest.mark.parametrize("alpha", [0.5, 1, 1.01, 2, 3])
def test_limits(alpha):
    # Eigenvalues of 0 are 1e-8 in float32, whose square root counts for an order of 0.5.
    assert abs(float(mi.entropy(jnp.ones((4, 4)), alpha))) < (1e-3 if alpha < 1 else 1e-4)
    assert abs(float(mi.entropy(jnp.eye(4), alpha)) - 2) < 1e-4


def test_shannon_is_the_limit_of_order_1():
    kernel = mi.gram_matrix(X, 1.0)
    assert abs(float(mi.entropy(kernel, 1)) - entropy64(gram64(X, 1), 1 + 1e-7)) < 1e-5


SAMPLES = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32)
SAMPLES[:, 3] = SAMPLES[:, 2] * 2 + 1e-2 * SAMPLES[:, 4]
SAMPLES[:, 5] = 1.5
WIDTHS = np.linspace(0.4, 1.6, 7)


@pytest.mark.parametrize("tile", [None, 3])
def test_all_pairs_are_those_of_single_pairs_in_float64(tile):
    bits, entropies = mi.pairwise(SAMPLES, WIDTHS, tile)
    kernels = [gram64(SAMPLES[:, k], WIDTHS[k]) for k in range(7)]
    own = [entropy64(kernel, 2) for kernel in kernels]
    joint = [[entropy64(a * b, 2) for b in kernels] for a in kernels]
    wanted = np.add.outer(own, own) - joint
    np.testing.assert_allclose(entropies, own, atol=1e-5)
    np.testing.assert_allclose(bits, wanted, atol=1e-5)
    assert (bits == bits.T).all()
    assert bits[5].max() < 1e-5  # a constant tells nothing of anything


def distances64(samples_N):
    return np.abs(samples_N[:, None] - samples_N[None])[np.triu_indices(len(samples_N), 1)]


def alignment64(samples_N, reference, grid):
    apart = distances64(samples_N)
    median = np.median(distances64_of(reference))
    reference = gram64(reference, median)
    sigma = np.linspace(0.1, 10 * apart.mean(), grid)
    kernels = [gram64(samples_N, one) for one in sigma]
    best = np.argmax([(k * reference).sum() / np.linalg.norm(k) for k in kernels])
    tells = 0.1 < entropy64(kernels[best], 2) / np.log2(len(samples_N)) < 0.9
    return sigma[best] if 0 < best < grid - 1 and tells else np.median(apart)


def distances64_of(rows):
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    return apart[np.triu_indices(len(rows), 1)]


def test_widths_are_those_of_their_formulas():
    z = np.asarray(kernel_width.standardized(SAMPLES), np.float64)
    np.testing.assert_allclose(
        z[:, 0], (SAMPLES[:, 0] - SAMPLES[:, 0].mean()) / SAMPLES[:, 0].std(), rtol=1e-4, atol=1e-6
    )
    assert (z[:, 5] == 0).all()
    varying = [0, 1, 2, 3, 4, 6]
    outputs = SAMPLES[:, :2] @ np.array([[1.0, 2.0], [0.5, -1.0]])

    def found(rule, **options):
        widths = kernel_width.widths(z, rule, **options)
        assert widths.shape == (7,)
        assert (
            widths[5] == 1
            or options.get("previous") is not None
            or rule in ("silverman", "entropy")
        )
        return widths[varying]

    np.testing.assert_allclose(
        found("median"), [np.median(distances64(z[:, k])) for k in varying], rtol=1e-5
    )
    nearest = [np.sort(np.abs(z[:, k][:, None] - z[:, k]), 1)[:, :5].mean() for k in varying]
    np.testing.assert_allclose(found("knn", nearest=5), nearest, rtol=1e-5)
    np.testing.assert_allclose(found("silverman"), 0.8 * 20 ** (-1 / 5), rtol=1e-6)
    aligned = [alignment64(z[:, k], outputs, 300) for k in varying]
    for rule in ("alignment", "alignment_unsupervised"):
        np.testing.assert_allclose(found(rule, reference=outputs), aligned, rtol=1e-4)
    older = np.arange(1.0, 8)
    mixed = found("median", previous=older, beta=0.25)
    np.testing.assert_allclose(mixed, 0.25 * found("median") + 0.75 * older[varying], rtol=1e-6)


def test_the_entropy_rule_meets_half_of_the_largest_on_average():
    z = kernel_width.standardized(SAMPLES)
    found = mi.entropies(z, kernel_width.widths(z, "entropy"))
    assert abs(found.mean() - 0.5 * np.log2(20)) < 1e-3


def test_a_unit_that_is_mostly_0_has_a_width_too():
    sparse = np.zeros((20, 1))
    sparse[3] = 2.0
    z = kernel_width.standardized(sparse)
    apart = distances64(np.asarray(z)[:, 0])
    assert np.median(apart) == 0
    np.testing.assert_allclose(kernel_width.widths(z, "median"), apart.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mi.gram_matrix(jnp.ones(1), 1.0), "two or more rows"),
        (lambda: mi.gram_matrix(jnp.ones(3), 0.0), "width must be positive, got 0"),
        (lambda: mi.entropy(jnp.eye(2), 0), "alpha, the order of the entropy, must be positive"),
        (lambda: mi.entropy(jnp.eye(2), -1.0), "must be positive, got -1"),
        (lambda: mi.mutual_information(X, X[:3], 1.0, 1.0), "got 4 and 3 samples"),
        (lambda: mi.pairwise(SAMPLES, np.zeros(7)), "every kernel width must be positive"),
        (lambda: mi.pairwise(SAMPLES[:1], WIDTHS), "two or more rows"),
        (lambda: kernel_width.standardized(np.ones((5, 3))), "all 5 samples are equal"),
        (lambda: kernel_width.standardized(SAMPLES[:1]), "two or more rows"),
        (lambda: kernel_width.widths(SAMPLES, "meadian"), "did you mean 'median'"),
        (lambda: kernel_width.widths(SAMPLES, "knn"), "nearest must be 2 to 20"),
        (lambda: kernel_width.widths(SAMPLES), "samples of the outputs of the layer"),
        (lambda: kernel_width.widths(SAMPLES, "alignment"), "samples of the labels"),
        (lambda: kernel_width.widths(SAMPLES, reference=SAMPLES[:4]), "must hold 20 samples"),
    ],
)
def test_what_cannot_be_compared_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()
