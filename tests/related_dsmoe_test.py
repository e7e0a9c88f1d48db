"""DSMoE's gated blocks against the formula written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.related import dsmoe

N, D, F, BLOCKS = 6, 5, 12, 4
MODEL = gpt.build(
    ModelConfig(layers=2, heads=2, width=8, context=4, gated=True, activation="silu", hidden=12), 5
)
TOKENS = jnp.arange(8).reshape(2, 4) % 5


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    names = {"up": (D, F), "gate": (D, F), "down": (F, D)}
    weights = {
        name: {
            "kernel": jnp.asarray(random.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(random.normal(size=shape[1]), jnp.float32),
        }
        for name, shape in names.items()
    }
    x = jnp.asarray(random.normal(size=(N, D)), jnp.float32)
    q = jnp.asarray(random.uniform(size=(N, BLOCKS)), jnp.float32)
    return x, weights, q


def silu(x):
    return x / (1 + np.exp(-x))


def sum_of_blocks(x, weights, factor):
    """The sum of the blocks by their factors, float64, one token and one block after another."""
    x, factor = np.asarray(x, np.float64), np.asarray(factor, np.float64)
    up, gate, down = (
        {k: np.asarray(v, np.float64) for k, v in weights[name].items()}
        for name in ("up", "gate", "down")
    )
    y = np.tile(down["bias"], (N, 1))
    size = F // BLOCKS
    for token in range(N):
        for i in range(BLOCKS):
            own = slice(i * size, (i + 1) * size)
            h = silu(x[token] @ gate["kernel"][:, own] + gate["bias"][own])
            h = h * (x[token] @ up["kernel"][:, own] + up["bias"][own])
            y[token] += factor[token, i] * (h @ down["kernel"][own])
    return y


def test_the_blocks_with_open_gates_are_the_dense_mlp_and_else_their_weighted_sum(arrays):
    x, weights, q = arrays
    ones = jnp.ones((N, BLOCKS))
    dense = silu(np.float64(x @ weights["gate"]["kernel"] + weights["gate"]["bias"]))
    dense = dense * (x @ weights["up"]["kernel"] + weights["up"]["bias"])
    dense = dense @ np.float64(weights["down"]["kernel"]) + weights["down"]["bias"]
    found = dsmoe.computed(x, weights, ones, "silu")
    np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        dsmoe.computed(x, weights, q, "silu"), sum_of_blocks(x, weights, q), rtol=1e-4, atol=1e-4
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.8, 0.999])
def test_skipping_changes_nothing(arrays, tau):
    x, weights, q = arrays
    exact = np.where(np.asarray(q) > tau, q, 0.0) * BLOCKS
    exact = exact / np.maximum((np.asarray(q) > tau).sum(1, keepdims=True), 1)
    parts = dsmoe.partitioned(weights, BLOCKS)
    for rungs in (1, 3, 64):
        found = dsmoe.skipped(x, parts, q, tau, activation="silu", rungs=rungs)
        np.testing.assert_allclose(found, sum_of_blocks(x, weights, exact), rtol=1e-4, atol=1e-4)


def test_a_closed_gate_learns_and_its_block_does_not(arrays):
    x, weights, _ = arrays
    q = jnp.tile(jnp.array([0.9, 0.2, 0.7, 0.1]), (N, 1))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), jnp.float32)

    def loss(weights, q, straight):
        factor = dsmoe.factors(q, 0.5, scaled=False, straight=straight)
        return (dsmoe.computed(x, weights, factor, "silu") * dy).sum()

    of_weights, of_q = jax.grad(loss, argnums=(0, 1))(weights, q, True)
    # o_i · dy for every block, open or not.
    for i in range(BLOCKS):
        alone = np.zeros((N, BLOCKS))
        alone[:, i] = 1
        o = sum_of_blocks(x, weights, alone) - np.asarray(weights["down"]["bias"])
        np.testing.assert_allclose(of_q[:, i], (o * dy).sum(1), rtol=1e-3, atol=1e-4)
    by_block = np.abs(of_weights["up"]["kernel"]).sum(0).reshape(BLOCKS, -1).sum(1)
    assert (by_block > 0).tolist() == [True, False, True, False]
    hard = jax.grad(loss, argnums=1)(weights, q, False)
    assert (np.abs(hard).sum(0) > 0).tolist() == [True, False, True, False]


def test_the_penalty_pulls_at_open_gates_alone():
    q = jnp.array([0.9, 0.5, 0.2])
    grad = jax.grad(lambda q: dsmoe.thresholded(q, 0.5).mean())(q)
    np.testing.assert_allclose(grad, [1 / 3, 0, 0], rtol=1e-6)


@pytest.mark.slow
def test_a_dense_checkpoint_goes_on_as_a_gated_model():
    dense = MODEL.init(jax.random.key(0), TOKENS)["params"]
    params = dsmoe.with_routers(dense, BLOCKS)
    fresh = dsmoe.Gated(MODEL, BLOCKS).init(jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    # Gates of 1 change nothing.
    opened = dsmoe.Gated(MODEL, BLOCKS, bias=100.0)
    exact = MODEL.apply({"params": dense}, TOKENS)
    np.testing.assert_allclose(opened.apply({"params": params}, TOKENS), exact, atol=1e-6)
    assert {n: float(one) for n, one in opened.active(params, TOKENS).items()} == {
        "block_0": 1.0, "block_1": 1.0
    }  # fmt: skip
    # The loss is that of the text plus the mean open gate, and routers learn from it.
    gated = dsmoe.Gated(MODEL, BLOCKS)
    batch = {"inputs": TOKENS, "targets": TOKENS}
    logits, q = gated.gates(params, TOKENS)
    log_p = np.float64(jax.nn.log_softmax(logits))
    text = -np.take_along_axis(log_p, np.asarray(TOKENS)[..., None], -1).mean()
    q = np.stack([np.float64(one) for one in q.values()])
    loss, grads = jax.jit(jax.value_and_grad(gated.loss))(params, batch)
    assert float(loss) == pytest.approx(text + np.where(q > 0.5, q, 0).mean(), rel=1e-5)
    assert all(np.abs(grads[f"block_{n}"]["mlp"]["router"]["kernel"]).min() > 0 for n in (0, 1))
    # At inference blocks are skipped for real.
    skipping = dsmoe.Gated(MODEL, BLOCKS, skip=True)
    np.testing.assert_allclose(skipping.apply({"params": params}, TOKENS), logits, atol=1e-6)


def cut_into(hidden, blocks):
    config = ModelConfig(layers=1, heads=2, width=8, context=4, hidden=hidden)
    return lambda: dsmoe.Gated(gpt.build(config, 5), blocks)


Q = jnp.full((N, BLOCKS), 0.7)


def mlp(down=(8, BLOCKS), bias=None):
    up = {"kernel": jnp.ones((BLOCKS, 8))} | ({} if bias is None else {"bias": jnp.ones(bias)})
    return {"up": up, "down": {"kernel": jnp.ones(down)}}


@pytest.mark.quick(1)
@pytest.mark.parametrize("blocks", [None, 2])
def test_parameters_without_routers_of_the_blocks_are_refused(blocks):
    params = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    if blocks is not None:
        params = dsmoe.with_routers(params, blocks)
    with pytest.raises(InputError, match=f"routers of {BLOCKS} blocks, got .*with_routers"):
        dsmoe.Gated(MODEL, BLOCKS).apply({"params": params}, TOKENS)


@pytest.mark.slow
def test_whole_numbers_no_rows_and_nan_are_computed(arrays):
    x, weights, q = arrays
    whole = jnp.round(3 * x).astype(int)
    exact = dsmoe.computed(whole.astype(jnp.float32), weights, q)
    np.testing.assert_allclose(dsmoe.computed(whole, weights, q), exact, rtol=1e-6)
    blocks = dsmoe.partitioned(weights, BLOCKS)
    gated = dsmoe.computed(whole, weights, dsmoe.factors(q, 0.5))
    np.testing.assert_allclose(dsmoe.skipped(whole, blocks, q, 0.5), gated, rtol=1e-4, atol=1e-4)
    assert dsmoe.computed(x[:0], weights, q[:0]).shape == (0, D)
    # A gate that is NaN is not taken for a closed one.
    broken = q.at[0, 0].set(jnp.nan)
    assert np.isnan(dsmoe.skipped(x, blocks, broken, 0.5)[0]).all()
    assert np.isnan(dsmoe.thresholded(broken, 0.5)[0, 0])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (cut_into(10, 4), "divisor of the 10 hidden units of the MLP, got 4"),
        (cut_into(12, 0), "divisor of the 12"),
        (lambda: dsmoe.Gated(MODEL, 4, tau=1.0), r"tau must be a threshold in \[0, 1\)"),
        (lambda: dsmoe.factors(Q, -0.1), "tau must be"),
        (
            lambda: dsmoe.skipped(Q, dsmoe.Blocks(({},), None), Q, 0.5),
            "each of the 1 blocks, got 4",
        ),
        (lambda: dsmoe.partitioned({"up": {}, "down": {}}, 2), "must have kernels 'up'"),
        (lambda: dsmoe.factors(Q, float("nan")), "tau must be"),
        (lambda: dsmoe.with_routers({"a": jnp.ones(2)}, 2), "no MLP"),
        (lambda: dsmoe.computed(Q, {"up": {}}, Q), "must have kernels 'up'"),
        (lambda: dsmoe.computed(Q, {"up": {}, "down": {}}, Q, "swish"), "activation must be"),
        (lambda: dsmoe.computed(Q, mlp(down=(8, 3)), Q), "must have kernels 'up'"),
        (lambda: dsmoe.computed(Q, mlp(bias=1), Q), "biases that fit"),
        (lambda: dsmoe.skipped(Q, dsmoe.Blocks((), None), Q[:, :0], 0.5), "each of the 0 blocks"),
        (lambda: dsmoe.with_routers({"up": {"kernel": jnp.ones((2, 4, 8))}, "down": {}}, 2), "two"),
        (lambda: dsmoe.with_routers({"up": 1, "down": 2}, 2), "kernel 'up' of two axes"),
    ],
)
def test_what_cannot_be_gated_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
