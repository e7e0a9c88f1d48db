import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import allocation, masks
from swe_prune.errors import InputError


def achieved(scores, rate, spread=None):
    pruned = total = 0
    for score in scores.values():
        score = np.asarray(score)
        of = score.std(ddof=1, dtype=np.float64) if spread is None else spread
        pruned += (score <= np.float64(rate) * of).sum()
        total += score.size
    return pruned / total


@pytest.mark.parametrize(
    ("rate", "sparsity"),
    [(1.0, 0.4534), (1.1, 0.4927), (1.396, 0.5999), (2, 0.7720), (3, 0.9295), (0, 0)],
)
def test_std_rule_of_a_gaussian_removes_the_published_share(rate, sparsity):
    assert allocation.gaussian_sparsity(rate) == pytest.approx(sparsity, abs=5e-5)
    sample = np.abs(np.random.default_rng(0).normal(size=400_000)).astype(np.float32)
    # 4σ of a share of 400,000 draws is 0.003.
    removed = masks.summary(masks.by_std({"w": jnp.asarray(sample)}, rate)).sparsity
    assert removed == pytest.approx(sparsity, abs=3e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.99])
def test_rate_and_sparsity_of_a_gaussian_are_inverse(sparsity):
    rate = allocation.gaussian_rate(sparsity)
    assert allocation.gaussian_sparsity(rate) == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), jnp.float32(0.5)])
def test_sparsity_outside_0_to_1_is_refused(sparsity):
    said = "must be a number in|must be a finite number"
    with pytest.raises(InputError, match=said):
        allocation.gaussian_rate(sparsity)
    with pytest.raises(InputError, match=said):
        allocation.rate_for_sparsity({"w": jnp.ones(3)}, sparsity)


@pytest.mark.parametrize(
    ("size", "sparsity", "removed"), [(10, 0.25, 3), (100, 0.29, 29), (3, 0.5, 2), (7, 0, 0)]
)
def test_removed_count_is_the_nearest_integer(size, sparsity, removed):
    assert allocation.removed_count(size, sparsity) == removed


@pytest.mark.parametrize("spread", [None, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.6, 0.95, 0.999])
def test_rate_meets_a_sparsity_of_continuous_scores_within_one_weight(sparsity, spread):
    rng = np.random.default_rng(4)
    scores = {
        "a": jnp.asarray(np.abs(rng.normal(size=(40, 50))), jnp.float32),
        "b": jnp.asarray(rng.gamma(2.0, size=701), jnp.float32),
        "dense": None,
    }
    rate, got = allocation.rate_for_sparsity(scores, sparsity, spread=spread)
    assert abs(got - sparsity) * 2701 <= 1
    assert masks.summary(masks.by_std(scores, rate, spread=spread)).sparsity == got
    del scores["dense"]
    assert got == pytest.approx(achieved(scores, rate, spread), abs=1.01 / 2701)


def test_rate_is_the_nearest_step_among_ties():
    scores = {"w": jnp.asarray([1.0] * 4 + [2.0] * 3 + [3.0] * 3)}
    steps = [allocation.rate_for_sparsity(scores, s)[1] for s in (0.0, 0.1, 0.3, 0.5, 0.6, 0.9)]
    assert steps == [0.0, 0.0, 0.4, 0.4, 0.7, 1.0]


@pytest.mark.parametrize(
    ("score", "sparsity", "spread", "got"),
    [
        (np.ones(8), 0.5, None, 0.0),  # constant: no spread, no rate removes any
        (np.zeros(8), 0.0, None, 1.0),  # zeros: none exceeds 0
        (np.zeros(8), 0.5, None, 1.0),
        ([0, 0, 0, 1e30, 2e30], 0.5, 1.0, 0.6),
        ([0, 0, np.inf, np.inf, np.inf, np.inf], 0.9, 1.0, 2 / 6),  # swe_spread of a still tensor
        ([1e-38, 2e-38, 3e-38], 0.5, 1.0, 2 / 3),
        ([5.0], 0.5, None, 0.0),
    ],
)
def test_rate_search_ends_on_degenerate_scores(score, sparsity, spread, got):
    scores = {"w": jnp.asarray(score, jnp.float32)}
    rate, sparsity = allocation.rate_for_sparsity(scores, sparsity, spread=spread)
    assert sparsity == pytest.approx(got)
    assert 0 <= rate <= float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({"w": None}, "no scores were given"),
        ({"w": jnp.zeros((0, 3))}, "no scores were given"),
        ({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}, "'b' have 1 NaN"),
        ({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.inf])}, "'b' have no standard deviation"),
    ],
)
def test_scores_without_an_answer_are_refused(scores, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.rate_for_sparsity(scores, 0.5)


def test_threshold_is_the_unbiased_deviation_times_the_rate():
    score = np.random.default_rng(5).random((13, 7)).astype(np.float32)
    np.testing.assert_allclose(
        allocation.std_threshold(jnp.asarray(score), 1.4),
        score.astype(np.float64).std(ddof=1) * 1.4,
        rtol=1e-5,
    )
    assert allocation.std_threshold(jnp.ones(1), 2.0) == 0


def test_models_of_billions_of_weights_are_counted():
    assert allocation.removed_count(4_146_621_440, 0.5) == 2_073_310_720
    assert allocation.least_kept(4_146_621_440, 0.95) == 207_331_072
