"""Random and fixed windows of a token array."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swe_prune.data import eval_batches, train_iterator
from swe_prune.errors import InputError

# A token that is its own position shows where a window was cut.
POSITIONS = np.arange(1000, dtype=np.uint16)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"inputs", "targets"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def starts(batches):
    return np.concatenate([batch["inputs"][:, 0] for batch in batches])


def test_targets_are_the_inputs_one_token_later():
    iterator = train_iterator(POSITIONS, context=7, batch=5, seed=0)
    fixed = eval_batches(POSITIONS, context=7, windows=10, batch=5)
    for batch in [*take(iterator, 20), *fixed]:
        inputs_BxL, targets_BxL = batch["inputs"], batch["targets"]
        assert inputs_BxL.shape == targets_BxL.shape == (5, 7)
        assert inputs_BxL.dtype == targets_BxL.dtype == np.int32
        np.testing.assert_array_equal(inputs_BxL, inputs_BxL[:, :1] + np.arange(7))
        np.testing.assert_array_equal(targets_BxL, inputs_BxL + 1)


@pytest.mark.parametrize("batch", [1, 3, 16])  # 3 does not divide the 16 starts of an epoch
def test_every_epoch_visits_every_start_once_in_another_order(batch):
    tokens, context, epochs = POSITIONS[:20], 4, 3
    iterator = train_iterator(tokens, context=context, batch=batch, seed=1)
    visited = starts(take(iterator, epochs * 16 // batch)).reshape(epochs, 16)
    np.testing.assert_array_equal(np.sort(visited, axis=1), np.tile(np.arange(16), (epochs, 1)))
    assert len({tuple(epoch) for epoch in visited}) == epochs


def test_the_seed_alone_determines_the_order():
    def batches(seed):
        return take(train_iterator(POSITIONS, context=8, batch=4, seed=seed), 6)

    assert_equal(batches(3), batches(3))
    assert (starts(batches(3)) != starts(batches(4))).any()


def test_neighbouring_seeds_share_no_epoch():
    # Grain makes the order of epoch e from seed + e, so seeds must not be its seeds directly.
    def epochs(seed):
        batches = take(train_iterator(POSITIONS[:40], context=8, batch=4, seed=seed), 5 * 8)
        return {tuple(epoch) for epoch in starts(batches).reshape(5, 32)}

    assert not epochs(0) & epochs(1)


@pytest.mark.quick(2)
# 13 starts make an epoch of 3 and a bit batches: the states are at its beginning, in its middle,
# at its seam, and many epochs on, and always with batches prefetched ahead.
@pytest.mark.parametrize("before", [0, 1, 3, 4, 50])
def test_a_restored_iterator_continues_bit_identically(before):
    def iterator():
        return train_iterator(POSITIONS[:20], context=7, batch=4, seed=5)

    uninterrupted = iterator()
    take(uninterrupted, before)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 20)

    fresh = iterator()
    fresh.set_state(state)
    assert_equal(take(fresh, 20), expected)
    used = iterator()
    take(used, 9)
    used.set_state(state)
    assert_equal(take(used, 20), expected)


@given(
    length=st.integers(2, 3000),
    context=st.integers(1, 40),
    batch=st.integers(1, 8),
    batches=st.integers(1, 8),
)
def test_eval_windows_are_fixed_even_and_apart(length, context, batch, batches):
    windows = batch * batches
    tokens = np.arange(length, dtype=np.uint16)
    if windows > length - context:
        with pytest.raises(InputError, match="lower"):
            eval_batches(tokens, context=context, windows=windows, batch=batch)
        return
    result = eval_batches(tokens, context=context, windows=windows, batch=batch)
    assert_equal(result, eval_batches(tokens, context=context, windows=windows, batch=batch))
    assert [len(b["inputs"]) for b in result] == [batch] * batches

    gaps = np.diff(starts(result))
    assert starts(result)[0] == 0
    if windows > 1:
        assert result[-1]["targets"][-1, -1] == length - 1  # the last token is predicted
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
        assert gaps.min() >= context or length <= windows * context


def test_eval_windows_make_whole_batches():
    with pytest.raises(InputError, match="must be a multiple"):
        eval_batches(POSITIONS, context=8, windows=10, batch=4)


@pytest.mark.parametrize("length", [0, 8])
def test_too_few_tokens_are_named_with_what_is_needed(length):
    with pytest.raises(InputError, match=f"{length} tokens are too few .*needs 9"):
        train_iterator(POSITIONS[:length], context=8, batch=2, seed=0)
    with pytest.raises(InputError, match=f"{length} tokens are too few .*needs 9"):
        eval_batches(POSITIONS[:length], context=8, windows=2, batch=2)


def test_one_window_is_enough():
    batch = next(train_iterator(POSITIONS[:9], context=8, batch=2, seed=0))
    np.testing.assert_array_equal(batch["targets"], np.tile(np.arange(1, 9), (2, 1)))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(
        InputError, match="seed must be an integer of at least 0 and at most 4294967295"
    ):
        train_iterator(POSITIONS, context=8, batch=2, seed=seed)
