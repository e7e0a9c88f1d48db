"""How many units stay, and which: a sparsity, a budget, a multiple."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swe_prune import interop, structured, tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.structured import Budget, Group

GROUPS = {"a": Group(24, {"a": -1}), "b": Group(24, {"b": -1})}
UNITS = {
    "a": np.linspace(1, 2, 24, dtype=np.float32),
    "b": np.linspace(5, 3, 24, dtype=np.float32),
}
CONFIG = ModelConfig(layers=2, heads=4, kv_heads=2, width=16, hidden=24, context=8)
PARAMS = interop.abstract_params(CONFIG, 10)


def refused(sentence, call):
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 8), st.integers(0, 9))
def test_uniform_counts_are_the_nearest_multiple_and_the_best_stay(units, sparsity, multiple, seed):
    scores = np.random.default_rng(seed).integers(0, 9, units).astype(np.float32)
    try:
        keep = structured.choose(
            {"g": Group(units, {"g": 0})}, {"g": scores}, sparsity=sparsity, multiple=multiple
        )["g"]
    except InputError:
        left = units - int(units * sparsity + 0.5)
        assert multiple > units or left < multiple / 2
        return
    left = units - int(units * sparsity + 0.5)
    assert len(keep) == left == units or len(keep) % multiple == 0
    assert abs(len(keep) - left) <= multiple / 2 or len(keep) == units // multiple * multiple
    assert (np.diff(keep) > 0).all()
    gone = np.setdiff1d(np.arange(units), keep)
    assert all(
        (scores[stays], -stays) > (scores[goes], -goes)
        for stays, goes in itertools.product(keep.tolist(), gone.tolist())
    )


def test_ranked_together_the_total_is_met_and_nothing_is_emptied():
    keep = structured.choose(GROUPS, UNITS, sparsity=0.5, uniform=False)
    assert {name: len(some) for name, some in keep.items()} == {"a": 1, "b": 23}
    assert structured.summary(GROUPS, keep).sparsity == 0.5
    keep = structured.choose(GROUPS, UNITS, sparsity=0.5, uniform=False, multiple=4)
    assert {name: len(some) for name, some in keep.items()} == {"a": 4, "b": 20}
    assert keep["a"].tolist() == [20, 21, 22, 23]
    uniform = structured.choose(GROUPS, UNITS, sparsity=0.5)
    assert {name: len(some) for name, some in uniform.items()} == {"a": 12, "b": 12}


def limited(name, value):
    how: dict[str, Any] = {name: value}
    return Budget(**how)


def scores_like(groups):
    return {name: np.arange(group.units, dtype=np.float32) for name, group in groups.items()}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", ["params", "bytes", "flops"])
def test_a_budget_is_met_by_as_many_units_as_it_admits(name, uniform):
    groups = structured.groups(CONFIG)
    units = scores_like(groups)
    how = {"uniform": uniform, "multiple": 1, "params": PARAMS, "config": CONFIG}
    cost = limited(name, 1).cost(groups, PARAMS, CONFIG)
    whole = cost({})
    keep = structured.choose(groups, units, budget=limited(name, 0.8 * whole), **how)
    kept = structured.summary(groups, keep).kept
    assert cost(keep) <= 0.8 * whole
    # One rung more would be over it.
    more = structured.choose(groups, units, sparsity=1 - (kept + 1 + uniform) / 48,
                             uniform=uniform, multiple=1)  # fmt: skip
    assert cost(more) > 0.8 * whole
    everything = structured.choose(groups, units, budget=limited(name, whole), **how)
    assert structured.summary(groups, everything).sparsity == 0


def test_a_budget_of_latency_is_measured_on_few_candidates():
    groups = structured.groups(CONFIG)
    seen = []

    def measure(config):
        seen.append(config.hidden_size)
        return config.hidden_size / 1000

    budget = Budget(latency=0.017, measure=measure)
    keep = structured.choose(groups, scores_like(groups), budget=budget, config=CONFIG, multiple=1)
    assert structured.cut_config(CONFIG, keep).hidden == 17
    assert len(seen) <= 7


def test_a_measure_that_says_nothing_is_refused():
    groups = structured.groups(CONFIG)
    budget = Budget(latency=1, measure=lambda _: float("nan"))
    refused("latency = 1 cannot be met: .* has nan", lambda: structured.choose(
        groups, scores_like(groups), budget=budget, config=CONFIG))  # fmt: skip


def test_flops_are_those_that_the_compiler_counts():
    config = ModelConfig(
        layers=1, heads=4, kv_heads=2, width=128, hidden=512, context=16, tied_head=False
    )
    shapes = interop.abstract_params(config, 512)
    decoder = gpt.build(config, 512)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    compiled = jax.jit(decoder.apply).lower({"params": shapes}, tokens).compile()
    found = compiled.cost_analysis()
    assert found is not None
    counted = found["flops"] / 16
    # The compiler also counts norms and activations, and masked scores as they are computed.
    assert structured.flops(config, shapes) == pytest.approx(counted, rel=0.05)


def test_parameters_and_bytes_by_hand():
    keep = {name: np.arange(12) for name in structured.groups(CONFIG)}
    small = structured.cut(PARAMS, structured.groups(CONFIG), keep)
    assert tree.size(PARAMS) - tree.size(small) == 2 * 2 * 16 * 12
    assert structured.memory(small) == 4 * tree.size(small)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({}, "neither was given"),
        ({"sparsity": 0.5, "budget": Budget(params=9)}, "both were given"),
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": 0.99}, "leaves 0 of the 24 units of group 'a'"),
        ({"sparsity": 0.9, "multiple": 8}, "leaves 2 .* which multiple = 8 rounds to nothing"),
        ({"sparsity": 0.5, "multiple": 32}, "24 units, which multiple = 32 rounds to nothing"),
        ({"sparsity": 0.5, "multiple": 0}, "multiple must be an integer of at least 1"),
        ({"sparsity": 0.97, "uniform": False}, "leaves 1 of 48 units, but the 2 groups"),
        ({"budget": Budget()}, "must have one of params, flops, bytes, latency, got none"),
        ({"budget": Budget(params=1, flops=2)}, "got params, flops"),
        ({"budget": Budget(flops=1, context=0)}, "context of a budget must be an integer"),
        ({"budget": Budget(latency=1, measure=lambda _: 1.0), "config": CONFIG},
         r"for the groups of structured.groups\(config\), and 'a' is another"),
        ({"budget": Budget(params=-1)}, "must be a number above 0"),
        ({"budget": Budget(params=9)}, "needs params="),
        ({"budget": Budget(flops=9), "params": PARAMS}, "needs config="),
        ({"budget": Budget(latency=9)}, "needs measure="),
        ({"budget": Budget(params=1), "params": {"a": np.ones(24), "b": np.ones(24)}},
         "params = 1 cannot be met: .* has 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(how, sentence):
    refused(sentence, lambda: structured.choose(GROUPS, UNITS, **how))


def test_scores_that_do_not_fit():
    refused("group 'b' has no scores", lambda: structured.choose(
        GROUPS, {"a": UNITS["a"]}, sparsity=0.5))  # fmt: skip
    refused(r"must have shape \(24,\), got \(3,\)", lambda: structured.choose(
        GROUPS, UNITS | {"b": np.ones(3)}, sparsity=0.5))  # fmt: skip
    refused("have NaN", lambda: structured.choose(
        GROUPS, UNITS | {"b": np.full(24, np.nan)}, sparsity=0.5))  # fmt: skip
