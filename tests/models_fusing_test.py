"""Fused projections compute the same; layers that cannot be joined are left as they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_tiny import CONFIGS, VOCAB, left_padded, model

from swe_prune import interop, tree
from swe_prune.errors import InputError
from swe_prune.evaluation.generation import generate
from swe_prune.evaluation.sampling import GREEDY
from swe_prune.models import gpt

PROJECTIONS = {"query", "key", "value", "gate", "up"}


def layers(params):
    return {part for name, _ in tree.named_leaves(params) for part in name.split("/")}


@pytest.mark.quick(6)
@pytest.mark.parametrize(("name", "scan"), [*((name, False) for name in CONFIGS), ("qwen3", True)])
def test_fused_projections_compute_the_same(name, scan):
    made = model(name)
    decoder = gpt.build(dataclasses.replace(made.config, scan_layers=scan), VOCAB)
    fused = gpt.fuse(made.params)
    left = layers(fused) & PROJECTIONS
    plain = {"up"} if not made.config.gated else set()
    assert left == ({"gate", "up"} if made.config.experts else plain)
    tokens_BxL, valid_BxL = left_padded([9, 5], 9)
    run = jax.jit(lambda params: decoder.apply({"params": params}, tokens_BxL, valid_BxL=valid_BxL))
    np.testing.assert_allclose(run(fused), run(made.params), rtol=2e-5, atol=2e-5)
    assert tree.size(fused) == tree.size(made.params)


def test_fused_parameters_generate_the_same_text_and_are_fused_once():
    made, prompts = model("qwen3"), [[3, 1, 4, 1, 5, 9, 2], [2, 6, 5]]
    decoder, fused = gpt.build(made.config, VOCAB), gpt.fuse(made.params)
    texts = [
        generate(decoder, params, prompts, 9, sampling=GREEDY, seed=0).tokens
        for params in (made.params, fused)
    ]
    assert texts[0] == texts[1]
    again = gpt.fuse(fused)
    assert all(a is b for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(again), strict=True))
    assert fused["final_norm"]["scale"] is made.params["final_norm"]["scale"]


def test_what_cannot_be_one_product_is_left():
    wide, other = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((4, 3))}
    biased = wide | {"bias": jnp.ones(3)}
    half = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    stacked = {"kernel": jnp.ones((5, 2, 3))}
    for gate, up in ((wide, other), (wide, biased), (wide, half), (stacked, stacked)):
        params = {"mlp": {"gate": gate, "up": up}}
        assert gpt.fuse(params)["mlp"].keys() == {"gate", "up"}
    joined = gpt.fuse({"mlp": {"gate": biased, "up": biased}})["mlp"]["gate_up"]
    assert joined["kernel"].shape == (2, 6)
    assert joined["bias"].shape == (6,)


def test_what_holds_no_arrays_is_refused():
    with pytest.raises(InputError, match="params must hold arrays alone"):
        gpt.fuse({"mlp": {"gate": {"kernel": [[1.0]]}, "up": {"kernel": [[1.0]]}}})


def test_fused_parameters_are_not_exported(tmp_path):
    made = model("llama")
    with pytest.raises(InputError, match=r"query_key_value.* must have shape none"):
        interop.export(tmp_path / "out", made, gpt.fuse(made.params))
