"""Recovery under a teacher, and on batches whose tokens do not all count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune import importance, masks
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.training import losses
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.losses import Distillation
from swe_prune.training.state import Frozen

SYMBOLS = 11
MODEL = gpt.build(ModelConfig(layers=1, heads=2, width=16, context=8), SYMBOLS)
STORING = optax.trace(0.0)


compile_once = functools.cache(step_lib.compile_train_step)


@functools.cache
def initial(seed):
    return jax.device_get(state_lib.init_params(MODEL, seed, 8))


def params_of(seed):
    """Returns parameters that are further from one another than fresh ones."""
    return jax.tree.map(lambda x: jnp.array(5 * x), initial(seed))


def batch_of(seed, rows=4, **more):
    tokens = np.random.default_rng(seed).integers(0, SYMBOLS, (rows, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **more}


def gradients(params, batch, fixed=None, **options):
    """Returns the loss and gradients of one train step, whose optimizer only stores them."""
    state = state_lib.create(jax.tree.map(jnp.copy, params), STORING, 0)
    step = compile_once(MODEL, STORING, **options)
    state, metrics = step(state, batch, fixed)
    return jax.device_get((metrics["loss"], state.opt_state.trace))


def assert_same(got, expected, rtol=1e-5):
    # atol: gradients are sums of terms of about 1 in another order, and some cancel to nearly 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), got, expected)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_divergence(s, t, temperature):
    s, t = (log_softmax(np.asarray(x, np.float64) / temperature) for x in (s, t))
    return temperature**2 * (np.exp(t) * (t - s)).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_divergence_is_the_float64_one(temperature, size):
    rng = np.random.default_rng(0)
    s, t = (size * rng.standard_normal((2, 3, 50)).astype(np.float32) for _ in range(2))
    s, t = s + 100, t - 70  # which no softmax sees
    got = losses.divergence(s, t, temperature)
    np.testing.assert_allclose(got, numpy_divergence(s, t, temperature), rtol=1e-5, atol=1e-5)
    assert got.dtype == jnp.float32


def test_divergence_is_zero_of_equals_and_above_zero_of_others():
    t = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)
    assert not np.asarray(losses.divergence(t, t, 3.0)).any()
    assert (np.asarray(losses.divergence(t[::-1], t, 3.0)) > 0).all()


def test_its_gradient_is_temperature_times_the_difference_of_the_softmaxes():
    rng = np.random.default_rng(0)
    s, t = (rng.standard_normal((2, 3, 50)).astype(np.float32) for _ in range(2))
    of_s, of_t = jax.grad(lambda s, t: losses.divergence(s, t, 2.0).sum(), (0, 1))(s, t)
    expected = 2.0 * (np.exp(log_softmax(s / 2)) - np.exp(log_softmax(t / 2)))
    np.testing.assert_allclose(of_s, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(of_t).any()


def test_what_the_teacher_excludes_costs_nothing():
    s, t = jnp.array([[[0.0, 1.0, 2.0]]]), jnp.array([[[0.0, -jnp.inf, 0.0]]])
    value, slope = jax.value_and_grad(lambda s: losses.divergence(s, t).sum())(s)
    p = np.exp(log_softmax(s))[0, 0]
    expected = 0.5 * (np.log(0.5 / p[0]) + np.log(0.5 / p[2]))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(slope).all()


def test_bfloat16_logits_are_compared_in_float32():
    rng = np.random.default_rng(0)
    s, t = (jnp.asarray(rng.standard_normal((1, 2, 900)), jnp.bfloat16) for _ in range(2))
    expected = numpy_divergence(s.astype(jnp.float32), t.astype(jnp.float32), 2.0)
    np.testing.assert_allclose(losses.divergence(s, t, 2.0), expected, rtol=1e-5)


@pytest.mark.parametrize("length", [4, 10, 11])
def test_a_few_positions_at_a_time_give_the_same(monkeypatch, length):
    rng = np.random.default_rng(0)
    s, t = (rng.standard_normal((2, length, 50)).astype(np.float32) for _ in range(2))
    compared = jax.value_and_grad(lambda s, t: (losses.divergence(s, t, 2.0) ** 2).sum())
    whole = compared(s, t)
    monkeypatch.setattr(losses, "AT_ONCE", 450)  # 4 positions
    assert_same(compared(s, t), whole)
    assert ("scan" in str(jax.make_jaxpr(compared)(s, t))) == (length > 4)


def test_nothing_as_large_as_the_logits_is_made_but_their_gradient():
    shape = jax.ShapeDtypeStruct((2, 260, 20_000), jnp.float32)
    compared = jax.jit(jax.value_and_grad(lambda s, t: losses.divergence(s, t, 2.0).sum()))
    sizes = compared.lower(shape, shape).compile().memory_analysis()
    logits = 4 * 2 * 260 * 20_000
    assert logits <= sizes.output_size_in_bytes < 1.01 * logits
    assert sizes.temp_size_in_bytes < 0.5 * logits


def test_the_step_mixes_cross_entropy_and_the_distance_to_the_teacher():
    params, teacher, batch = params_of(0), params_of(1), batch_of(0)

    def expected(params):
        s, t = (MODEL.apply({"params": p}, batch["inputs"]) for p in (params, teacher))
        p = jax.nn.softmax(t / 2.0)
        apart = 4.0 * (p * (jax.nn.log_softmax(t / 2.0) - jax.nn.log_softmax(s / 2.0))).sum(-1)
        text = optax.softmax_cross_entropy_with_integer_labels(s, batch["targets"])
        return (0.7 * text + 0.3 * apart).mean()

    got = gradients(params, batch, Frozen(teacher=teacher), distillation=Distillation(0.3, 2.0))
    assert_same(got, jax.jit(jax.value_and_grad(expected))(params), rtol=1e-4)
    parts = gradients(
        params,
        batch,
        Frozen(teacher=teacher),
        distillation=Distillation(0.3, 2.0),
        accumulate=2,
    )
    assert_same(parts, got)


def test_a_pruned_model_comes_nearer_to_its_teacher_and_its_zeros_stay():
    teacher = params_of(0)
    mask = masks.by_sparsity(importance.score("magnitude", teacher), 0.5)
    optimizer = optax.adam(3e-3)
    state = state_lib.create(jax.tree.map(jnp.copy, teacher), optimizer, 0, masks=mask)
    step = step_lib.compile_train_step(MODEL, optimizer, distillation=Distillation(1.0, 2.0))
    fixed, found = Frozen(teacher=teacher), []
    for number in range(30):
        state, metrics = step(state, batch_of(number), fixed)
        found.append(float(metrics["loss"]))
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
    assert int(metrics["revived"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher), params_of(0))  # not given


def test_the_teacher_is_its_own_teacher():
    params = params_of(0)
    loss, slopes = gradients(
        params, batch_of(0), Frozen(teacher=params), distillation=Distillation(1.0, 2.0)
    )
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(slopes)) < 1e-5


def test_without_teacher_and_weights_the_program_has_nothing_of_them():
    params, batch = params_of(0), batch_of(0)
    state = state_lib.create(params, STORING, 0)
    plain = compile_once(MODEL, STORING)
    text = plain.lower(state, batch).as_text()
    assert text == plain.lower(state, batch, Frozen()).as_text()
    taught = step_lib.compile_train_step(MODEL, STORING, distillation=Distillation())
    weighted = batch | {"weights": np.ones((4, 8), np.float32)}
    for other in (
        taught.lower(state, batch, Frozen(teacher=params)).as_text(),
        plain.lower(state, weighted).as_text(),
    ):
        assert other.count("stablehlo.") > text.count("stablehlo.")


@pytest.mark.parametrize(
    ("options", "fixed", "match"),
    [
        ({"distillation": Distillation()}, None, "was given no teacher"),
        ({"distillation": Distillation()}, Frozen(), "was given no teacher"),
        ({}, Frozen(teacher={}), "no distillation="),
    ],
)
def test_a_teacher_and_a_distillation_come_together(options, fixed, match):
    with pytest.raises(InputError, match=match):
        gradients(params_of(0), batch_of(0), fixed, **options)


@pytest.mark.parametrize("values", [{"weight": 1.1}, {"weight": -0.1}, {"weight": float("nan")}])
def test_a_weight_is_a_share(values):
    with pytest.raises(InputError, match="is no share of the loss"):
        Distillation(**values)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_divides(temperature):
    with pytest.raises(InputError, match="cannot divide logits"):
        Distillation(temperature=temperature)


def test_weights_of_one_are_the_plain_loss():
    params = params_of(0)
    ones = np.ones((4, 8), np.float32)
    assert_same(gradients(params, batch_of(0, weights=ones)), gradients(params, batch_of(0)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_padding_does_not_count_whatever_it_is(accumulate, dtype):
    """Two rows of full length, and two of which the first 3 tokens alone are text."""
    params, batch = params_of(0), batch_of(0)
    weights = np.ones((4, 8), dtype)
    weights[2:, 3:] = 0
    padded = {name: np.where(weights > 0, values, 0) for name, values in batch.items()}
    padded["targets"] = np.where(weights > 0, batch["targets"], -100)

    def expected(params):
        logits = MODEL.apply({"params": params}, batch["inputs"])
        text = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (text[:2].sum() + text[2:, :3].sum()) / 22

    got = gradients(params, padded | {"weights": weights}, accumulate=accumulate)
    assert_same(got, jax.jit(jax.value_and_grad(expected))(params))


def test_a_batch_of_padding_alone_is_skipped():
    params = params_of(0)
    state = state_lib.create(params, STORING, 0)
    batch = batch_of(0, weights=np.zeros((4, 8), np.float32))
    state, metrics = compile_once(MODEL, STORING)(state, batch)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params_of(0))
