"""Times of decoders: what is counted, in which order, and what is refused."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import latency
from swe_prune.evaluation.latency import Times, Workload
from swe_prune.models import gpt

CONFIG = ModelConfig(layers=1, heads=2, width=16, context=64)
LOAD = Workload(batch=2, prompt=8, new=3)


@pytest.fixture(scope="module")
def work():
    model = gpt.build(CONFIG, 17)
    return latency.compiled(model, latency.zeros(model), LOAD)


def test_works_run_in_turns_forward_and_backward_after_the_warm_up():
    order = []

    def work(name):
        return lambda: order.append(name) or (float(len(order)), 0.5)

    found = latency.alternating({"a": work("a"), "b": work("b")}, runs=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert found["a"] == (Times((3.0, 6.0)), Times((0.5, 0.5)))
    assert found["b"] == (Times((4.0, 5.0)), Times((0.5, 0.5)))


def test_median_p95_and_paired_ratios_are_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.random(20) + 0.5, rng.random(20) + 0.5
    times, base = Times(tuple(a)), Times(tuple(b))
    assert times.median == statistics.median(a)
    assert times.p95 == pytest.approx(np.percentile(a, 95))
    assert times.ratio(base) == pytest.approx(tuple(np.percentile(a / b, [25, 50, 75])))
    assert times.ratio(times) == (1.0, 1.0, 1.0)


def test_a_run_prefills_and_decodes_every_new_token(work):
    prefill, decode = work()
    assert prefill > 0
    assert decode > 0
    state = work._prefill()
    assert int(state.step) == 1
    assert int(work._decode(state).step) == 1 + LOAD.new


def test_memory_and_flops_are_at_least_what_the_weights_ask_for(work):
    params = latency.zeros(gpt.build(CONFIG, 17))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    kernels -= params["position_embedding"].size
    assert 2 * kernels <= work.flops <= 4 * kernels
    cache = 2 * LOAD.batch * (LOAD.prompt + LOAD.new + 1) * CONFIG.width * 4
    assert work.peak_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + cache


def test_a_measure_of_configs_measures_each_once(monkeypatch):
    calls = []
    kept = latency.compiled
    monkeypatch.setattr(latency, "compiled", lambda *args: calls.append(args) or kept(*args))
    measure = latency.decode_seconds(17, LOAD, runs=2)
    seconds = measure(CONFIG)
    assert seconds > 0
    assert measure(dataclasses.replace(CONFIG)) == seconds
    assert len(calls) == 1


def test_zeros_of_both_signs_are_not_counted_and_nan_is():
    assert latency.nonzero({"a": jnp.asarray([0.0, -0.0, 1.0, jnp.nan])}) == 2


@pytest.mark.parametrize(
    ("load", "part"),
    [
        (Workload(batch=0), "--batch must be 1 or more, got 0"),
        (Workload(prompt=0), "--prompt-tokens must be 1 or more, got 0"),
        (Workload(new=0), "--new-tokens must be 1 or more, got 0"),
        (Workload(prompt=60, new=4), "60 tokens and 5 new ones exceed the model's context of 64"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(load, part):
    with pytest.raises(InputError, match=part):
        load.check(64)


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (1, -1)])
def test_no_runs_are_refused(runs, warmup):
    with pytest.raises(InputError, match="must be"):
        latency.alternating({}, runs, warmup)


def test_memory_that_is_not_there_is_refused_before_it_is_taken(monkeypatch):
    model = gpt.build(CONFIG, 17)
    monkeypatch.setattr(latency, "free_bytes", lambda: 1000)
    with pytest.raises(
        InputError, match=r"at batch 2 needs .* GiB beside its weights, and 0.0 GiB"
    ):
        latency.compiled(model, latency.zeros(model), LOAD)


def test_a_device_that_runs_out_of_memory_is_a_sentence():
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    with pytest.raises(InputError, match="cut does not fit the memory of"):
        latency.alternating({"cut": full}, 1)
