import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import select
from swe_prune.errors import InputError

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 0.1]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FLOATS = st.floats(allow_nan=False, width=32) | st.sampled_from(SPECIAL)


def stable_top_k(x, k, axis=None):
    """The k largest by a stable sort in float64: ties go to the first."""
    x = np.asarray(x).astype(np.float64)
    if axis is None:
        return stable_top_k(x.ravel(), k, 0).reshape(x.shape)
    rank = np.argsort(np.argsort(-x, axis=axis, kind="stable"), axis=axis, kind="stable")
    return rank < k


@st.composite
def arrays(draw, shape):
    few = draw(st.booleans())
    element = st.sampled_from([-1.0, 0.0, -0.0, 1.0, np.inf]) if few else FLOATS
    size = int(np.prod(shape))
    values = np.array(draw(st.lists(element, min_size=size, max_size=size)), np.float32)
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    with np.errstate(over="ignore"):
        return values.astype(dtype).reshape(shape)


def with_k(shape, most):
    return st.tuples(arrays(shape), st.integers(0, most))


SHAPES = [(7,), (64,), (3, 5), ()]


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(SHAPES).flatmap(lambda shape: with_k(shape, int(np.prod(shape)))))
def test_mask_is_that_of_a_stable_sort(case):
    x, k = case
    mask = select.top_k_mask(jnp.asarray(x), k)
    assert mask.dtype == bool
    assert mask.shape == x.shape
    np.testing.assert_array_equal(mask, stable_top_k(x, k))


@settings(deadline=None, max_examples=60)
@given(with_k((3, 15), 3), st.integers(0, 15))  # 2^even - 1: every position has all digits
def test_mask_along_axes_is_exact_in_every_slice(case, k_row):
    x, k_column = case
    along_columns = select.top_k_mask(jnp.asarray(x), k_column, axes=(0,))
    np.testing.assert_array_equal(along_columns, stable_top_k(x, k_column, axis=0))
    along_rows = select.top_k_mask(jnp.asarray(x), k_row, axes=(-1,))
    np.testing.assert_array_equal(along_rows, stable_top_k(x, k_row, axis=1))


@settings(deadline=None, max_examples=40)
@given(arrays((2, 3, 4)), st.integers(0, 8))
def test_axes_in_any_order_and_sign_mean_the_same_slices(x, k):
    flat = x.transpose(1, 0, 2).reshape(3, 8)
    expected = stable_top_k(flat, k, axis=1).reshape(3, 2, 4).transpose(1, 0, 2)
    for axes in [(0, 2), (2, 0), (-1, 0)]:
        np.testing.assert_array_equal(select.top_k_mask(jnp.asarray(x), k, axes=axes), expected)


@settings(deadline=None, max_examples=60)
@given(arrays((3, 5)), arrays((7,)), arrays(()), st.integers(0, 23))
def test_masks_over_several_arrays_and_dtypes_are_that_of_their_concatenation(a, b, c, k):
    arrays_ = [a, b, c]
    masks = select.top_k_masks([jnp.asarray(x) for x in arrays_], k)
    expected = stable_top_k(np.concatenate([x.ravel().astype(np.float32) for x in arrays_]), k)
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), expected)
    assert [m.shape for m in masks] == [x.shape for x in arrays_]


def test_large_array_with_many_ties_at_the_threshold_is_exact():
    x = np.round(np.random.default_rng(0).normal(size=(317, 1009)), 1).astype(np.float32)
    for k in (1, 1000, x.size // 2, x.size - 1):
        np.testing.assert_array_equal(select.top_k_mask(jnp.asarray(x), k), stable_top_k(x, k))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_array_gives_an_empty_mask(shape):
    assert select.top_k_mask(jnp.zeros(shape), 0).shape == shape
    assert select.top_k_masks([jnp.zeros(shape), jnp.ones(2)], 1)[1].tolist() == [True, False]
    assert select.top_k_mask(jnp.zeros((0, 3)), 0, axes=(0,)).shape == (0, 3)


def test_no_arrays_give_no_masks():
    assert select.top_k_masks([], 0) == []


def test_k_is_no_part_of_the_compiled_program():
    traces = []

    @jax.jit
    def masked(x, k):
        traces.append(k)
        return select.top_k_mask(x, k)

    x = jnp.array([3.0, 1.0, 2.0])
    assert [int(masked(x, k).sum()) for k in range(4)] == [0, 1, 2, 3]
    assert len(traces) == 1
    compiled = select._checked_select._cache_size()
    select.top_k_mask(jnp.arange(11.0), 3)
    first = select._checked_select._cache_size()
    select.top_k_mask(jnp.arange(11.0), 4)
    assert compiled < first == select._checked_select._cache_size()


@pytest.mark.parametrize(("k", "kept"), [(-1, 0), (5, 3), (2, 2)])
def test_traced_k_is_clipped_to_the_elements_there_are(k, kept):
    x = jnp.array([3.0, 1.0, 2.0])
    assert jax.jit(select.top_k_mask)(x, k).sum() == kept
    assert sum(m.sum() for m in jax.jit(select.top_k_masks)([x], k)) == kept


def test_traced_and_eager_masks_agree_also_under_vmap():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 3)).round(1))
    together = jax.jit(jax.vmap(lambda x: select.top_k_mask(x, 5)))(x)
    np.testing.assert_array_equal(together, np.stack([select.top_k_mask(x_, 5) for x_ in x]))


def test_nan_counts_as_the_smallest_value_while_tracing():
    x = jnp.array([jnp.nan, -jnp.inf, -jnp.nan, 1.0])
    mask = jax.jit(lambda x: select.top_k_mask(x, 2))(x)
    assert mask.tolist() == [False, True, False, True]


def test_float64_orders_beyond_float32():
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12], jnp.float64)
        assert select.top_k_mask(x, 1).tolist() == [False, True, False]


@pytest.mark.parametrize("k", [-1, 4, np.int64(-1), np.int32(4), jnp.int32(-2), 2**40])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(InputError, match="must be between 0 and the 3 elements"):
        select.top_k_mask(jnp.ones(3), k)
    with pytest.raises(InputError, match="must be between 0 and the 3 elements"):
        select.top_k_masks([jnp.ones(2), jnp.ones(1)], k)


@pytest.mark.parametrize("k", [1.0, 0.5, np.float32(2)])
def test_k_that_is_no_integer_is_refused(k):
    with pytest.raises(InputError, match="k must be an integer"):
        select.top_k_mask(jnp.ones(3), k)


@pytest.mark.parametrize("x", [jnp.arange(3), jnp.ones(3, bool)])
def test_scores_that_are_no_floats_are_refused(x):
    with pytest.raises(InputError, match=f"float.* array.*, got {x.dtype}"):
        select.top_k_mask(x, 1)


def test_nan_is_refused_by_the_name_of_its_array():
    good, bad = jnp.ones(3), jnp.array([1.0, jnp.nan, -jnp.nan])
    with pytest.raises(InputError, match=r"scores of 'b/kernel' have 2 NaN"):
        select.top_k_masks([good, bad], 2, names=["a/kernel", "b/kernel"])
    with pytest.raises(InputError, match=r"scores of 'scores' have 2 NaN"):
        select.top_k_mask(bad, 1)
    with pytest.raises(InputError, match=r"scores of 'scores' have 2 NaN"):
        select.top_k_mask(bad[:, None], 1, axes=(0,))


@settings(deadline=None, max_examples=100)
@given(st.lists(FLOATS, min_size=16, max_size=16), st.sampled_from(sorted(DTYPES)))
def test_sortable_bits_order_as_the_floats(values, dtype):
    with np.errstate(over="ignore"):
        x = np.array(values, np.float32).astype(DTYPES[dtype])
    bits = np.asarray(select.sortable_bits(jnp.asarray(x))).astype(np.int64)
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(np.sign(bits[:, None] - bits), np.sign(_differences(wide)))


def _differences(x):
    return (x[:, None] > x).astype(int) - (x[:, None] < x)
