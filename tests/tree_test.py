import math
import re
from fractions import Fraction
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import counting, tree
from swe_prune.errors import InputError

COUNTS = st.integers(0, 2**48 - 1)


def chosen(params, **rules):
    return {name for name, leaf in tree.named_leaves(tree.prunable(params, **rules)) if leaf}


def nested(*names, shape=(2, 2)):
    """A tree of weights under the given paths."""
    params = {}
    for name in names:
        node = params
        *groups, leaf = name.split("/")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = jnp.ones(shape)
    return params


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_counts_compare_and_subtract_as_integers_do(a, b):
    a, b = max(a, b), min(a, b)
    x, y = counting.count(a), counting.count(b)
    assert int(x) == a
    assert bool(x >= y)
    assert bool(y >= x) == (a == b)
    assert bool(x.equals(y)) == (a == b)
    assert int(x.minus(y)) == a - b
    assert int(x.saturated()) == min(a, 2**32 - 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**33), min_size=1, max_size=20))
def test_counts_add_as_integers_do(values):
    assert int(counting.total([counting.count(value) for value in values])) == sum(values)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_counts_of_arrays_hold_all_32_bits(value):
    assert int(counting.count(np.array(value, np.uint32))) == value


def test_many_counts_with_full_limbs_do_not_overflow():
    largest = counting.Count(jnp.uint32(0xFFFF), jnp.uint32(0xFFFF))
    assert int(counting.total([largest] * 2**12)) == 2**12 * (2**32 - 1)


def test_limbs_compare_before_they_are_carried():
    assert not bool(counting.count(2**16 - 1) >= counting.count(2**16))
    assert bool(counting.count(2**16) >= counting.count(2**16 - 1))


@pytest.mark.parametrize("axes", [None, (0,), (1,), (0, 1)])
def test_count_true_is_numpys_sum(axes):
    mask = np.random.default_rng(0).random((37, 53)) < 0.3
    got = counting.count_true([jnp.asarray(mask)], axes)
    expected = mask.sum(axis=axes, keepdims=axes is not None)
    np.testing.assert_array_equal((np.asarray(got.high) << 16) + np.asarray(got.low), expected)
    both = counting.count_each([jnp.asarray(mask), jnp.asarray(~mask)], axes)
    np.testing.assert_array_equal(both[0], expected)
    np.testing.assert_array_equal(both[1], (~mask).sum(axis=axes, keepdims=axes is not None))


def test_linen_attention_is_prunable_and_not_taken_for_the_head():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(5, 8, name="token_embedding")(x)
            x = nn.LayerNorm()(x)
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            x = nn.DenseGeneral((2, 4), name="up")(x)
            return nn.Dense(5, name="lm_head")(x)

    params = Model().init(jax.random.key(0), jnp.zeros((1, 3), int))
    attention = "params/MultiHeadDotProductAttention_0"
    assert chosen(params) == {
        *(f"{attention}/{part}/kernel" for part in ("query", "key", "value", "out")),
        "params/up/kernel",
    }
    assert params["params"]["up"]["bias"].ndim == 2


def test_nnx_weights_are_chosen_by_the_same_rules():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.blocks = nnx.List([nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)])
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    parts = ("query", "key", "value", "out")
    assert chosen(params) == {f"blocks/0/{part}/kernel" for part in parts}


DENSE = {
    "embedding": (
        "transformer/wte", "wpe/embedding", "model/embed_tokens/w", "pos_embedding",
        "transformer.wte.weight", "transformer.wpe.weight", "pos_emb", "cls_token", "mask_token",
        "model.embed_tokens.weight", "encoder/position_embedding", "vit/pos_embed",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "swin.layers.0.attn.relative_position_bias_table", "tok_emb/w", "decoder.token_emb.weight",
        "positional_encoding", "bert.embeddings.word_embeddings.weight",
    ),
    "output head": (
        "lm_head/w", "head/kernel", "heads/0/head_0/kernel", "logits/kernel", "classifier/w",
        "token_classifier", "decoder/output_logits_2/kernel", "lm_head.weight", "score.weight",
        "decoder/logits_dense/kernel", "score/kernel", "cls/predictions/decoder/kernel",
        "cls.predictions.decoder.weight", "embed_out.weight", "gpt_neox/embed_out/kernel",
        "transformer.output_layer.weight", "classifier.weight", "output.weight",
        "params/lm_head/kernel", "classification_head/out_proj/kernel", "model.lm_head.weight",
    ),
    "router": (
        "moe/router/kernel", "moe/gate/kernel", "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight", "block_0/moe/router/w", "router_weights/w",
        "layers.3.ffn.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight",
        "block.1.layer.1.mlp.router.wi.weight",
    ),
    "norm": (
        "h_0/ln_1/scale", "ln_f/g", "RMSNorm_0/scale", "attention_norm/scale", "layers/rms/scale",
        "transformer.h.0.ln_1.weight", "encoder.ln.weight", "encoder/layer_norm/w", "rms/scale",
        "model.layers.0.input_layernorm.weight", "model.norm.weight", "rms_1/w",
    ),
    "bias": (
        "mlp/up/bias", "attention/query/bias", "layers/up/b", "h.0.attn.c_attn.bias", "bias",
        "layers/bn/beta", "layers/0/up/b",
    ),
    "scale": ("layers/ls/gamma", "layers/ls/scale", "blocks.0.ls1.gamma", "up/g"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, names in DENSE.items() for name in names]
)
def test_what_is_no_projection_is_dense_for_its_reason(kind, name):
    assert chosen({name: jnp.ones((2, 2)), "mlp/up/kernel": jnp.ones((2, 2))}) == {"mlp/up/kernel"}
    assert tree.dense_reason(name, jnp.ones((2, 2))) == kind


@pytest.mark.parametrize(
    "name",
    [
        "h_0/attn/c_attn/kernel", "h_0/mlp/c_proj/kernel", "layers/0/self_attn/q_proj/w",
        "multi_head_attention/query/kernel", "multi_head/out/kernel", "attention/head_0/kernel",
        "mlp/linear/kernel", "headless/kernel", "down/kernel", "0/weight", "qln/kernel",
        "attention.head_0.weight", "MultiHeadDotProductAttention_0/out/kernel", "linear/kernel",
        "attention/score/kernel", "self_attn.score_proj.weight", "attention/score_proj/kernel",
        "headline/kernel", "block_0/mlp/gate/kernel", "model.layers.0.mlp.gate_proj.weight",
        "lstm/gate/kernel", "lstm/forget_gate/kernel", "layers/gating_einsum/w", "b/kernel", "b",
        "moe/experts/gate/kernel", "experts/0/gate_proj/kernel", "layers.0.experts.3.w1.weight",
        "bert.encoder.layer.0.output.dense.weight", "encoder/beta_net/kernel", "gamma_net/w",
        "transformer.h.0.attn.c_proj.weight", "model.layers.0.mlp.up_proj.weight", "armse/kernel",
        "decoder/decoder_layer/kernel", "scores_net/kernel", "token_mixer/kernel",
    ],
)  # fmt: skip
def test_projections_are_prunable(name):
    assert chosen({name: jnp.ones((2, 2))}) == {name}


def test_only_floats_of_two_axes_are_prunable_by_default():
    params = {
        "w": jnp.ones((2, 2), jnp.bfloat16), "v": jnp.ones(2), "i": jnp.ones((2, 2), int),
        "s": jnp.ones(()), "none": None, "f": jnp.tanh, "name": "x", "number": 1.0,
        "numpy": np.ones((2, 2)), "abstract": jax.ShapeDtypeStruct((2, 2), jnp.float32),
        "key": jax.random.key(0),
    }  # fmt: skip
    assert chosen(params) == {"w", "numpy", "abstract"}
    assert tree.prunable(params)["none"] is None


def test_rules_choose_by_search_and_exclude_wins():
    params = nested("a/kernel", "b/kernel", "b/embed")
    assert chosen(params, include=(r"kernel$",)) == {"a/kernel", "b/kernel"}
    assert chosen(params, include=r"kernel$") == {"a/kernel", "b/kernel"}
    assert chosen(params, include=(r"^b",)) == {"b/kernel"}
    assert chosen(params, include=(r"^b",), exclude=()) == {"b/kernel", "b/embed"}
    assert chosen(params, exclude=(r"^b",)) == {"a/kernel"}
    assert chosen(params, exclude=r"^b") == {"a/kernel"}
    assert chosen(nested("v", shape=(3,)), include=(r"v",)) == {"v"}


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_rule_that_matches_nothing_or_is_malformed_is_refused(kind):
    with pytest.raises(InputError, match=f"{kind} rule 'kernl' matches no weight.*a/kernel"):
        tree.prunable(nested("a/kernel"), **{kind: ("kernl",)})
    with pytest.raises(InputError, match="is not a regular expression"):
        tree.prunable(nested("a/kernel"), **{kind: ("(",)})


@pytest.mark.parametrize("params", [{}, nested("head/kernel"), {"a": {"bias": jnp.ones(3)}}])
def test_nothing_prunable_is_refused(params):
    with pytest.raises(InputError, match="no weight is prunable"):
        tree.prunable(params)


def test_every_leaf_is_either_prunable_or_has_a_reason():
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones((2, 2)), "v": jnp.ones(2), "i": 3}
    for name, leaf in tree.named_leaves(params):
        assert bool(tree.dense_reason(name, leaf)) != (name in chosen(params))
        assert bool(tree.dense_reason(name, leaf, include=("w",))) != (name == "w")


class Pair(NamedTuple):
    left: object
    right: object


def test_names_and_maps_cover_tuples_lists_and_none():
    params = Pair([1, None], (2, {"a": 3}))
    assert list(tree.named_leaves(params)) == [
        ("left/0", 1), ("left/1", None), ("right/0", 2), ("right/1/a", 3),
    ]  # fmt: skip
    doubled = tree.map_named(lambda name, leaf, twin: (name, leaf + twin), params, params)
    assert doubled == Pair([("left/0", 2), None], (("right/0", 4), {"a": ("right/1/a", 6)}))
    assert tree.map_tracked(lambda leaf: -leaf, params) == Pair([-1, None], (-2, {"a": -3}))


def test_trees_of_different_structure_are_refused():
    with pytest.raises(InputError, match="differ in structure"):
        tree.map_named(lambda *_: 0, {"a": 1, "b": 2}, {"a": 1})


def test_default_rules_are_regular_expressions():
    for rule in tree.DENSE_BY_DEFAULT.values():
        re.compile(rule)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**48 - 1),
    st.floats(0, 1, width=32).filter(lambda x: x == 0 or x >= 2**-24),
    st.booleans(),
)
def test_a_share_is_the_exact_product_rounded(size, fraction, up):
    exact = Fraction(size) * Fraction(fraction) + (Fraction(1, 2) if up else 0)
    got = counting.share(size, jnp.float32(fraction), up=up)
    assert int(got) == math.floor(exact)


def test_a_share_beyond_its_range_is_clipped():
    assert int(counting.share(2**40 + 1, jnp.float32(-0.5))) == 0
    assert int(counting.share(2**40 + 1, jnp.float32(1.5))) == 2**40 + 1
