"""Candidates are ranked by what they are after a recovery, and only the shortlist is recovered."""

import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import structured
from swe_prune.errors import InputError

PARAMS = {"w": jnp.array([1.0, 2.0, 5.0, 9.0]), "head": jnp.ones(2)}
GROUPS = {"mlp": structured.Group(4, {"w": 0})}
CUTS = {f"unit {one}": structured.Candidate(GROUPS, {"mlp": [one]}) for one in range(4)}


def loss(candidate, params):
    assert params["w"].shape == (1,), "it was not cut"
    return params["w"].sum()


def ranked(recover=lambda _, params: params, loss=loss, **options):
    found = structured.rerank(CUTS, PARAMS, loss=loss, recover=recover, **options)
    return [(one.name, one.before, one.after) for one in found]


def test_the_order_is_that_after_the_recovery():
    seen = []

    def recover(candidate, params):
        seen.append(candidate.keep["mlp"])
        return {**params, "w": 10 - params["w"]}

    assert ranked(recover, shortlist=3) == [
        ("unit 2", 5.0, 5.0), ("unit 1", 2.0, 8.0), ("unit 0", 1.0, 9.0), ("unit 3", 9.0, None),
    ]  # fmt: skip
    assert seen == [[0], [1], [2]]


def test_what_was_recovered_is_returned():
    first = structured.rerank(
        CUTS, PARAMS, loss=loss, recover=lambda _, p: {**p, "w": p["w"] - 1}, shortlist=1
    )
    np.testing.assert_array_equal(first[0].params["w"], [0.0])
    assert [one.params for one in first[1:]] == [None] * 3


def test_a_recovery_that_diverges_ranks_last():
    broken = ranked(
        lambda candidate, p: {**p, "w": p["w"] * (jnp.nan if 0 in candidate.keep["mlp"] else 1)}
    )
    assert [name for name, _, after in broken if after is not None] == [
        "unit 1",
        "unit 2",
        "unit 0",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shortlist": 0}, "shortlist must be 1 or more"),
        ({"loss": lambda *_: None}, "the loss of 'unit 0' must be a number, got None"),
        ({"loss": lambda *_: jnp.ones(2)}, "must be a number"),
    ],
)
def test_what_cannot_be_ranked_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        ranked(**options)


def test_nothing_to_rank_is_refused():
    with pytest.raises(InputError, match="no candidates"):
        structured.rerank({}, PARAMS, loss=loss, recover=lambda _, params: params)
