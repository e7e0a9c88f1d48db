"""Ling's routing, losses and loads against the formulas written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.models.block import MLP
from swe_prune.models.experts import Experts
from swe_prune.related import ling, spikes

N, E, K, V = 7, 5, 2, 6
CONFIG = ModelConfig(
    layers=2, heads=2, width=8, context=4, gated=True, hidden=4, experts=E, experts_per_token=K,
    tied_head=False,
)  # fmt: skip
MODEL = ling.Ling(gpt.build(CONFIG, V), shared=6)
TOKENS = jnp.arange(8).reshape(2, 4) % V
BATCH = {"inputs": TOKENS, "targets": TOKENS}


@pytest.fixture(scope="module")
def scores():
    return jnp.asarray(np.random.default_rng(0).normal(size=(N, E)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    found = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(1)  # larger weights, so that the experts differ
    return jax.tree.map(lambda x: x + 0.3 * random.normal(size=x.shape).astype(np.float32), found)


def softmax(x):
    x = np.exp(np.float64(x) - np.float64(x).max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def top(scores, k):
    weight = np.zeros(np.shape(scores))
    for row, p in enumerate(softmax(scores)):
        chosen = np.argsort(-p)[:k]
        weight[row, chosen] = p[chosen] / p[chosen].sum()
    return weight


def test_routing_and_its_losses(scores):
    weight = top(scores, K)
    np.testing.assert_allclose(ling.routed(scores, K), weight, atol=1e-6)
    z = np.log(np.exp(np.float64(scores)).sum(1))
    assert float(ling.z_loss(scores)) == pytest.approx((z**2).mean(), rel=1e-5)
    share = (weight > 0).sum(0) / (N * K)
    exact = E * (share * softmax(scores).mean(0)).sum()
    assert float(ling.balance_loss(scores, K)) == pytest.approx(exact, rel=1e-5)
    assert float(ling.balance_loss(jnp.zeros((N, E)), E)) == pytest.approx(1.0)


def test_the_warm_up_goes_from_noise_of_the_scores_size_to_the_scores(scores):
    key = jax.random.key(0)
    np.testing.assert_array_equal(ling.warmed(scores, 1.0, key), scores)
    many = jnp.tile(scores, (400, 1))
    noise = np.asarray(ling.warmed(many, 0.0, key), np.float64)
    assert noise.mean() == pytest.approx(float(scores.mean()), abs=0.05)
    assert noise.std() == pytest.approx(float(scores.std()), rel=0.05)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(many))[0, 1]) < 0.05
    half = np.asarray(ling.warmed(many, 0.5, key), np.float64)
    np.testing.assert_allclose(half, 0.5 * np.float64(many) + 0.5 * noise, atol=1e-5)


@pytest.mark.slow
def test_the_columns_of_the_head_have_norm_one(params):
    kernel = params["head"]["kernel"]
    exact = np.float64(kernel) / np.linalg.norm(np.float64(kernel), axis=0)
    np.testing.assert_allclose(ling.normed(kernel), exact, rtol=1e-5)
    np.testing.assert_array_equal(ling.normed(jnp.zeros((2, 3))), np.zeros((2, 3)))
    scaled = {**params, "head": {"kernel": 3 * kernel}}
    logits = MODEL.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(MODEL.apply({"params": scaled}, TOKENS), logits, atol=1e-5)


def layer_of(params, x):
    """The experts of a layer and the shared one, from the modules of the decoder."""
    own = {name: one for name, one in params.items() if name != "shared"}
    config = dataclasses.replace(CONFIG, experts=None, hidden=6)
    shared = MLP(config).apply({"params": params["shared"]}, x)
    return Experts(CONFIG).apply({"params": own}, x) + shared


def test_a_layer_is_its_experts_and_the_shared_one(params):
    _, kept = MODEL.apply(
        {"params": params},
        TOKENS,
        capture_intermediates=lambda module, _: module.name in ("mlp", "mlp_norm"),
        mutable=["intermediates"],
    )
    block = kept["intermediates"]["block_1"]
    exact = layer_of(params["block_1"]["mlp"], block["mlp_norm"]["__call__"][0])
    np.testing.assert_allclose(block["mlp"]["__call__"][0], exact, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_the_text_and_of_the_routers(params):
    logits, kept = MODEL.apply({"params": params}, TOKENS, mutable=["intermediates"])
    p = softmax(logits)
    exact = -np.log(np.take_along_axis(p, np.asarray(TOKENS)[..., None], -1)).mean()
    for block in kept["intermediates"].values():
        (scores,) = block["mlp"]["router"]["scores"]
        z = np.log(np.exp(np.float64(scores)).sum(1))
        exact += 0.015 * float(ling.balance_loss(scores, K)) + 1e-4 * (z**2).mean()
    loss = jax.jit(MODEL.loss)
    assert float(loss(params, BATCH)) == pytest.approx(exact, rel=1e-5)
    cold, warm = (float(loss(params, BATCH, share, jax.random.key(3))) for share in (0.0, 1.0))
    assert warm == pytest.approx(exact, rel=1e-5)
    assert abs(cold - exact) > 1e-4


def test_loads_are_those_of_the_experts_own_tokens(params):
    found = ling.loads(MODEL, params, [BATCH, BATCH])
    _, kept = MODEL.apply(
        {"params": params},
        TOKENS,
        capture_intermediates=lambda module, _: module.name == "mlp_norm",
        mutable=["intermediates"],
    )
    for layer in range(2):
        block = kept["intermediates"][f"block_{layer}"]
        x = np.float64(block["mlp_norm"]["__call__"][0])
        own = jax.tree.map(np.float64, params[f"block_{layer}"]["mlp"])
        weight = top(x @ own["router"]["kernel"], K)
        saliency = np.zeros(E)
        for e in range(E):
            gate, up = (x @ own[name]["kernel"][e] for name in ("gate", "up"))
            h = np.asarray(jax.nn.gelu(jnp.asarray(gate))) * up
            y = h @ own["down"]["kernel"][e]
            saliency[e] = (weight[:, e] * np.linalg.norm(y, axis=1)).sum()
        load = found[f"block_{layer}/experts"]
        np.testing.assert_array_equal(load.tokens, 2 * (weight > 0).sum(0))
        np.testing.assert_allclose(load.saliency, 2 * saliency, rtol=1e-3)
        np.testing.assert_allclose(load.reap, load.saliency / np.maximum(load.tokens, 1))


def test_a_model_without_its_worst_experts_is_the_one_that_never_chooses_them(params):
    scores = {name: np.array([3.0, 1.0, 5.0, 2.0, 4.0]) for name in ling.groups(CONFIG)}
    small, cut = ling.without_experts(MODEL, params, scores, 0.4)
    assert small.model.config.experts == 3
    assert cut["block_0"]["mlp"]["up"]["kernel"].shape == (3, 8, 4)

    def never(call, args, kwargs, context):
        y = call(*args, **kwargs)
        return y.at[:, jnp.array([1, 3])].add(-1e9) if context.module.name == "router" else y

    with nn.intercept_methods(never):
        exact = MODEL.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(small.apply({"params": cut}, TOKENS), exact, rtol=1e-5, atol=1e-5)


def test_a_spike_is_dropped_and_a_lasting_one_lowers_the_rate():
    random = np.random.default_rng(0)
    calm = 2 + 0.1 * random.normal(size=20)
    watch = spikes.Watch.start()
    step = jax.jit(spikes.spiked, static_argnames=("warmup", "patience"))
    for loss in calm:
        watch, skip = step(watch, jnp.float32(loss), warmup=10)
        assert not skip
    # Until 1 / (1 - decay) losses the mean and variance are plain.
    assert float(watch.mean) == pytest.approx(calm.mean(), rel=1e-5)
    assert float(watch.variance) == pytest.approx(calm.var(), rel=1e-4)
    after, skip = step(watch, jnp.float32(9.0), warmup=10)
    assert skip
    assert (after.mean, after.variance, after.rate) == (watch.mean, watch.variance, 1)
    worse, skip = step(after, jnp.float32(jnp.nan), warmup=10)
    assert skip
    # The third in a row is taken, at half the rate, and the mean starts from it.
    last, skip = step(worse, jnp.float32(9.0), warmup=10)
    assert not skip
    assert (last.mean, last.variance, last.seen, last.rate) == (9, 0, 1, 0.5)
    # What is not finite is never taken.
    nans = worse
    for _ in range(4):
        nans, skip = step(nans, jnp.float32(jnp.inf), warmup=10)
        assert skip
    assert float(nans.rate) < 1
    # A calm loss ends the row.
    assert step(after, jnp.float32(2.0), warmup=10)[0].in_row == 0


def test_batches_that_are_put_back_return_once():
    batches = spikes.Again(iter(range(100)), chance=0.5, seed=1)
    assert next(batches) == 0
    batches.put(0)
    seen = [next(batches) for _ in range(50)]
    assert sorted(seen) == [0, *range(1, 50)]


DENSE = gpt.build(dataclasses.replace(CONFIG, experts=None), V)
TIED = gpt.build(dataclasses.replace(CONFIG, tied_head=True), V)
SCORES = {name: np.arange(float(E)) for name in ling.groups(CONFIG)}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: ling.routed(jnp.ones((N, E)), 0), "per_token must be between 1 and 5"),
        (lambda p: ling.routed(jnp.ones((N, E)), E + 1), "per_token must be between 1 and 5"),
        (lambda p: ling.Ling(DENSE, 4), "must have experts"),
        (lambda p: ling.Ling(TIED, 4), "tied_head=False"),
        (lambda p: ling.Ling(MODEL.model, -1), "0 or more"),
        (lambda p: ling.groups(DENSE.config), "no experts to cut"),
        (lambda p: ling.loads(MODEL, p, []), "at least one batch"),
        (lambda p: ling.loads(MODEL, p, [{}]), "mappings with 'inputs'"),
        (lambda p: ling.loads(MODEL, p, BATCH), "mappings with 'inputs'"),
        (lambda p: ling.z_loss(jnp.ones((0, E))), "at least one token"),
        (lambda p: ling.balance_loss(jnp.ones((0, E)), 1), "at least one token"),
        (lambda p: ling.warmed(jnp.ones((N, E)), 1.5, jax.random.key(0)), "between 0 and 1"),
        (lambda p: MODEL.loss(p, BATCH, 0.5), "warm needs random numbers; give key"),
        (lambda p: ling.without_experts(MODEL, p, SCORES, 0.8), "leaves 1 experts, .* sent to 2"),
        (lambda p: spikes.spiked(spikes.Watch.start(), jnp.float32(1), patience=0), "patience"),
        (lambda p: spikes.Again(iter([]), chance=0.0), "chance must be"),
    ],
)
def test_what_has_no_experts_to_route_is_refused(params, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(params)
