"""The model: sizes, causality, precision, dropout, and a forward pass against float64 numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt

TINY = ModelConfig(layers=2, heads=2, width=16, context=12)
PAPER = ModelConfig(layers=6, heads=6, width=384, context=256)
BIASED = dataclasses.replace(PAPER, use_bias=True, qkv_bias=False, tied_head=False)
SYMBOLS = 7


def tokens_of(config, batch=2, length=None, seed=0):
    shape = (batch, length or config.context)
    return np.random.default_rng(seed).integers(0, SYMBOLS, shape).astype(np.int32)


def make(config=TINY, seed=0):
    """Returns the model and parameters none of which is at its special initial value, 0 or 1."""
    model = gpt.build(config, SYMBOLS)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return model, jax.tree.unflatten(structure, moved)


def shapes_of(config, symbols=65):
    model = gpt.build(config, symbols)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize(("config", "count"), [(PAPER, 10_745_088), (BIASED, 10_788_929)])
def test_parameter_counts_are_the_papers(config, count):
    shapes = shapes_of(config)
    assert sum(math.prod(s) for s in shapes.values()) == count
    kernels = [s for n, s in shapes.items() if n.startswith("block_") and n.endswith("kernel")]
    assert sum(math.prod(s) for s in kernels) == 10_616_832


def test_names_tell_query_key_and_value_apart():
    shapes = shapes_of(BIASED)
    for layer in range(6):
        for name in ("query", "key", "value", "out"):
            assert shapes[f"block_{layer}/attention/{name}/kernel"] == (384, 384)
            assert (f"block_{layer}/attention/{name}/bias" in shapes) == (name == "out")
        assert shapes[f"block_{layer}/mlp/up/kernel"] == (384, 1536)
        assert shapes[f"block_{layer}/mlp/down/kernel"] == (1536, 384)
    assert shapes["head/kernel"] == (384, 65)
    assert shapes["embedding/embedding"] == (65, 384)
    assert shapes["position_embedding"] == (256, 384)
    assert not [n for n in shapes_of(PAPER) if "head" in n or "bias" in n]


def test_qkv_bias_follows_use_bias_unless_given():
    def has(**changes):
        shapes = shapes_of(dataclasses.replace(TINY, **changes))
        return "block_0/attention/query/bias" in shapes, "block_0/mlp/up/bias" in shapes

    assert has() == (False, False)
    assert has(use_bias=True) == (True, True)
    assert has(use_bias=True, qkv_bias=False) == (False, True)
    assert has(qkv_bias=True) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("given", [0.02, 0.06])
def test_residual_projections_start_smaller(given):
    config = ModelConfig(layers=8, heads=2, width=64, context=4, init_stddev=given)
    init = jax.jit(gpt.build(config, 50).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    block = params["block_3"]
    small = given / math.sqrt(2 * 8)
    # 4,096 draws: the standard error of a standard deviation is 1.1 % of it.
    for kernel, stddev in [
        (block["attention"]["query"]["kernel"], given),
        (block["attention"]["out"]["kernel"], small),
        (block["mlp"]["up"]["kernel"], given),
        (block["mlp"]["down"]["kernel"], small),
        (params["embedding"]["embedding"], given),
    ]:
        assert np.std(kernel) == pytest.approx(stddev, rel=0.06)


@pytest.mark.quick(2)
@pytest.mark.parametrize("length", [1, 5, 12, 97, 256])
def test_logits_do_not_depend_on_what_follows(length):
    """Through gradients: d logits[t] / d position_embedding[s] is exactly 0 for s > t alone."""
    model, params = make(dataclasses.replace(TINY, context=256))
    tokens_BxL = tokens_of(TINY, batch=1, length=length)

    def logits(position_embedding):
        full = params | {"position_embedding": position_embedding}
        return model.apply({"params": full}, tokens_BxL)[0]

    table = params["position_embedding"]
    pull = jax.jit(lambda cotangent: jax.vjp(logits, table)[1](cotangent)[0])
    for t in {0, length // 3, length // 2, length - 1}:
        cotangent_LxV = jnp.zeros((length, SYMBOLS)).at[t].set(jnp.arange(1.0, SYMBOLS + 1))
        grad_LxD = np.asarray(pull(cotangent_LxV))
        assert not grad_LxD[t + 1 :].any()
        assert grad_LxD[: t + 1].any(axis=1).all()


def numpy_forward(params, tokens_BxL, config):
    """The same function from the formulas, in float64 and without a shared line of code."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def dense(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * layer["scale"] + layer.get("bias", 0.0)

    def attend(x, layer):
        q, k, v = (dense(x, layer[n]) for n in ("query", "key", "value"))
        width = q.shape[-1] // config.heads
        y = np.zeros_like(q)
        for h in range(config.heads):
            part = slice(h * width, (h + 1) * width)
            for t in range(len(x)):
                weights = np.exp(k[: t + 1, part] @ q[t, part] / np.sqrt(width))
                y[t, part] = weights @ v[: t + 1, part] / weights.sum()
        return dense(y, layer["out"])

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    result = []
    for tokens_L in tokens_BxL:
        x = p["embedding"]["embedding"][tokens_L] + p["position_embedding"][: len(tokens_L)]
        for i in range(config.layers):
            block = p[f"block_{i}"]
            x = x + attend(norm(x, block["attention_norm"]), block["attention"])
            hidden = gelu(dense(norm(x, block["mlp_norm"]), block["mlp"]["up"]))
            x = x + dense(hidden, block["mlp"]["down"])
        x = norm(x, p["final_norm"])
        result.append(
            x @ p["embedding"]["embedding"].T if config.tied_head else dense(x, p["head"])
        )
    return np.stack(result)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_bias": True, "qkv_bias": False, "tied_head": False}, {"use_bias": True, "heads": 4}],
)
@pytest.mark.parametrize("length", [12, 7])
def test_forward_is_the_formula(changes, length):
    config = dataclasses.replace(TINY, **changes)
    model, params = make(config)
    tokens_BxL = tokens_of(config, length=length)
    logits_BxLxV = jax.jit(model.apply)({"params": params}, tokens_BxL)
    assert logits_BxLxV.dtype == jnp.float32
    # atol: logits reach 3, and each is a sum of 16 products that may cancel.
    expected = numpy_forward(params, tokens_BxL, config)
    np.testing.assert_allclose(logits_BxLxV, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [5, 64, 96, 200])
def test_attention_and_its_gradient_are_plain_softmax(length):
    """The lengths cut the queries into one part, into several, and into parts of unequal size."""

    def plain(q, k, v):
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k) / math.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), v)

    rng = np.random.default_rng(length)
    q, k, v, cotangent = (
        np.asarray(scale * rng.standard_normal((2, length, 3, 8)), np.float32)
        for scale in (4, 4, 1, 1)
    )

    def value_and_gradients(attention):
        @jax.jit
        def both(q, k, v):
            y, pullback = jax.vjp(attention, q, k, v)
            return y, pullback(cotangent)

        return both(q, k, v)

    y, gradients = value_and_gradients(gpt.attention)
    expected_y, expected_gradients = value_and_gradients(plain)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        # atol: sums over up to 200 positions of terms near 10, in another order.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_attention_survives_large_scores():
    q = jnp.full((1, 8, 1, 4), 1e3)
    y, pullback = jax.vjp(gpt.attention, q, q, jnp.ones_like(q))
    np.testing.assert_allclose(y, jnp.ones_like(q), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in pullback(jnp.ones_like(q)))


def test_bfloat16_computes_close_and_keeps_float32_params():
    model, params = make()
    half = gpt.build(dataclasses.replace(TINY, dtype="bfloat16"), SYMBOLS)
    fresh = jax.jit(half.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    tokens_BxL = tokens_of(TINY)
    exact = jax.jit(model.apply)({"params": params}, tokens_BxL)
    seen = functools.partial(half.apply, capture_intermediates=True, mutable="intermediates")
    got, state = jax.jit(seen)({"params": params}, tokens_BxL)
    assert got.dtype == jnp.float32
    inner = flatten_dict(state["intermediates"], sep="/")
    assert inner["block_1/mlp/down/__call__"][0].dtype == jnp.bfloat16
    # bfloat16 carries 8 bits, 0.4 %; two layers of it stay within a few percent of the range.
    assert np.abs(got - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(got - exact).max() > 0
    grads = jax.jit(jax.grad(lambda p: half.apply({"params": p}, tokens_BxL).sum()))(params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_dropout_acts_in_training_only_and_follows_its_key():
    model, params = make(dataclasses.replace(TINY, dropout=0.3))
    plain, _ = make()
    tokens_BxL = tokens_of(TINY)

    @jax.jit
    def train(key):
        return model.apply({"params": params}, tokens_BxL, train=True, rngs={"dropout": key})

    still = jax.jit(model.apply)({"params": params}, tokens_BxL)
    np.testing.assert_array_equal(still, jax.jit(plain.apply)({"params": params}, tokens_BxL))
    first = train(jax.random.key(1))
    np.testing.assert_array_equal(first, train(jax.random.key(1)))
    assert (np.asarray(first) != np.asarray(still)).mean() > 0.9
    assert (np.asarray(first) != np.asarray(train(jax.random.key(2)))).mean() > 0.9


def test_tied_head_is_the_embedding():
    model, params = make()
    tokens_BxL = jnp.zeros((1, 4), jnp.int32)  # symbol 0 alone is looked up

    @jax.jit
    def logits(embedding):
        return model.apply({"params": params | {"embedding": {"embedding": embedding}}}, tokens_BxL)

    table = params["embedding"]["embedding"]
    doubled = logits(table.at[3].mul(2.0))
    expected = np.array(logits(table))
    expected[..., 3] *= 2
    np.testing.assert_allclose(doubled, expected, rtol=1e-5)


def test_too_many_tokens_are_refused_while_tracing():
    model, params = make()
    with pytest.raises(InputError, match=r"13 tokens exceed .* context of 12"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation": "gellu"},
            "model.activation must be one of .*, got 'gellu'; did you mean 'gelu'",
        ),
        ({"dtype": "float16"}, "model.dtype must be one of float32, bfloat16, got 'float16'"),
        ({"heads": 3}, "multiple of model.heads = 3"),
    ],
)
def test_what_cannot_be_built_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        gpt.build(dataclasses.replace(TINY, **changes), SYMBOLS)


@pytest.mark.quick(3)
@pytest.mark.parametrize("activation", sorted(gpt.ACTIVATIONS))
def test_every_activation_is_the_one_used(activation):
    model, params = make(dataclasses.replace(TINY, activation=activation))
    tokens_BxL = tokens_of(TINY)
    seen = functools.partial(model.apply, capture_intermediates=True, mutable="intermediates")
    _, state = jax.jit(seen)({"params": params}, tokens_BxL)
    mlp = flatten_dict(state["intermediates"]["block_0"]["mlp"], sep="/")
    h_NxF = gpt.ACTIVATIONS[activation](mlp["up/__call__"][0])
    expected = h_NxF @ params["block_0"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(mlp["down/__call__"][0], expected, rtol=1e-5, atol=1e-5)


def test_learns_one_batch_by_heart():
    config = ModelConfig(layers=1, heads=2, width=32, context=16)
    model = gpt.build(config, SYMBOLS)
    tokens_BxL = jnp.asarray(tokens_of(config, batch=2, length=17))
    params = jax.jit(model.init)(jax.random.key(0), tokens_BxL[:, :-1])["params"]
    optimizer = optax.adam(1e-2)

    def loss_of(params):
        logits_BxLxV = model.apply({"params": params}, tokens_BxL[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BxLxV, tokens_BxL[:, 1:]
        ).mean()

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, loss = optimizer.init(params), None
    for _ in range(200):
        params, opt_state, loss = step(params, opt_state)
    assert float(loss) < 0.05
