"""Reading a checkpoint on eight devices: each gets its slice, and the whole is what was stored."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from swe_prune import interop, parallel, tree
from swe_prune.config import ParallelConfig
from swe_prune.interop import folder_files, hf_config, slices
from swe_prune.interop.pretrained import Pretrained
from swe_prune.models import gpt

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
HF = {
    "model_type": "phi3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


EXPERTS = HF | {"model_type": "mixtral", "num_local_experts": 3}


@pytest.fixture(params=[HF, EXPERTS], ids=lambda hf: hf["model_type"])
def made(tmp_path, request):
    hf = request.param
    family, config, vocab_size = hf_config.read_config(hf)
    rng = np.random.default_rng(0)
    shapes = slices.param_shapes(config, vocab_size)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = jax.tree.map(jax.numpy.asarray, tree.nested(params))
    made = Pretrained(
        config, vocab_size, params, None, family, tmp_path / "none", "safetensors", hf
    )
    interop.export(tmp_path / "model", made)
    return made


def test_each_device_reads_its_slice(made, tmp_path, monkeypatch):
    mesh = parallel.mesh(ParallelConfig(fsdp=4, tensor=2))
    specs, uneven = parallel.partition(made.params, gpt.partition_rules(made.config), mesh)
    assert not uneven
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    read = []
    whole_part = slices.ParamSlice.read

    def counted(part, stored, index):
        values = whole_part(part, stored, index)
        read.append((part.name, values.size))
        return values

    monkeypatch.setattr(slices.ParamSlice, "read", counted)
    params = interop.load(tmp_path / "model", shardings=shardings).params
    for name, leaf in tree.named_leaves(params):
        assert leaf.sharding == dict(tree.named_leaves(shardings))[name]
        np.testing.assert_array_equal(leaf, dict(tree.named_leaves(made.params))[name])
    divided = [size for name, size in read if name == "block_0/mlp/gate/kernel"]
    assert divided == [16 * 32 // 8] * 8 * (made.config.experts or 1)


def test_the_sharded_model_goes_out_as_the_whole_one_does(made, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    params = jax.device_put(made.params, whole)
    path = interop.export(tmp_path / "again", made, params)
    name = folder_files.WEIGHTS
    assert (path / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
