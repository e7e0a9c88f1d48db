"""The mesh and the path rules: what fits, and one sentence for what does not."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from swe_prune import parallel
from swe_prune.config import ModelConfig, ParallelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.training import state as state_lib

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
    assert uneven == ["up/kernel [8, 6] stays whole over 'fsdp': 6 is no multiple of 4"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("bias", (None,))], "no partition rule matches 'up/kernel'"),
        ([("kernel", ("fsdp",)), ("nothing", ())], "rule 'nothing' matches no parameter"),
        ([("kernel", ("fsdq",))], "names axis 'fsdq'.*data, fsdp, tensor"),
        ([("kernel", ("fsdp", "fsdp"))], "names an axis twice"),
        ([("kernel", ("fsdp", None, None))], "has 3 axes and 'up/kernel'"),
        ([("kern[", ("fsdp",))], "no regular expression"),
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
        with pytest.raises(InputError, match=f"there are {devices}; make the lengths"):
            parallel.mesh(settings)
    assert parallel.mesh(ParallelConfig()).shape["data"] == devices


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"config.data.batch = 12 .* = 8 devices; .* multiple"):
        parallel.check_batch(12, "config.data.batch", MESH)
    parallel.check_batch(16, "config.data.batch", MESH)
