import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune import importance, masks, recipe, trajectory, tree
from swe_prune.config import ModelConfig, PhaseConfig
from swe_prune.errors import InputError, RunError
from swe_prune.models import gpt
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.metrics import JsonLines, MetricsLogger, read_lines
from swe_prune.training.phase import Phase

MODEL = gpt.build(ModelConfig(layers=1, heads=2, width=16, context=8, dropout=0.1), vocab_size=11)
PHASE = PhaseConfig(steps=50, warmup=2, learning_rate=1e-2)
ADAMW = optimizer_lib.build(PHASE, 50)

# One step for each model, optimizer and setting, so that the tests compile it once.
compile_once = functools.cache(step_lib.compile_train_step)


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 11, (4, 9)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(state_lib.init_params(MODEL, 0, 8))


@pytest.fixture
def params(initial):
    return jax.tree.map(jnp.array, initial)


def take(params, n, *, masks=None, stats=None, optimizer=ADAMW, every=1):
    """Returns the state after n steps, and the parameters after each."""
    state = state_lib.create(jax.tree.map(jnp.copy, params), optimizer, 0, masks=masks, stats=stats)
    step = compile_once(MODEL, optimizer, every)
    history = []
    for i in range(n):
        state, _ = step(state, batch(i))
        history.append(jax.tree.map(jnp.copy, state.params))
    return state, history


def half(params):
    return masks.by_sparsity(importance.score("magnitude", params), 0.5)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "optimizer",
    [
        ADAMW,
        optax.sgd(0.1, momentum=0.9),
        optax.lion(1e-3, weight_decay=0.1),
        optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(1e-2)),
    ],
    ids=["adamw", "momentum", "lion", "noisy adam"],
)
def test_pruned_weights_are_zero_after_every_step_and_so_are_their_moments(params, optimizer):
    mask = half(params)
    pruned = jax.tree.map(lambda m: ~np.asarray(m), mask)
    state, history = take(params, 4, masks=mask, optimizer=optimizer)
    for after in history:
        for (name, gone), (_, weight) in zip(
            tree.named_leaves(pruned), tree.named_leaves(after), strict=True
        ):
            if gone is not None:
                assert not np.asarray(weight)[gone].any(), name
                assert np.asarray(weight)[~gone].all(), name
    kernel = ("block_0", "mlp", "up", "kernel")
    gone = pruned["block_0"]["mlp"]["up"]["kernel"]
    moments = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        if tuple(getattr(key, "key", None) for key in path[-4:]) == kernel
    ]
    assert moments
    assert not any(moment[gone].any() for moment in moments)
    assert all(moment[~gone].any() for moment in moments)


def test_the_step_counts_what_came_back_and_the_loop_refuses_it(params, tmp_path, monkeypatch):
    optimizer = optax.adam(1e-2)

    def revived():
        state = state_lib.create(jax.tree.map(jnp.copy, params), optimizer, 0, masks=half(params))
        return step_lib.compile_train_step(MODEL, optimizer)(state, batch(0))[1]

    assert int(revived()["revived"]) == 0
    monkeypatch.setattr(step_lib.masks, "keep", lambda optimizer, mask: optimizer)
    metrics = revived()
    assert int(metrics["revived"]) > 0
    phase = Phase("fine-tuning", tmp_path, steps=1, log_every=1)
    meter = MetricsLogger(phase, 0, JsonLines(tmp_path / "metrics.jsonl", 0), lambda *_: None)
    meter.enqueue(1, metrics, tokens=1)
    with pytest.raises(RunError, match="'fine-tuning' are not 0 after step 1"):
        meter.flush()


WITHOUT_DROPOUT = gpt.build(ModelConfig(layers=1, heads=2, width=16, context=8), vocab_size=11)
SGD = optax.sgd(0.1)


@pytest.mark.quick(1)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_same_step(params, parts):
    outcomes = []
    for accumulate in (1, parts):
        state = state_lib.create(jax.tree.map(jnp.copy, params), SGD, 0)
        step = compile_once(WITHOUT_DROPOUT, SGD, accumulate=accumulate)
        state, metrics = step(state, batch(0))
        outcomes.append((state.params, metrics["loss"], metrics["grad_norm"]))
    # atol: gradients are summed in another order, and a weight may be nearly 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *outcomes)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params):
    state = state_lib.create(jax.tree.map(jnp.copy, params), ADAMW, 0, masks=half(params))
    step = compile_once(MODEL, ADAMW, 1)
    state, _ = step(state, batch(0))
    broken = jax.tree.map(lambda weight: weight * jnp.inf, state.params["final_norm"])
    for in_row in (1, 2):
        before = jax.device_get((state.params, state.opt_state))
        whole = dict(state.params)
        bad = dataclasses.replace(
            state, params=jax.tree.map(jnp.copy, whole | {"final_norm": broken})
        )
        bad, metrics = step(bad, batch(1))
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == in_row
        kept = jax.device_get(
            (dict(bad.params) | {"final_norm": before[0]["final_norm"]}, bad.opt_state)
        )
        jax.tree.map(np.testing.assert_array_equal, kept, before)
        state = dataclasses.replace(bad, params=jax.tree.map(jnp.asarray, before[0]))
    state, metrics = step(state, batch(1))
    assert np.isfinite(metrics["loss"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)
    assert int(state.step) == 4


def test_the_meter_leaves_out_what_is_not_finite_and_stops_after_so_many(tmp_path):
    phase = Phase("dense", tmp_path, steps=9, log_every=1, stop_after_skipped=2)
    meter = MetricsLogger(phase, 0, JsonLines(tmp_path / "metrics.jsonl", 0), lambda *_: None)
    good = {"loss": 1.0, "grad_norm": 2.0, "skipped": 0, "skipped_in_row": 0}
    bad = {"loss": np.nan, "grad_norm": 2.0, "skipped": 1, "skipped_in_row": 1}
    for step, metrics in enumerate((good, bad), start=1):
        meter.enqueue(step, metrics, tokens=1)
    meter.flush()
    assert meter.last_step_skipped
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert (first["loss"], "skipped" in first) == (1.0, False)
    assert ("loss" in second, second["skipped"]) == (False, 1)
    meter.enqueue(3, bad | {"skipped": 2, "skipped_in_row": 2}, tokens=1)
    with pytest.raises(
        RunError, match=r"loss is nan at step 3 .* the 2. in a row .* from batch 1 "
    ):
        meter.flush()


def test_the_statistics_see_the_weights_after_every_nth_step(params):
    stats = trajectory.init(params, ("late_mean", "path_length"))
    state, history = take(params, 10, stats=stats, every=3)
    expected = trajectory.init(params, ("late_mean", "path_length"))
    for after in history[2::3]:
        expected = jax.jit(trajectory.update)(expected, after)
    assert int(state.stats.count) == 3
    for measure in ("late_mean", "path_length"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
            trajectory.read(state.stats, measure),
            trajectory.read(expected, measure),
        )


def test_tracking_does_not_change_training(params):
    plain, _ = take(params, 5)
    tracked, _ = take(params, 5, stats=trajectory.init(params))
    jax.tree.map(np.testing.assert_array_equal, plain.params, tracked.params)


def test_the_state_is_donated_and_keeps_its_structure(params):
    state = state_lib.create(params, ADAMW, 0, masks=half(params), stats=trajectory.init(params))
    after, _ = compile_once(MODEL, ADAMW, 1)(state, batch(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_dropout_differs_between_steps_and_not_between_runs(params):
    optimizer = optax.sgd(0.0)
    step = step_lib.compile_train_step(MODEL, optimizer)

    def losses():
        state = state_lib.create(jax.tree.map(jnp.copy, params), optimizer, 0)
        out = []
        for _ in range(2):
            state, metrics = step(state, batch(0))
            out.append(float(metrics["loss"]))
        return out

    first = losses()
    assert first[0] != first[1]
    assert losses() == first


def test_masks_and_statistics_compile_away_when_there_are_none(params):
    step = compile_once(MODEL, ADAMW, 1)

    def text(**fields):
        state = state_lib.create(params, ADAMW, 0, **fields)
        return step.lower(state, batch(0)).as_text()

    plain, full = text(), text(masks=half(params), stats=trajectory.init(params))
    assert "pred" not in plain.split("func.func public @main")[1].split("{")[0]
    assert plain.count("stablehlo.while") < full.count("stablehlo.while")  # random bits loop too
    assert "bf16" not in plain  # the carries of the statistics
    assert "stablehlo.case" not in full  # whose branches would copy the statistics in every step
    assert plain.count("stablehlo.select") < full.count("stablehlo.select")


def test_weight_decay_spares_what_is_no_matrix(params):
    phase = dataclasses.replace(PHASE, weight_decay=0.5, warmup=0)
    optimizer = optimizer_lib.build(phase, 50)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(params), params)
    assert not np.asarray(updates["final_norm"]["scale"]).any()
    assert np.asarray(updates["block_0"]["mlp"]["up"]["kernel"]).all()


def test_the_schedule_warms_up_and_ends_at_the_final_rate():
    phase = PhaseConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup="10%")
    rate = optimizer_lib.schedule(phase, 100)
    # nanoGPT's warm-up: lr · (step + 1) / (warmup + 1), so the first step already moves weights.
    warming = [float(rate(i)) for i in range(11)]
    assert warming == pytest.approx([1e-2 * (i + 1) / 11 for i in range(11)])
    assert float(rate(100)) == pytest.approx(1e-3)
    values = [float(rate(i)) for i in range(10, 101)]
    assert values == sorted(values, reverse=True)


def test_a_rate_stays_at_its_peak_until_it_decays():
    phase = PhaseConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup=10)
    plain = optax.warmup_cosine_decay_schedule(1e-2 / 11, 1e-2, 10, 100, 1e-3)
    found = optimizer_lib.schedule(phase, 100)
    assert [float(found(i)) for i in range(101)] == [float(plain(i)) for i in range(101)]
    late = optimizer_lib.schedule(dataclasses.replace(phase, decay_from=0.8), 100)
    assert [float(late(i)) for i in range(10)] == [float(plain(i)) for i in range(10)]
    assert [float(late(i)) for i in range(10, 81)] == pytest.approx([1e-2] * 71)
    assert float(late(90)) == pytest.approx(5.5e-3)  # half of the way down a cosine
    assert float(late(100)) == pytest.approx(1e-3)
    constant = optimizer_lib.schedule(dataclasses.replace(phase, final_learning_rate=1e-2), 100)
    assert [float(constant(i)) for i in range(10, 101)] == pytest.approx([1e-2] * 91)


def test_a_recipe_gives_the_requested_sparsity_and_names_what_it_cannot(params):
    stats = trajectory.update(trajectory.init(params), params)
    prunable = tree.prunable(params)

    def prune(**amount):
        evidence = recipe.Evidence(stats=stats)
        return recipe.prune(recipe.Recipe("swe", **amount), params, evidence, prunable=prunable)[1]

    summary = masks.summary(prune(scope="global", sparsity=0.6))
    assert summary.pruned == round(0.6 * summary.total)
    kernel = np.abs(np.asarray(params["block_0"]["mlp"]["up"]["kernel"], np.float64))
    kept = prune(rate=1.1)["block_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kept, kernel > kernel.std(ddof=1) * 1.1)
    with pytest.raises(InputError, match="prunes every weight"):
        prune(rate=50.0)
