"""The decoder beyond GPT-2: grouped heads, RMS norm, gates, rotary positions, windows, a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import parallel, tree
from swe_prune.config import ModelConfig, ParallelConfig, RopeConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt, rope

SYMBOLS = 13
LLAMA = ModelConfig(
    layers=2,
    heads=4,
    kv_heads=2,
    width=16,
    hidden=20,
    context=24,
    activation="silu",
    gated=True,
    norm="rms",
    norm_epsilon=1e-6,
    positions="rope",
    tied_head=False,
)
NARROW = dataclasses.replace(LLAMA, window=4)
BIASED = dataclasses.replace(LLAMA, head_width=6, qkv_bias=True, out_bias=True, mlp_bias=True)
LEARNED = ModelConfig(layers=2, heads=2, width=16, context=24, use_bias=True)
ALL = {"llama": LLAMA, "window": NARROW, "biases": BIASED, "learned": LEARNED}


def tokens_of(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(0, SYMBOLS, (batch, length)).astype(np.int32)


def make(config, seed=0):
    """The model and parameters none of which is at its special initial value, 0 or 1."""
    model = gpt.build(config, SYMBOLS)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params)


def logits_of(model, params, *args, **options):
    """The model's answer, compiled as a whole: op by op it takes many times as long."""
    return jax.jit(lambda p, a: model.apply({"params": p}, *a, **options))(params, args)


def numpy_logits(params, tokens_L, config):
    """One sequence through the same formulas in float64, head by head and token by token."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    heads, groups, width = config.heads, config.key_heads, config.head_size

    def norm(x, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * layer["scale"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    def turned(x, position):  # pairs (i, i + width / 2) as complex numbers
        pairs = x[: width // 2] + 1j * x[width // 2 :]
        angles = position * config.rope.theta ** (-np.arange(width // 2) * 2 / width)
        pairs = pairs * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag])

    x = p["embedding"]["embedding"][tokens_L]
    for layer in range(config.layers):
        block = p[f"block_{layer}"]
        y = norm(x, block["attention_norm"])
        q, k, v = (
            dense(y, block["attention"][name]).reshape(len(x), count, width)
            for name, count in (("query", heads), ("key", groups), ("value", groups))
        )
        out = np.zeros((len(x), heads, width))
        for t in range(len(x)):
            first = 0 if config.window is None else max(0, t - config.window + 1)
            for h in range(heads):
                group = h // (heads // groups)
                query = turned(q[t, h], t)
                scores = [query @ turned(k[s, group], s) for s in range(first, t + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(width))
                out[t, h] = weights / weights.sum() @ v[first : t + 1, group]
        x = x + dense(out.reshape(len(x), -1), block["attention"]["out"])
        y = norm(x, block["mlp_norm"])
        gate = dense(y, block["mlp"]["gate"])
        up = gate / (1 + np.exp(-gate)) * dense(y, block["mlp"]["up"])
        x = x + dense(up, block["mlp"]["down"])
    return dense(norm(x, p["final_norm"]), p["head"])


@pytest.mark.quick(2)
@pytest.mark.parametrize("config", [LLAMA, NARROW, BIASED], ids=["llama", "window", "biases"])
def test_logits_are_those_of_the_formulas(config):
    model, params = make(config)
    tokens_BxL = tokens_of()
    logits_BxLxV = logits_of(model, params, tokens_BxL)
    for tokens_L, logits_LxV in zip(tokens_BxL, logits_BxLxV, strict=True):
        expected_LxV = numpy_logits(params, tokens_L, config)
        np.testing.assert_allclose(
            logits_LxV, expected_LxV, rtol=1e-4, atol=1e-5 * np.abs(expected_LxV).max()
        )


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("name", "length"), [*((name, 20) for name in ALL), ("llama", 150), ("window", 150)]
)
def test_what_is_fed_in_parts_gives_what_is_fed_at_once(name, length):
    config = dataclasses.replace(ALL[name], context=200)
    model, params = make(config)
    tokens_BxL = tokens_of(length=length)
    whole = logits_of(model, params, tokens_BxL)
    decode = jax.jit(lambda t, cache: model.apply({"params": params}, t, cache, method="decode"))
    cache, parts = gpt.empty_cache(config, 2, length + 3), []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, length)]:
        logits, cache = decode(tokens_BxL[:, start:stop], cache)
        parts.append(logits)
    assert int(cache.length) == length
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max()
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["llama", "learned"])
def test_the_logits_of_the_last_token_alone_are_the_last_of_all(name):
    model, params = make(ALL[name])
    tokens_BxL, cache = tokens_of(length=9), gpt.empty_cache(ALL[name], 2, 12)
    whole, _ = logits_of(model, params, tokens_BxL, cache, method="decode")
    last, _ = jax.jit(
        lambda t, c: model.apply({"params": params}, t, c, last_only=True, method="decode")
    )(tokens_BxL, cache)
    assert last.shape == (2, 1, whole.shape[-1])
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cached", [False, True])
def test_padding_on_the_left_changes_nothing(name, cached):
    model, params = make(ALL[name])
    tokens_1xL = tokens_of(batch=1, length=9)
    alone = logits_of(model, params, tokens_1xL)[0]
    padded_BxL = np.concatenate([tokens_of(2, 5, seed=3), np.tile(tokens_1xL, (2, 1))], axis=1)
    valid_BxL = np.ones((2, 14), bool)
    valid_BxL[0, :5] = False
    if cached:
        cache = gpt.empty_cache(ALL[name], 2, 16)
        parts = []
        for part in (slice(0, 11), slice(11, 14)):
            logits, cache = logits_of(
                model, params, padded_BxL[:, part], cache, valid_BxL[:, part], method="decode"
            )
            parts.append(logits)
        logits = np.concatenate(parts, axis=1)
    else:
        logits = logits_of(model, params, padded_BxL, valid_BxL=valid_BxL)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, 5:], alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
    assert np.abs(logits[1, 5:] - alone).max() > 0.01  # there the first five are real


def test_a_window_reaches_so_far_and_no_further():
    """Through gradients, with one layer: more of them reach further, each by a window."""
    config = dataclasses.replace(NARROW, layers=1)
    model, params = make(config)
    table = params["embedding"]["embedding"]
    tokens_1xL = np.arange(12, dtype=np.int32)[None]  # each another symbol

    def logits(table_VxD):
        return model.apply(
            {"params": params | {"embedding": {"embedding": table_VxD}}}, tokens_1xL
        )[0]

    pull = jax.jit(lambda cotangent: jax.vjp(logits, table)[1](cotangent)[0])
    for t in (0, 3, 7, 11):
        cotangent = jnp.zeros((12, SYMBOLS)).at[t].set(jnp.arange(1.0, SYMBOLS + 1))
        reached = np.abs(np.asarray(pull(cotangent))).max(axis=1) > 0
        assert np.flatnonzero(reached).tolist() == list(range(max(0, t - 3), t + 1))


def test_shared_heads_are_heads_that_are_alike():
    model, params = make(LLAMA)
    full = dataclasses.replace(LLAMA, kv_heads=None)
    copied = jax.tree.map(lambda x: x, params)
    for layer in range(LLAMA.layers):
        attention = copied[f"block_{layer}"]["attention"]
        for name in ("key", "value"):
            kernel = attention[name]["kernel"].reshape(16, 2, 4)
            attention[name] = {"kernel": jnp.repeat(kernel, 2, axis=1).reshape(16, 16)}
    tokens_BxL = tokens_of()
    np.testing.assert_allclose(
        logits_of(model, params, tokens_BxL),
        logits_of(gpt.build(full, SYMBOLS), copied, tokens_BxL),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize("config", [LLAMA, BIASED, LEARNED], ids=["llama", "biases", "learned"])
@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_layers": True}], ids=str)
def test_the_memory_switches_change_no_loss_and_no_gradient(config, changes):
    _, params = make(config)
    tokens_BxL = tokens_of()

    def value_and_grad(config):
        model = gpt.build(config, SYMBOLS)

        def loss(params):
            return jnp.mean(model.apply({"params": params}, tokens_BxL) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    plain, switched = value_and_grad(config), value_and_grad(dataclasses.replace(config, **changes))
    # Over all leaves: a bias of the keys has no gradient but rounding, since it shifts all scores.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(switched), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_partition_rule(name):
    config = ALL[name]
    _, params = make(config)
    mesh = parallel.mesh(ParallelConfig())
    specs, _ = parallel.partition(params, gpt.partition_rules(config), mesh)
    divided = {
        path
        for (path, leaf), spec in zip(
            tree.named_leaves(params), jax.tree.leaves(specs), strict=True
        )
        if leaf.ndim > 1 and any(spec)
    }
    assert divided == {path for path, leaf in tree.named_leaves(params) if leaf.ndim > 1}


def test_gates_are_prunable_and_the_head_is_dense():
    _, params = make(LLAMA)
    chosen = {name for name, flag in tree.named_leaves(tree.prunable(params)) if flag}
    assert len(chosen) == 2 * 7
    assert "block_1/mlp/gate/kernel" in chosen
    assert "head/kernel" not in chosen


def test_dynamic_and_long_frequencies_depend_on_the_longest_text_alone():
    config = dataclasses.replace(
        LLAMA,
        rope=RopeConfig(
            scaling="longrope",
            original_context=8,
            short_factors=(1.0, 1.5),
            long_factors=(2.0, 4.0),
        ),
    )
    plain = np.array([1.0, 0.01])
    short, factor = rope.frequencies(config, 4, 8)
    long, _ = rope.frequencies(config, 4, jnp.int32(9))
    np.testing.assert_allclose(short, plain / [1.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(long, plain / [2.0, 4.0], rtol=1e-6)
    assert factor == pytest.approx(np.sqrt(1 + np.log(3) / np.log(8)))  # a context of 24 over 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "batch"}, "model.norm must be one of layer, rms, got 'batch'"),
        ({"positions": "sine"}, "model.positions must be one of learned, rope, none, got 'sine'"),
        ({"kv_heads": 3}, "kv_heads must be a divisor of heads = 4, got 3"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"rope": RopeConfig(scaling="yarm")}, "did you mean 'yarn'"),
        ({"rope": RopeConfig(share=0.75)}, "rotates 3 of a head's 4"),
        ({"rope": RopeConfig(scaling="linear")}, "factor is missing"),
        ({"rope": RopeConfig(scaling="longrope")}, "short_factors must have .* got 0"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused(changes, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        gpt.build(dataclasses.replace(LLAMA, **changes), SYMBOLS)


def test_more_than_fits_is_refused():
    with pytest.raises(InputError, match="25 tokens exceed the model's context of 24"):
        gpt.empty_cache(LLAMA, 1, 25)
    model, params = make(LLAMA)
    cache = gpt.empty_cache(LLAMA, 1, 4)
    with pytest.raises(InputError, match="5 tokens exceed the cache's capacity of 4"):
        model.apply({"params": params}, tokens_of(1, 5), cache, method="decode")
