"""What every rule that shares a sparsity out gives, against the formulas in float64 numpy."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from swe_prune import allocation
from swe_prune.allocation import Allocation
from swe_prune.errors import InputError


def test_allocation_adds_up_and_prints_a_table():
    got = Allocation({"a/kernel": 1234, "b": 0}, {"a/kernel": 5000, "b": 10})
    assert (got.removed_total, got.size_total) == (1234, 5010)
    assert got.sparsity == 1234 / 5010
    assert got.sparsities == {"a/kernel": 0.2468, "b": 0.0}
    lines = str(got).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert [line.split() for line in lines] == [
        ["tensor", "removed", "of", "sparsity"],
        ["a/kernel", "1,234", "5,000", "24.68%"],
        ["b", "0", "10", "0.00%"],
        ["total", "1,234", "5,010", "24.63%"],
    ]


@pytest.mark.parametrize(
    ("removed", "sizes", "sentence"),
    [
        ({"a": 1}, {"a": 2, "b": 3}, "'b' has only one of removed and size"),
        ({"a": 3}, {"a": 2}, "3 of the 2 weights of 'a' cannot go"),
        ({"a": -1}, {"a": 2}, "-1 of the 2 weights of 'a' cannot go"),
    ],
)
def test_allocation_beyond_the_tensors_is_refused(removed, sizes, sentence):
    with pytest.raises(InputError, match=sentence):
        Allocation(removed, sizes)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_apportioned_parts_add_up_next_to_their_targets(parts):
    sizes = [size for size, _ in parts]
    targets = [size * share for size, share in parts]
    total = math.floor(math.fsum(targets) + 0.5)
    got = allocation.apportion(targets, sizes, total)
    assert sum(got) == total
    for part, target, size in zip(got, targets, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - target) <= 1


def test_apportioning_makes_good_what_rounding_spoils():
    assert allocation.apportion([1.0, 1.0], [1, 5], 4) == [1, 3]
    assert allocation.apportion([2.0, 2.0], [2, 2], 1) == [1, 0]
    assert allocation.apportion([0.5, 0.5, 0.5], [1, 1, 1], 2) == [1, 1, 0], "ties by order"
