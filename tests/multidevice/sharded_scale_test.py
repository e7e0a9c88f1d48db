"""What a mesh that is not there would cost, held against programs whose collectives are known."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_experiment_test import LAYOUTS, settings, text  # noqa: F401, a fixture

from swe_prune import cli
from swe_prune.study import plan_at_scale, setup

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
SHAPE = (16, 32)
BYTES = 4 * math.prod(SHAPE)


def received(run, x, out):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    program = jax.jit(
        run, in_shardings=NamedSharding(mesh, x), out_shardings=NamedSharding(mesh, out)
    )
    compiled = program.lower(jax.ShapeDtypeStruct(SHAPE, jnp.float32)).compile()
    return {k: v for k, v in plan_at_scale.received(compiled.as_text(), 8).items() if v}


@pytest.mark.parametrize(
    ("spec", "group"), [(P("a"), 4), (P("b"), 2), (P(("a", "b")), 8), (P(None, "a"), 4)]
)
def test_a_gather_brings_all_but_the_own_share(spec, group):
    found = received(lambda x: x, spec, P())
    assert found == {"all-gather": BYTES * (group - 1) // group}


def test_a_sum_goes_round_the_ring_twice():
    found = received(lambda x: jnp.sum(x, axis=0), P("a"), P())
    assert found == {"all-reduce": 2 * 3 * 4 * SHAPE[1] // 4}


def test_a_loops_body_counts_as_often_as_it_runs():
    def run(x):
        def body(carry, _):
            return jnp.tanh(carry + jnp.sum(carry, axis=0)), None

        return jax.lax.scan(body, x, None, length=5)[0]

    once = 2 * 3 * 4 * SHAPE[1] // 4
    assert received(run, P("a"), P("a")) == {"all-reduce": 5 * once}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_each_device_holds_is_what_it_would_be_given(layout, text, tmp_path):  # noqa: F811
    experiment = setup(settings(text, LAYOUTS[layout]), tmp_path)
    state = experiment.fresh_state(0)

    def held(tree):
        device = jax.devices()[0]
        return sum(
            np.asarray(shard.data).nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    found = plan_at_scale.cost(experiment)
    assert found.parameters == held(state.params)
    assert found.optimizer == held(state.opt_state)
    assert found.statistics == held(state.stats)
    assert found.temporary > 0
    assert (found.received.get("all-gather", 0) > 0) == (layout != "data")


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_no_activation_is_sent_so_a_larger_batch_costs_no_more(layout, text, tmp_path):  # noqa: F811
    """Without `constrain_rows` the partitioner divides activations over their width, here at 16."""
    found = []
    for batch in (16, 32):
        config = settings(text, LAYOUTS[layout])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=batch))
        found.append(plan_at_scale.cost(setup(config, tmp_path)).received)
    assert found[0] == found[1]


def test_the_command_compiles_for_more_devices_than_there_are(text, tmp_path, capfd):  # noqa: F811
    """Sixteen, in a process of its own."""
    from pathlib import Path

    import tiny

    config = tiny.config_file(Path(tmp_path), settings(text))
    command = ["plan", f"--config={config}", "--devices=16", "--json", "--config.data.batch=16"]
    more = ["--config.parallel.fsdp=16", "--config.data.eval_windows=16"]
    assert cli.main([*command, *more, "--config.data.eval_batch=16"]) == 0
    sixteen = json.loads(capfd.readouterr().out)
    assert sixteen["parameters"] > 0
    assert sixteen["received"]["all-gather"] > 0
    host = "--config.parallel.statistics=host"
    assert cli.main([*command, *more, host, "--config.data.eval_batch=16"]) == 0
    on_host = json.loads(capfd.readouterr().out)
    assert on_host["statistics_on_host"]
    assert on_host["device"] <= sixteen["device"] - sixteen["statistics"]
