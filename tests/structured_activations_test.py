"""Scores of units and layers from activations, against float64 and by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import calibration, structured
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.structured import Group
from swe_prune.structured.activations import KINDS, activation_scores, readers
from swe_prune.structured.depth import depth_scores, residual_states

CONFIG = ModelConfig(layers=2, heads=4, kv_heads=2, width=16, context=8, hidden=24, gated=True)
MODEL = gpt.build(CONFIG, vocab_size=11)
BATCHES = np.random.default_rng(0).integers(0, 11, (2, 3, 8)).astype(np.int32)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), BATCHES[0])["params"]
NEURONS, HEADS = (structured.groups(CONFIG, units) for units in ("neurons", "heads"))
RULES = [r"mlp/down/kernel$", r"attention/out/kernel$"]
MOMENTS = calibration.moments(MODEL, PARAMS, BATCHES, leaves=RULES)
SAMPLES = calibration.samples(MODEL, PARAMS, BATCHES, leaves=RULES, tokens=48)
DOWN, OUT = "block_1/mlp/down/kernel", "block_1/attention/out/kernel"


def test_the_reader_of_a_group_has_its_units_along_its_inputs():
    assert readers(NEURONS, PARAMS) == {
        f"block_{i}/neurons": f"block_{i}/mlp/down/kernel" for i in range(2)
    }
    assert readers(HEADS, PARAMS)["block_1/heads"] == OUT


def of(groups, kind, moments=MOMENTS):
    found = activation_scores(groups, PARAMS, kind, moments)
    assert {name: score.shape for name, score in found.items()} == {
        name: group.shape for name, group in groups.items()
    }
    assert all(score.dtype == jnp.float32 for score in found.values())
    return np.asarray(found[f"block_1/{'heads' if groups is HEADS else 'neurons'}"])


def test_scores_of_neurons_are_their_formulas():
    x = np.asarray(SAMPLES[DOWN], np.float64)  # all the tokens
    np.testing.assert_allclose(of(NEURONS, "activation_variance"), x.var(0), rtol=1e-4)
    mlp = jax.tree.map(lambda w: np.asarray(w, np.float64), PARAMS["block_1"]["mlp"])
    into = np.sqrt((mlp["up"]["kernel"] ** 2).sum(0) + (mlp["gate"]["kernel"] ** 2).sum(0))
    out = np.linalg.norm(mlp["down"]["kernel"], axis=1)
    np.testing.assert_allclose(of(NEURONS, "weight_norm"), into * out, rtol=1e-5)
    product = np.sqrt((x**2).mean(0)) * out
    np.testing.assert_allclose(of(NEURONS, "input_norm_product"), product, rtol=1e-5)
    np.testing.assert_allclose(of(NEURONS, "activation_norm"), MOMENTS[DOWN].sequence, rtol=1e-6)


def test_scores_of_heads_join_their_values():
    x = np.asarray(SAMPLES[OUT], np.float64)
    variance = x.var(0).reshape(2, 8).sum(1)  # two key-value heads, each with two of 4 values
    np.testing.assert_allclose(of(HEADS, "activation_variance"), variance, rtol=1e-4)
    norm = np.linalg.norm(np.asarray(MOMENTS[OUT].sequence).reshape(2, 8), axis=1)
    np.testing.assert_allclose(of(HEADS, "activation_norm"), norm, rtol=1e-5)


def test_random_scores_differ_by_group_and_seed():
    first, again, other = (
        activation_scores(NEURONS, PARAMS, "random", seed=seed) for seed in (0, 0, 1)
    )
    assert (first["block_0/neurons"] == again["block_0/neurons"]).all()
    assert (first["block_0/neurons"] != other["block_0/neurons"]).all()
    assert (first["block_0/neurons"] != first["block_1/neurons"]).all()


def test_every_kind_makes_a_choice():
    for kind in KINDS:
        keep = structured.choose(
            NEURONS, activation_scores(NEURONS, PARAMS, kind, MOMENTS), sparsity=0.34
        )
        assert {name: len(kept) for name, kept in keep.items()} == dict.fromkeys(NEURONS, 16)


def test_depth_scores_are_those_of_the_residual_stream():
    states = residual_states(MODEL, r"block_\d+")
    found = jax.jit(states)(PARAMS, BATCHES[0])
    assert len(found) == 3
    streams = [jax.jit(states)(PARAMS, batch) for batch in BATCHES]
    x = [np.concatenate([np.asarray(one[at], np.float64) for one in streams]) for at in range(3)]
    cosine = [
        ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        for a, b in itertools.pairwise(x)
    ]
    influence = depth_scores(states, PARAMS, list(BATCHES))
    np.testing.assert_allclose(influence, [np.mean(1 - c) for c in cosine], rtol=1e-4, atol=1e-6)
    angle = depth_scores(states, PARAMS, list(BATCHES), "angular_distance")
    np.testing.assert_allclose(angle, [np.mean(np.arccos(c) / np.pi) for c in cosine], rtol=1e-3)
    groups = structured.groups(CONFIG, "layers")
    kept = structured.choose(groups, {"layers": influence}, sparsity=0.5)["layers"]
    assert kept.tolist() == [int(np.argmax(influence))]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: activation_scores(NEURONS, PARAMS, "activation_nrom"),
            "did you mean 'activation_norm'",
        ),
        (
            lambda: activation_scores(NEURONS, PARAMS, "activation_norm"),
            "were not measured; give moments=",
        ),
        (
            lambda: readers({"a": Group(24, {r"block_0/mlp/up/kernel$": -1})}, PARAMS),
            "no weight reads",
        ),
        (
            lambda: activation_scores(
                NEURONS,
                PARAMS,
                "activation_norm",
                {
                    **MOMENTS,
                    "block_0/mlp/down/kernel": MOMENTS[OUT],
                },
            ),
            r"have shape \(16,\), and it has inputs \(24,\)",
        ),
        (
            lambda: depth_scores(lambda p, b: [b], PARAMS, list(BATCHES)),
            "two or more arrays of one shape",
        ),
        (lambda: depth_scores(lambda p, b: [b, b], PARAMS, []), "calibration set is empty"),
        (
            lambda: depth_scores(residual_states(MODEL, "blok"), PARAMS, list(BATCHES)),
            "blocks= names 'blok'",
        ),
        (
            lambda: depth_scores(lambda p, b: [b], PARAMS, list(BATCHES), "cosine"),
            "kind must be one of",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()
