import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import patterns
from swe_prune.errors import InputError
from swe_prune.layout import Axes


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0, np.inf]), min_size=24, max_size=24),
    st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 4), (5, 8), (1, 8)]),
)
def test_every_group_keeps_exactly_n_its_largest_first_on_ties(values, n_of_m):
    n, m = n_of_m
    score = np.array(values, np.float32).reshape(8, 3)
    mask = np.asarray(patterns.n_of_m_mask(jnp.asarray(score), n, m))
    groups, kept = score.reshape(-1, m, 3), mask.reshape(-1, m, 3)
    assert (kept.sum(axis=1) == n).all()
    rank = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
    np.testing.assert_array_equal(kept, rank < n)


@pytest.mark.parametrize("inputs", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_matrix_and_back_is_the_kernel(inputs):
    kernel = jnp.arange(24).reshape(2, 3, 4)
    others = tuple(axis for axis in range(3) if axis not in inputs)
    axes = Axes(inputs, others)
    matrix = patterns.as_matrix(kernel, axes)
    assert matrix.shape[0] == np.prod([kernel.shape[axis] for axis in inputs])
    np.testing.assert_array_equal(patterns.from_matrix(matrix, kernel.shape, axes), kernel)


@pytest.mark.parametrize(
    "axes",
    [
        Axes((1,), (2,), copies=(0,)),
        Axes((2,), (0,), copies=(1,)),
        Axes((0,), (), copies=(2, 1)),
        Axes((0, 2), (), copies=(1,)),
    ],
)
def test_copies_become_matrices_of_their_own(axes):
    kernel = np.arange(24).reshape(2, 3, 4)
    matrices = np.asarray(patterns.as_matrix(jnp.asarray(kernel), axes))
    counts = [kernel.shape[axis] for axis in axes.copies]
    for index in np.ndindex(*counts):
        one = np.moveaxis(kernel, axes.copies, range(len(counts)))[index]
        one = np.transpose(one, (*axes.one_copy.inputs, *axes.one_copy.outputs))
        np.testing.assert_array_equal(matrices[index], one.reshape(matrices[index].shape))
    np.testing.assert_array_equal(patterns.from_matrix(matrices, kernel.shape, axes), kernel)


@pytest.mark.parametrize("pattern", ["", "2", "0:4", "5:4", "2:4:8", "-1:4", "2 :4", "a:b"])
def test_a_malformed_pattern_is_refused(pattern):
    with pytest.raises(InputError, match="must be 'n:m'"):
        patterns.parse_n_of_m(pattern)


def test_groups_that_do_not_fill_the_inputs_are_refused_by_name():
    patterns.check_divides("a/kernel", 8, 4)
    with pytest.raises(InputError, match="'a/kernel' has 6 inputs"):
        patterns.check_divides("a/kernel", 6, 4)
