import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import calibration, importance, masks
from swe_prune.blockwise import wanda_mask, wanda_variant_mask
from swe_prune.errors import InputError


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_wanda_gives_the_published_scores_and_removes_other_inputs_than_magnitude():
    # METHODS 17: X has a row for each token here; all of them are one sequence.
    x_BxLx4 = jnp.array([[[1.0, 1, 1, 1], [3, 0, 0, 1]]])
    params = {"kernel": jnp.array([[1.0], [-2], [3], [-4]])}
    model = nn.Dense(1, use_bias=False)
    measured = calibration.inputs(model, {"params": params}, [x_BxLx4])
    score = importance.score("wanda", params, measured=measured)["kernel"]
    np.testing.assert_allclose(score[:, 0], [3.162278, 2, 3, 5.656854], rtol=1e-6)
    assert wanda_mask(score, 0.5)[:, 0].tolist() == [True, False, False, True]
    by_size = importance.score("magnitude", params)["kernel"]
    assert wanda_mask(by_size, 0.5)[:, 0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wanda_is_size_times_norm_for_kernels_of_any_axes(dtype):
    params = {
        "attention": {"query": {"kernel": jnp.asarray(drawn(6, 2, 3), dtype)}},
        "out": {"kernel": jnp.asarray(drawn(2, 3, 6, seed=1), dtype)},
    }
    norms = {
        "attention": {"query": {"kernel": np.abs(drawn(6, 1, 1, seed=2))}},
        "out": {"kernel": np.abs(drawn(2, 3, 1, seed=3))},
    }
    score = importance.score("wanda", params, measured={"input_norm": norms})

    def assert_equal(score, weight, norm):
        assert score.dtype == jnp.float32
        expected = np.abs(np.asarray(weight, np.float64)) * norm
        np.testing.assert_allclose(score, expected, rtol=1e-6)

    jax.tree.map(assert_equal, score, params, norms)


def lowest_of_each_output(score_RxC, sparsity):
    """METHODS 15.2 by a stable sort in numpy, one output after the other."""
    mask_RxC = np.ones(score_RxC.shape, bool)
    for column in range(score_RxC.shape[1]):
        order = np.argsort(score_RxC[:, column], kind="stable")
        mask_RxC[order[: int(len(order) * sparsity)], column] = False
    return mask_RxC


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.6, 0.99]), st.booleans())
def test_wanda_mask_is_a_stable_sort_of_each_output(seed, sparsity, ties):
    score = np.abs(drawn(12, 5, seed=seed))
    score = score.round(0) if ties else score
    mask = wanda_mask(jnp.asarray(score), sparsity, rounding="down", ties="last")
    np.testing.assert_array_equal(mask, lowest_of_each_output(score, sparsity))


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "down"}, {"ties": "last"}, {"rounding": "down", "ties": "last"}]
)
def test_wanda_mask_is_that_of_the_row_scope_ties_and_rounding_included(options):
    score = jnp.asarray(np.abs(drawn(13, 7)).round(1))
    expected = masks.by_sparsity({"kernel": score}, 0.45, "row", **options)["kernel"]
    np.testing.assert_array_equal(wanda_mask(score, 0.45, **options), expected)


def test_without_ties_wanda_mask_keeps_the_same_from_either_end():
    score = jnp.asarray(np.abs(drawn(13, 7)))
    expected = masks.by_sparsity({"kernel": score}, 0.45, "row", rounding="down")["kernel"]
    got = wanda_mask(score, 0.45, rounding="down", ties="last")
    np.testing.assert_array_equal(got, expected)


def test_by_default_the_count_at_0_55_is_that_of_the_row_scope():
    score = jnp.asarray(np.abs(drawn(10, 6)))
    kept = masks.summary(masks.by_sparsity({"kernel": score}, 0.55, "row")).kept
    assert int(wanda_mask(score, 0.55).sum()) == kept == 24
    assert int(wanda_mask(score, 0.55, rounding="down").sum()) == 30


def variant(score_RxC, sparsity):
    """METHODS 15.2, the variant, one output after the other in float64."""
    score = np.asarray(score_RxC, np.float64)

    def mask_of(alpha):
        mask = np.ones(score.shape, bool)
        for column in range(score.shape[1]):
            order = np.argsort(score[:, column], kind="stable")
            total = score[:, column].sum()
            reached = 0.0
            for row in order:
                reached += score[row, column]
                if reached > alpha * total:
                    break
                mask[row, column] = False
        return mask

    alpha, low, high = 0.4, 0.0, 0.8
    while abs((~mask_of(alpha)).mean() - sparsity) > 1e-3 and high - low >= 1e-3:
        if (~mask_of(alpha)).mean() > sparsity:
            high = alpha
        else:
            low = alpha
        alpha = (low + high) / 2
    return mask_of(alpha)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.75, 0.97])
def test_the_variant_bisects_one_share_of_every_output(sparsity):
    score = np.abs(drawn(40, 9, seed=int(100 * sparsity)))
    got = wanda_variant_mask(jnp.asarray(score), sparsity)
    np.testing.assert_array_equal(got, variant(score, sparsity))


def test_the_variant_meets_the_sparsity_where_there_are_weights_enough():
    score = jnp.asarray(np.abs(drawn(200, 60)))
    assert abs(float((~wanda_variant_mask(score, 0.5)).mean()) - 0.5) <= 1e-3


@pytest.mark.parametrize("make", [wanda_mask, wanda_variant_mask])
@pytest.mark.parametrize(
    ("score", "sparsity", "sentence"),
    [([[1.0]], 1.0, "sparsity"), ([[1.0], [np.nan]], 0.5, "have 1 NaN")],
)
def test_what_cannot_be_masked_is_refused_in_a_sentence(make, score, sparsity, sentence):
    with pytest.raises(InputError, match=sentence):
        make(jnp.array(score), sparsity)


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ({}, "needs 'input_norm'; pass measured=calibration.inputs"),
        ({"input_norm": {"kernel": None}}, "was not measured for 'kernel'"),
        ({"input_norm": {"kernel": np.ones((4, 1))}}, r"shape \(4, 1\) and the weight the shape"),
    ],
)
def test_a_norm_that_is_missing_or_another_is_refused_in_a_sentence(measured, sentence):
    with pytest.raises(InputError, match=sentence):
        importance.score("wanda", {"kernel": jnp.ones((3, 2))}, measured=measured)
