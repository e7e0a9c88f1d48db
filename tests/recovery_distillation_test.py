"""Recovery under a teacher, and on batches whose tokens do not all count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from swe_prune import importance, masks
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.training import distillation, losses
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.distillation import Distillation
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


@pytest.mark.slow
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
    with pytest.raises(InputError, match="weight must be a finite number of at least 0"):
        Distillation(**values)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_divides(temperature):
    with pytest.raises(InputError, match="temperature must be a finite number above 0"):
        Distillation(temperature=temperature)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"final_weight": 0.5}, "give both or neither"),
        ({"steps": 10}, "give both or neither"),
        ({"final_weight": 1.5, "steps": 10}, "final_weight must be"),
        ({"final_weight": 0.5, "steps": 0}, "steps must be"),
        ({"features": -1.0}, "features must be"),
        ({"features": float("inf")}, "features must be"),
    ],
)
def test_a_schedule_and_the_features_are_checked(values, match):
    with pytest.raises(InputError, match=match):
        Distillation(**values)


def test_the_weight_goes_from_the_first_to_the_last():
    moving = Distillation(0.9, final_weight=0.5, steps=8)
    got = [float(moving.weight_at(step)) for step in (0, 2, 4, 8, 100)]
    np.testing.assert_allclose(got, [0.9, 0.8, 0.7, 0.5, 0.5], rtol=1e-6)
    # In the step: with both ends alike nothing changes, and at the last step only the end counts.
    params, fixed, batch = params_of(0), Frozen(teacher=params_of(1)), batch_of(0)
    state = state_lib.create(jax.tree.map(jnp.copy, params), STORING, 0)
    state = dataclasses.replace(state, step=jnp.int32(8))
    step = compile_once(MODEL, STORING, distillation=moving)
    _, metrics = step(state, batch, fixed)
    loss, _ = gradients(params, batch, fixed, distillation=Distillation(0.5))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)


DEEP = gpt.build(ModelConfig(layers=3, heads=2, width=16, context=8), SYMBOLS)
SHALLOW = gpt.build(ModelConfig(layers=2, heads=2, width=16, context=8), SYMBOLS)


@functools.cache
def deep_params():
    return jax.device_get(jax.tree.map(lambda x: 5 * x, state_lib.init_params(DEEP, 3, 8)))


def without_block(params, gone):
    kept = [at for at in range(3) if at != gone]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return rest | {f"block_{new}": params[f"block_{old}"] for new, old in enumerate(kept)}


def outputs(model, params, inputs, blocks):
    """Returns the hidden state after each of the first blocks, each from a shorter model."""
    return [hidden_after(model, params, inputs, n + 1) for n in range(blocks)]


def hidden_after(model, params, inputs, blocks):
    """Returns the hidden state after some blocks: the input of the next one's first norm."""
    seen = []

    def see(call, args, kwargs, context):
        name = "/".join(context.module.path)
        last = "final_norm" if blocks == model.config.layers else f"block_{blocks}/attention_norm"
        if name == last:
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        model.apply({"params": params}, inputs)
    return np.asarray(seen[0], np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_features_are_the_relative_distance_of_the_paired_blocks(remat):
    config = dataclasses.replace(SHALLOW.config, remat=remat)
    student, batch = gpt.build(config, SYMBOLS), batch_of(0)
    params = without_block(deep_params(), 1)
    layers = distillation.depth_map([0, 2], 3)
    assert layers == (1, 2)
    taught = Distillation(0.0, features=2.0, layers=layers)
    state = state_lib.create(jax.tree.map(jnp.array, params), STORING, 0)
    step = compile_once(student, STORING, distillation=taught, teacher_model=DEEP)
    _, metrics = step(state, batch, Frozen(teacher=deep_params()))
    own = outputs(SHALLOW, params, batch["inputs"], 2)
    theirs = outputs(DEEP, deep_params(), batch["inputs"], 3)
    apart = [
        (((s - theirs[at]) ** 2).sum(-1) / (theirs[at] ** 2).sum(-1)).mean()
        for s, at in zip(own, layers, strict=True)
    ]
    logits = SHALLOW.apply({"params": params}, batch["inputs"])
    text = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
    assert float(metrics["loss"]) == pytest.approx(float(text + 2.0 * np.mean(apart)), rel=1e-4)


def test_a_model_has_no_distance_from_its_own_features():
    params = params_of(0)
    loss, slopes = gradients(
        params, batch_of(0), Frozen(teacher=params), distillation=Distillation(1.0, features=3.0)
    )
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(slopes)) < 1e-5


@pytest.mark.parametrize(
    ("student", "taught", "match"),
    [
        ({}, {}, "the model has 2 blocks and the teacher 3"),
        ({}, {"layers": (0,)}, "one of the teacher's 3 blocks for each of the model's 2"),
        ({}, {"layers": (0, 3)}, "one of the teacher's 3 blocks"),
        ({"width": 8}, {"layers": (0, 2)}, "hidden states have 8 numbers and the teacher's 16"),
        ({"scan_layers": True}, {"layers": (0, 2)}, "cannot be seen"),
    ],
)
def test_features_that_do_not_go_together_are_refused(student, taught, match):
    model = gpt.build(dataclasses.replace(SHALLOW.config, **student), SYMBOLS)
    params = jax.eval_shape(lambda: state_lib.init_params(model, 0, 8))
    with pytest.raises(InputError, match=match):
        jax.eval_shape(
            functools.partial(
                distillation.distilled_losses,
                model,
                teacher_model=DEEP,
                batch=batch_of(0),
                distillation=Distillation(features=1.0, **taught),
                step=0,
            ),
            params,
            teacher=deep_params(),
        )


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 3], [-1, 2]])
def test_a_depth_map_is_of_blocks_that_there_are(kept):
    with pytest.raises(InputError, match="ascending numbers below the teacher's 3"):
        distillation.depth_map(kept, 3)


def test_weights_of_one_are_the_plain_loss():
    params = params_of(0)
    ones = np.ones((4, 8), np.float32)
    assert_same(gradients(params, batch_of(0, weights=ones)), gradients(params, batch_of(0)))


@pytest.mark.quick(2)
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
