import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import importance
from swe_prune.blockwise import sparsegpt
from swe_prune.errors import InputError, RunError
from swe_prune.importance.hessian import inverse_factor
from swe_prune.layout import Axes


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(n, r, seed=0):
    """Inputs that move together, as a layer's do; float32."""
    mixed = drawn(n, r, seed=seed) @ (drawn(r, r, seed=seed + 1) / np.sqrt(r) + np.eye(r))
    return mixed.astype(np.float32)


def hessian_of(x_NxR):
    x = np.asarray(x_NxR, np.float64)
    return (2 / len(x)) * x.T @ x


def factor_oracle(hessian, damping=0.01):
    """The definition in float64: damp, invert, upper Cholesky factor of the inverse."""
    h = np.array(hessian, np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += damping * np.diag(h).mean() * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T, dead


def sparsegpt_oracle(weight_RxC, hessian, sparsity, block, n_of_m=None):
    """METHODS 15.3 as plain loops in float64 over a PyTorch weight, (out, in)."""
    u, dead = factor_oracle(hessian)
    w = np.array(weight_RxC, np.float64).T
    w[:, dead] = 0
    outputs, inputs = w.shape
    mask = np.ones(w.shape, bool)
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        if n_of_m is None:
            cost = (w[:, first:last] / np.diag(u)[first:last]) ** 2
            # Exactly floor(numel · s) go; of ties those that come last as (input, output).
            flat = cost.T.ravel()
            order = np.argsort(-flat, kind="stable")
            kept = np.zeros(flat.size, bool)
            kept[order[: flat.size - int(flat.size * sparsity)]] = True
            mask[:, first:last] = kept.reshape(cost.T.shape).T
        errors = np.zeros((outputs, last - first))
        for j in range(first, last):
            if n_of_m is not None and j % n_of_m[1] == 0:
                n, m = n_of_m
                cost = (w[:, j : j + m] / np.diag(u)[j : j + m]) ** 2
                for i in range(outputs):
                    mask[i, j + np.argsort(cost[i], kind="stable")[: m - n]] = False
            q = np.where(mask[:, j], w[:, j], 0)
            e = (w[:, j] - q) / u[j, j]
            for i in range(j + 1, last):
                w[:, i] -= e * u[j, i]
            w[:, j] = q
            errors[:, j - first] = e
        w[:, last:] -= errors @ u[first:last, last:]
    return w.T, mask.T


@pytest.mark.parametrize("r", [1, 40])
def test_inverse_factor_is_the_cholesky_factor_of_the_inverse(r):
    hessian = hessian_of(correlated(3 * r, r))
    factor, damping = inverse_factor(jnp.asarray(hessian, jnp.float32))
    expected, _ = factor_oracle(hessian)
    # rtol and atol: a solve loses digits by the condition number, some 300 here.
    np.testing.assert_allclose(factor, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert (np.tril(factor, -1) == 0).all()
    assert float(damping) == pytest.approx(0.01)


def test_dead_inputs_are_taken_for_ones_before_the_damping():
    x = correlated(30, 6)
    x[:, [0, 4]] = 0
    hessian = hessian_of(x)
    factor, _ = inverse_factor(jnp.asarray(hessian, jnp.float32))
    np.testing.assert_allclose(factor, factor_oracle(hessian)[0], rtol=1e-4, atol=1e-5)


def indefinite(eigenvalue=-0.05):
    """A Hessian that float rounding could have made: mean diagonal about 1, one eigenvalue < 0."""
    basis = np.linalg.qr(drawn(8, 8))[0]
    values = np.full(8, (8 - eigenvalue) / 7)
    values[0] = eigenvalue
    return jnp.asarray(basis @ np.diag(values) @ basis.T, jnp.float32)


def test_a_hessian_that_cannot_be_factored_is_damped_ten_times_more_and_reported():
    hessian = indefinite()
    factor, damping = inverse_factor(hessian, 0.01)
    assert float(damping) == pytest.approx(0.1)
    np.testing.assert_allclose(factor, factor_oracle(hessian, 0.1)[0], rtol=1e-4, atol=1e-5)
    _, _, report = sparsegpt(jnp.asarray(drawn(8, 3)), hessian, 0.5)
    assert report.damping == pytest.approx(0.1)
    with pytest.warns(UserWarning, match=r"with damping 0\.1 instead of 0\.01"):
        score = importance.score(
            "sparsegpt", {"kernel": jnp.ones((8, 2))}, measured={"hessian": {"kernel": hessian}}
        )
    expected = 1 / np.diag(factor_oracle(hessian, 0.1)[0]) ** 2
    np.testing.assert_allclose(score["kernel"][:, 0], expected, rtol=1e-4)


def test_after_the_last_try_there_is_an_error_and_in_a_jit_nan_never_an_identity():
    hopeless = indefinite(-1e6)
    with pytest.raises(RunError, match="8 inputs is not positive definite even with damping 100"):
        inverse_factor(hopeless)
    factor, damping = jax.jit(inverse_factor)(hopeless)
    assert np.isnan(factor).all()
    assert float(damping) == pytest.approx(100)


@pytest.mark.parametrize("shape", [(12, 5), (3, 4, 5)])
def test_criterion_is_the_weight_squared_over_the_factors_diagonal(shape):
    x = correlated(60, 12)
    x[:, 2] = 0
    weight = drawn(*shape, seed=5)
    hessian = hessian_of(x)
    score = importance.score(
        "sparsegpt",
        {"kernel": jnp.asarray(weight)},
        measured={"hessian": {"kernel": jnp.asarray(hessian, jnp.float32)}},
        layout={"kernel": Axes(tuple(range(len(shape) - 1)), (len(shape) - 1,))},
    )["kernel"]
    factor, dead = factor_oracle(hessian)
    cost = np.where(dead, 0, 1 / np.diag(factor) ** 2)
    expected = weight.reshape(12, 5).astype(np.float64) ** 2 * cost[:, None]
    np.testing.assert_allclose(score, expected.reshape(shape), rtol=1e-5)
    assert (np.reshape(score, (12, 5))[2] == 0).all()


@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])  # compiled once for both
def test_solver_equals_plain_loops(block, sparsity):
    weight, hessian = drawn(24, 10, seed=3), hessian_of(correlated(100, 24))
    got, mask, report = sparsegpt(weight, jnp.asarray(hessian, jnp.float32), sparsity, block=block)
    expected, kept = sparsegpt_oracle(weight, hessian, sparsity, block)
    np.testing.assert_array_equal(mask, kept)
    # atol: what is left of a weight after 24 updates may be nearly 0.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    assert (np.asarray(got)[~kept] == 0).all()
    assert report.removed == (~kept).sum()


@pytest.mark.parametrize(("rows", "block"), [(23, 10), (130, 128)])
def test_a_last_block_that_is_smaller_has_its_own_count(rows, block):
    weight, hessian = drawn(rows, 6, seed=4), hessian_of(correlated(4 * rows, rows))
    got, mask, report = sparsegpt(weight, jnp.asarray(hessian, jnp.float32), 0.45, block=block)
    expected, kept = sparsegpt_oracle(weight, hessian, 0.45, block)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    blocks = [min(block, rows - first) for first in range(0, rows, block)]
    assert report.removed == sum(int(size * 6 * 0.45) for size in blocks) == (~kept).sum()


@pytest.mark.parametrize(("pattern", "block"), [("2:4", 8), ("1:3", 128)])
def test_n_of_m_is_chosen_of_the_updated_weights(pattern, block):
    weight, hessian = drawn(24, 10, seed=6), hessian_of(correlated(100, 24))
    n, m = map(int, pattern.split(":"))
    got, mask, report = sparsegpt(
        weight, jnp.asarray(hessian, jnp.float32), pattern=pattern, block=block
    )
    expected, kept = sparsegpt_oracle(weight, hessian, None, block, (n, m))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    assert (np.reshape(mask, (-1, m, 10)).sum(1) == n).all()
    assert report.removed == 240 * (m - n) // m
    before = sparsegpt(weight, jnp.eye(24), 1 - n / m, pattern, block)[1]
    assert (np.asarray(before) != kept).any()  # the updates made a difference


def test_sparsity_0_changes_only_the_weights_of_dead_inputs():
    x = correlated(100, 16)
    weight = drawn(16, 5)
    got, mask, report = sparsegpt(weight, jnp.asarray(hessian_of(x), jnp.float32), 0.0, block=5)
    np.testing.assert_array_equal(got, weight)
    assert mask.all()
    assert report == (report.damping, 0, 0, 0.0)
    x[:, 3] = 0
    got, mask, report = sparsegpt(weight, jnp.asarray(hessian_of(x), jnp.float32), 0.0)
    weight[3] = 0
    np.testing.assert_array_equal(got, weight)
    assert report.dead == 1


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_outputs_are_kept_better_than_by_magnitude_at_the_same_count(sparsity):
    x, weight = correlated(400, 64), drawn(64, 32, seed=9)
    hessian = jnp.asarray(hessian_of(x), jnp.float32)
    got, mask, report = sparsegpt(weight, hessian, sparsity, block=16)
    kept = int(mask.sum())
    smallest = np.sort(np.abs(weight), axis=None)[-kept]
    by_size = np.where(np.abs(weight) >= smallest, weight, 0)
    only_masked = np.where(mask, weight, 0)

    def error(other):
        return np.sum((x @ (weight - np.asarray(other))) ** 2)

    assert error(got) < error(by_size)
    assert error(got) < error(only_masked)
    # Σ e² is the error of the damped Hessian, which is a little larger.
    assert 2 / 400 * error(got) <= report.error * 1.0001
    assert report.error < 1.3 * 2 / 400 * error(got)


def test_bfloat16_weights_keep_their_dtype_and_their_zeros():
    weight = jnp.asarray(drawn(16, 4), jnp.bfloat16)
    hessian = jnp.asarray(hessian_of(correlated(64, 16)), jnp.float32)
    got, mask, _ = sparsegpt(weight, hessian, 0.5)
    expected, kept = sparsegpt_oracle(np.asarray(weight, np.float32), hessian, 0.5, 128)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=2**-7, atol=2e-5)


def test_solver_is_the_same_inside_a_jit():
    weight = jnp.asarray(drawn(16, 4))
    hessian = jnp.asarray(hessian_of(correlated(64, 16)), jnp.float32)
    outside = sparsegpt(weight, hessian, 0.5, block=6)
    inside = jax.jit(lambda w, h: sparsegpt(w, h, 0.5, block=6))(weight, hessian)
    np.testing.assert_array_equal(inside[1], outside[1])
    np.testing.assert_allclose(inside[0], outside[0], rtol=1e-5, atol=1e-6)
    assert int(inside[2].removed) == outside[2].removed


W, H = jnp.ones((6, 2)), jnp.eye(6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: sparsegpt(W, jnp.eye(5), 0.5),
            r"shape \(R, R\) with R = 6 as in weight_RxC, got \(5, 5\)",
        ),
        (lambda: sparsegpt(W, H), "neither a sparsity nor a pattern"),
        (lambda: sparsegpt(W, H, 1.5), "sparsity"),
        (lambda: sparsegpt(W, H, 0.6, "1:2"), "a sparsity of 0.5, not 0.6; make the two agree"),
        (lambda: sparsegpt(W, H, pattern="2:4"), "has 6 inputs, which are not a multiple of m = 4"),
        (lambda: sparsegpt(W, H, pattern="1:3", block=4), "would cut groups of 3 inputs"),
        (lambda: sparsegpt(W, H, 0.5, "block:2x2"), "cannot be pruned by calibration"),
        (lambda: sparsegpt(W, H, 0.5, block=0), "block must be an integer of at least 1, got 0"),
        (lambda: sparsegpt(W * jnp.nan, H, 0.5), "the weight has NaN"),
        (lambda: sparsegpt(W, H * jnp.nan, 0.5), "the hessian has NaN"),
        (lambda: sparsegpt(W, H, 0.5, damping=-1.0), "damping = -1.0"),
        (lambda: inverse_factor(jnp.ones((2, 3))), "must be square"),
        (
            lambda: importance.score(
                "sparsegpt", {"kernel": W}, measured={"hessian": {"kernel": W}}
            ),
            r"'hessian' of 'kernel' has shape \(6, 2\) and the weight 6 inputs",
        ),
        (
            lambda: importance.score("sparsegpt", {"k": W}, measured={}),
            r"calibration.inputs\(model, variables, batches, hessian=True\)",
        ),
    ],
)
def test_what_cannot_be_solved_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_a_hessian_of_infinities_is_refused_though_its_factor_is_finite():
    # A Cholesky factor of infinities has the inverse 0, as finite as any.
    with pytest.raises(InputError, match="hessian has NaN or inf"):
        inverse_factor(jnp.full((4, 4), jnp.inf))
    factor, _ = jax.jit(inverse_factor)(jnp.full((4, 4), jnp.inf))
    assert np.isnan(factor).all()
