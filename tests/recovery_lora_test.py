"""Adapters of a pruned model: trained alone, and merged without losing a zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from swe_prune import importance, masks, tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.training import lora
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.distillation import Distillation
from swe_prune.training.state import Frozen

SYMBOLS = 11
CONFIG = ModelConfig(layers=2, heads=2, width=16, context=8, use_bias=True, tied_head=False)
MODEL = gpt.build(CONFIG, SYMBOLS)
EVERYTHING = ("kernel$", "embedding")
ADAMW = optax.adamw(1e-2, weight_decay=0.1)
compile_once = functools.cache(step_lib.compile_train_step)


@functools.cache
def pruned(seed=0, sparsity=0.5):
    params = jax.tree.map(lambda x: 5 * x, state_lib.init_params(MODEL, seed, 8))
    mask = masks.by_sparsity(importance.score("magnitude", params), sparsity)
    return masks.apply(params, mask), mask


def batch_of(seed):
    tokens = np.random.default_rng(seed).integers(0, SYMBOLS, (4, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def moved(adapters, seed=0):
    """Returns adapters none of whose factors is 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.standard_normal(x.shape, np.float32), adapters)


def adapted_names(adapters):
    return [name for name, leaf in tree.named_leaves(adapters.down) if leaf is not None]


def assert_zeros(params, mask):
    kept = dict(tree.named_leaves(mask))
    for name, weight in tree.named_leaves(params):
        if kept[name] is not None:
            weight, keep = np.asarray(weight.astype(jnp.float32)), np.asarray(kept[name])
            assert (weight[~keep] == 0).all(), name
            assert (weight[keep] != 0).all(), name


def logits(params, seed=0):
    return jax.jit(MODEL.apply)({"params": params}, batch_of(seed)["inputs"])


def train(base, mask, adapters, steps=20, optimizer=ADAMW, **options):
    teacher = options.pop("teacher", None)
    fixed = Frozen(base=base, masks=mask, teacher=teacher)
    state = state_lib.create(adapters, optimizer, 0)
    step = compile_once(MODEL, optimizer, **options)
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch_of(0), fixed)
        found.append(float(metrics["loss"]))
    return state.params, found


def test_fresh_adapters_change_nothing():
    base, mask = pruned()
    adapters = lora.init(base, 2, 4.0, jax.random.key(0))
    for made in (lora.apply(base, adapters, mask), lora.merge(base, adapters, mask)):
        jax.tree.map(np.testing.assert_array_equal, made, base)


def test_an_adapted_weight_is_that_of_the_paper():
    base, mask = pruned()
    adapters = moved(lora.init(base, 3, 6.0, jax.random.key(0)))
    name = ("block_1", "mlp", "up", "kernel")
    kernel, keep, down, up, made = (
        np.asarray(of[name[0]][name[1]][name[2]][name[3]])
        for of in (base, mask, adapters.down, adapters.up, lora.apply(base, adapters, mask))
    )
    expected = np.where(keep, kernel + 2.0 * down.astype(np.float64) @ up, 0)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_what_is_drawn_is_of_unit_variance_over_the_inputs_and_depends_on_the_name():
    params = {"a": {"kernel": jnp.ones((400, 50))}, "b": {"kernel": jnp.ones((400, 50))}}
    adapters = lora.init(params, 50, 1.0, jax.random.key(0))
    a, b = (np.asarray(adapters.down[name]["kernel"]) for name in "ab")
    assert a.std() == pytest.approx(400**-0.5, rel=0.05)
    assert np.abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05
    alone = lora.init({"b": params["b"]}, 50, 1.0, jax.random.key(0))
    np.testing.assert_array_equal(alone.down["b"]["kernel"], b)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_every_zero_stays_and_the_merged_model_is_the_adapted_one(sparsity):
    base, mask = pruned(sparsity=sparsity)
    adapters = moved(lora.init(base, 2, 4.0, jax.random.key(0), EVERYTHING))
    whole, merged = (f(base, adapters, mask) for f in (lora.apply, lora.merge))
    assert_zeros(whole, mask)
    assert_zeros(merged, mask)
    np.testing.assert_allclose(logits(merged), logits(whole), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(merged) - logits(base)).max() > 0.1


def test_training_moves_the_adapters_alone():
    base, mask = pruned()
    before = jax.device_get(base)
    adapters, found = train(base, mask, lora.init(base, 4, 8.0, jax.random.key(0)))
    assert found[-1] < 0.8 * found[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)
    merged = lora.merge(base, adapters, mask)
    assert_zeros(merged, mask)
    np.testing.assert_allclose(
        logits(merged), logits(lora.apply(base, adapters, mask)), rtol=1e-5, atol=1e-5
    )
    summed = step_lib.eval_step(merged, batch_of(0), model=MODEL)
    assert float(summed) / 32 < found[-2]


def test_dense_tensors_are_adapted_where_rules_name_them():
    base, mask = pruned()
    adapters = lora.init(base, 2, 4.0, jax.random.key(0), ("head/kernel", "^embedding"))
    assert adapted_names(adapters) == ["embedding/embedding", "head/kernel"]
    adapters, found = train(base, mask, adapters)
    assert found[-1] < found[0]
    merged = lora.merge(base, adapters, mask)
    for name in adapted_names(adapters):
        first, second = name.split("/")
        assert (np.asarray(merged[first][second]) != np.asarray(base[first][second])).all()
    assert_zeros(merged, mask)
    untouched = merged["block_0"]
    jax.tree.map(np.testing.assert_array_equal, untouched, base["block_0"])


def test_without_rules_the_prunable_kernels_are_adapted():
    base, mask = pruned()
    adapters = lora.init(base, 2, 4.0, jax.random.key(0))
    expected = [name for name, leaf in tree.named_leaves(mask) if leaf is not None]
    assert adapted_names(adapters) == expected


def test_without_masks_nothing_is_pruned():
    base, _ = pruned()
    made = lora.merge(base, moved(lora.init(base, 2, 4.0, jax.random.key(0))))
    assert (np.asarray(made["block_0"]["mlp"]["up"]["kernel"]) != 0).all()


@pytest.mark.slow
def test_parts_of_a_batch_and_a_teacher_serve_adapters_too():
    base, mask = pruned()
    teacher, _ = pruned(seed=1)
    options = {"distillation": Distillation(0.5, 2.0), "teacher": teacher, "steps": 3}
    fresh = lora.init(base, 4, 8.0, jax.random.key(0))
    sgd = optax.sgd(1e-2)
    (a, losses_a), (b, losses_b) = (
        train(base, mask, jax.tree.map(jnp.copy, fresh), optimizer=sgd, accumulate=n, **options)
        for n in (1, 2)
    )
    np.testing.assert_allclose(losses_a, losses_b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    assert losses_a[2] < losses_a[0]


@pytest.mark.slow
def test_kernels_of_more_than_two_axes_are_adapted_as_matrices():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    x_BxLxD = np.random.default_rng(0).standard_normal((1, 3, 6)).astype(np.float32)
    params = jax.jit(attention.init)(jax.random.key(0), x_BxLxD)["params"]
    adapters = moved(lora.init(params, 2, 2.0, jax.random.key(0)))
    sides = {
        name: (a.shape[0], b.shape[1])
        for (name, a), (_, b) in zip(
            tree.named_leaves(adapters.down), tree.named_leaves(adapters.up), strict=True
        )
        if a is not None
    }
    assert sides == {
        "key/kernel": (6, 8), "out/kernel": (8, 6), "query/kernel": (6, 8), "value/kernel": (6, 8)
    }  # fmt: skip
    mask = masks.by_sparsity(importance.score("random", params, seed=0), 0.5)
    merged = lora.merge(params, adapters, mask)
    assert_zeros(merged, mask)
    delta = np.asarray(adapters.down["out"]["kernel"]) @ np.asarray(adapters.up["out"]["kernel"])
    whole = np.asarray(params["out"]["kernel"]) + delta.reshape(2, 4, 6)
    keep = np.asarray(mask["out"]["kernel"])
    np.testing.assert_allclose(
        merged["out"]["kernel"], np.where(keep, whole, 0), rtol=1e-5, atol=1e-5
    )
    changed = attention.apply({"params": merged}, x_BxLxD)
    assert np.isfinite(changed).all()


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapters_their_precision():
    base, mask = pruned()
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    adapters = lora.init(base, 2, 4.0, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    small = jax.tree.map(lambda x: 1e-3 * x, moved(adapters))
    whole, merged = (f(base, small, mask) for f in (lora.apply, lora.merge))
    name = ("block_0", "mlp", "up", "kernel")
    kernel, of_whole, of_merged = (
        t[name[0]][name[1]][name[2]][name[3]] for t in (base, whole, merged)
    )
    assert (of_whole.dtype, of_merged.dtype) == (jnp.float32, jnp.bfloat16)
    keep = np.asarray(mask[name[0]][name[1]][name[2]][name[3]])
    changed = np.asarray(of_whole) != np.asarray(kernel.astype(jnp.float32))
    rounded = np.asarray(of_merged.astype(jnp.float32)) != np.asarray(kernel.astype(jnp.float32))
    assert changed[keep].mean() > 0.7  # the others are below float32's own digits
    assert rounded[keep].mean() < 0.1
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, base)
    assert_zeros(merged, mask)
    _, found = train(base, mask, adapters)
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": "attn/kernel"}, "rule 'attn/kernel' matches no weight of two axes or more"),
        ({"targets": ("kernel", "bias$")}, "rule 'bias\\$' matches no weight"),
        ({"targets": "("}, "is not a regular expression"),
        ({"targets": ()}, "names no rule"),
        ({"rank": 17}, "smaller side of 'block_0/attention/key/kernel', 16 x 16.* lower it to 16"),
        ({"rank": 12, "targets": "head"}, "smaller side of 'head/kernel', 16 x 11"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be .* got 0.0"),
        ({"alpha": float("nan")}, "alpha must be .* got nan"),
    ],
)
def test_what_cannot_be_adapted_is_said(changes, match):
    base, _ = pruned()
    options = {"rank": 2, "alpha": 2.0, "key": jax.random.key(0)} | changes
    with pytest.raises(InputError, match=match):
        lora.init(base, **options)


def test_adapters_of_another_model_are_refused():
    base, mask = pruned()
    adapters = lora.init(base, 2, 2.0, jax.random.key(0))
    with pytest.raises(InputError, match="differ in structure"):
        lora.merge({"kernel": jnp.ones((2, 2))}, adapters)
    narrow = state_lib.init_params(gpt.build(dataclasses.replace(CONFIG, width=8), SYMBOLS), 0, 8)
    with pytest.raises(InputError, match="a matrix of 16 x 16, but the weight has shape"):
        lora.merge(narrow, adapters)
    with pytest.raises(InputError, match="differ in structure"):
        lora.merge(base, adapters, {"kernel": mask["head"]})
