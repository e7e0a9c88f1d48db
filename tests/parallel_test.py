"""The mesh and the path rules: what fits, and one sentence for what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from swe_prune import parallel, study, trajectory
from swe_prune.config import ModelConfig, ParallelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.parallel import host_memory
from swe_prune.study import phases, saved
from swe_prune.training import loop
from swe_prune.training import state as state_lib
from swe_prune.training.progress import Progress

MESH = AbstractMesh((2, 4, 2), parallel.AXES, axis_types=(AxisType.Auto,) * 3)
PARAMS = {"up": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "scale": jnp.ones(())}


def test_the_first_rule_that_matches_wins():
    rules = [("up/kernel", ("fsdp", "tensor")), ("kernel", (None, "fsdp"))]
    specs, uneven = parallel.partition(PARAMS, rules, MESH)
    assert specs == {"up": {"kernel": P("fsdp", "tensor"), "bias": P()}, "scale": P()}
    assert uneven == []


def test_what_cannot_be_divided_evenly_stays_whole_and_is_reported():
    specs, uneven = parallel.partition(PARAMS, [("kernel", ("tensor", "fsdp"))], MESH)
    assert specs["up"]["kernel"] == P("tensor", None)
    assert uneven == ["up/kernel [8, 6] is not sharded over 'fsdp': 6 is not a multiple of 4"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("bias", (None,))], "no partition rule matches 'up/kernel'"),
        ([("kernel", ("fsdp",)), ("nothing", ())], "rule 'nothing' matches no parameter"),
        ([("kernel", ("fsdq",))], "names axis 'fsdq'.*data, fsdp, tensor"),
        ([("kernel", ("fsdp", "fsdp"))], "names an axis twice"),
        ([("kernel", ("fsdp", None, None))], "has 3 axes and 'up/kernel'"),
        ([("kern[", ("fsdp",))], "not a regular expression"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules, message):
    with pytest.raises(InputError, match=message):
        parallel.partition(PARAMS, rules, MESH)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_rules_cover_it_and_divide_every_kernel(tied):
    config = ModelConfig(layers=2, heads=2, width=16, context=8, tied_head=tied)
    model = gpt.build(config, 12)
    params = jax.eval_shape(lambda: state_lib.init_params(model, 0, 8))
    specs, uneven = parallel.partition(params, gpt.partition_rules(config), MESH)
    assert uneven == []
    for spec in jax.tree.leaves(
        {key: specs[key] for key in specs if key.startswith("block")},
        is_leaf=lambda leaf: isinstance(leaf, P),
    ):
        assert spec == P() or {"fsdp", "tensor"} == set(spec)


def test_a_mesh_that_does_not_match_the_devices_is_refused():
    devices = jax.device_count()
    for settings in (ParallelConfig(data=3 * devices), ParallelConfig(fsdp=2 * devices)):
        with pytest.raises(InputError, match=rf"a mesh of {devices} devices, .*; make the lengths"):
            parallel.mesh(settings)
    assert parallel.mesh(ParallelConfig()).shape["data"] == devices


def test_statistics_in_host_memory_are_bit_equal_and_stay_there():
    measures = tuple(trajectory.BUFFERS)
    draw = np.random.default_rng(0).normal(size=(5, 8, 6)).astype(np.float32)
    params = {"a": {"kernel": jnp.asarray(draw[0]), "bias": jnp.ones(6)}, "b": jnp.ones((4, 4))}
    here = trajectory.init(params, measures, compensated=True)
    away = host_memory.to_host(here)
    for values in draw:
        params["a"]["kernel"] = jnp.asarray(values)
        here = jax.jit(trajectory.update)(here, params)
        away = host_memory.snapshot(away, params)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.buffers)}
    assert kinds == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(away), jax.device_get(here))


@pytest.mark.slow
def test_an_experiment_tracks_in_host_memory_what_it_tracks_on_the_device(
    tmp_path, plays_dir, monkeypatch
):
    """Through a checkpoint in the middle, for two seeds, and on to the masks."""
    settings = tiny.config(plays_dir)
    cells = dataclasses.replace(settings.study, std_criteria=(), criteria=("swe",))
    settings = dataclasses.replace(settings, study=cells)
    host = dataclasses.replace(settings, parallel=ParallelConfig(statistics="host"))
    masks = []
    for name, config in (("device", settings), ("host", host)):
        made = study.setup(config, tmp_path / name)
        with study.claim(made.workdir, config):
            if name == "host":
                with monkeypatch.context() as patch:
                    patch.setattr(loop.metrics_lib.MetricsLogger, "enqueue", fails_at(10))
                    with pytest.raises(RuntimeError, match="power"):
                        phases.train(made, Progress())
            phases.train(made, Progress())
            phases.prune(made, Progress())
        stats = [saved.load_dense(made, seed).stats for seed in (0, 1)]
        assert [int(one.count) for one in stats] == [8, 8]
        masks.append([jax.device_get(saved.load_masks(made, cell)) for cell in made.cells])
    state = made.fresh_state(0)
    assert {b.sharding.memory_kind for b in jax.tree.leaves(state.stats.buffers)} == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, *masks)


def fails_at(step):
    late = loop.metrics_lib.MetricsLogger.enqueue

    def failing(meter, number, *rest, **more):
        if number == step:
            raise RuntimeError("power cut")
        late(meter, number, *rest, **more)

    return failing


def test_where_there_is_no_host_memory_a_sentence_says_so():
    class Kind:
        kind = "hbm"

    class Device:
        platform = "abacus"

        def addressable_memories(self):
            return [Kind()]

    class Grid:
        devices = np.array([Device()])

    assert "but abacus only has hbm" in host_memory.host_memory_missing(Grid())


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"config.data.batch = 12 .* = 8 devices; .* multiple"):
        parallel.check_batch(12, "config.data.batch", MESH)
    parallel.check_batch(16, "config.data.batch", MESH)
