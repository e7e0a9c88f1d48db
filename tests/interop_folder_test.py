"""Reading a folder: what is read, from where, into what memory, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from interop_tiny import CONFIGS, assert_same_params, folder, model
from safetensors.numpy import load_file, save_file

from swe_prune import interop, tree
from swe_prune.errors import InputError
from swe_prune.interop import optional

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture
def whole(tmp_path):
    return folder(tmp_path / "model", "llama")[0]


@pytest.fixture
def sharded(tmp_path):
    return folder(tmp_path / "model", "llama", shard_bytes=3000)[0]


def refused(path, sentence, **settings):
    with pytest.raises(InputError, match=sentence) as caught:
        interop.load(path, **settings)
    assert "\n" not in str(caught.value)


def rewrite(path, change):
    """Writes the weights again after a change of their dict of arrays."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_shards_hold_what_one_file_does(tmp_path):
    one, made = folder(tmp_path / "one", "phi3")
    many, _ = folder(tmp_path / "many", "phi3", shard_bytes=3000)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for path in (one, many):
        loaded = interop.load(path)
        assert_same_params(loaded.params, made.params)
        assert (loaded.family, loaded.config, loaded.kind) == ("phi3", made.config, "safetensors")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes_are_kept_or_converted(tmp_path, stored):
    path, made = folder(tmp_path / "model", "gpt2", stored)
    assert_same_params(interop.load(path).params, made.params)
    converted = interop.load(path, dtype="bfloat16").params
    wanted = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), made.params)
    assert_same_params(converted, wanted)


def test_parameters_go_where_they_are_sent(whole):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = {}

    def by_name(name, shape):
        asked[name] = shape
        return place

    params = interop.load(whole, shardings=by_name).params
    assert asked == {name: leaf.shape for name, leaf in tree.named_leaves(params)}
    assert all(leaf.committed for leaf in jax.tree.leaves(params))
    as_tree = jax.tree.map(lambda _: place, params)
    assert_same_params(interop.load(whole, shardings=as_tree).params, params)
    del as_tree["block_1"]
    refused(whole, "shardings lack 'block_1/", shardings=as_tree)


def test_the_bare_model_without_prefix_is_read(tmp_path):
    path, made = folder(tmp_path / "model", "gpt2")

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)  # the causal mask

    rewrite(path, bare)
    assert_same_params(interop.load(path).params, made.params)


def test_a_copy_of_a_tied_head_must_be_equal(tmp_path):
    path, made = folder(tmp_path / "model", "llama tied")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same_params(interop.load(path).params, made.params)
    rewrite(path, lambda t: t["lm_head.weight"].__setitem__((-1, -1), 9.0))
    refused(path, "'lm_head.weight' that differs from 'model.embed_tokens.weight'")


def test_rotary_buffers_are_ignored(whole):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(whole, lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    interop.load(whole)


def test_what_is_no_model_is_refused(tmp_path):
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "is not a model folder: it has no config.json")
    (tmp_path / "notes.txt").write_text("no model")
    refused(tmp_path / "notes.txt", "neither a folder nor a GGUF file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot be read")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "holds no JSON object")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    refused(tmp_path, "has no weights: neither model.safetensors nor")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    refused(tmp_path, "rename it to model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, f"{name}, a pickle, which can run code")


def test_an_architecture_of_another_kind_is_refused_before_the_weights_are_looked_at(whole):
    edit(whole / "config.json", lambda config: config.update(model_type="mamba"))
    (whole / WEIGHTS).unlink()
    refused(whole, "model_type 'mamba', which is not supported; supported are gpt2")


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_truncated_file_is_refused(whole, left):
    content = (whole / WEIGHTS).read_bytes()
    (whole / WEIGHTS).write_bytes(content[:left])
    refused(whole, "truncated")


def test_a_damaged_file_is_refused(whole):
    content = (whole / WEIGHTS).read_bytes()
    (whole / WEIGHTS).write_bytes(content[:8] + b"?" + content[9:])
    refused(whole, "the header of .* cannot be read")
    (whole / WEIGHTS).write_bytes(content + b"more")
    refused(whole, "cannot be read")


def test_what_cannot_be_opened_is_a_sentence(whole):
    (whole / WEIGHTS).unlink()
    (whole / WEIGHTS).mkdir()
    refused(whole, "model.safetensors is not a regular file")


def test_a_truncated_or_missing_shard_is_found_before_any_is_read(sharded, monkeypatch):
    monkeypatch.setattr("swe_prune.interop.pretrained.read_params", lambda *_: pytest.fail("read"))
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    refused(sharded, f"{last.name} is truncated: it has {len(content) - 1:,} of {len(content):,}")
    last.unlink()
    refused(sharded, f"lacks '{last.name}', which its index names")


def test_an_index_that_is_wrong_about_a_shard_is_refused(sharded):
    def swap(index):
        names = index["weight_map"]
        first = next(iter(names))
        names[first] = sorted(set(names.values()))[-1]

    edit(sharded / INDEX, swap)
    refused(sharded, "which does not have it")
    edit(sharded / INDEX, lambda index: index.pop("weight_map"))
    refused(sharded, "no weight_map")


def test_a_path_that_leaves_the_folder_is_refused(sharded):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes(first.read_bytes())

    def send(to):
        def change(index):
            for name, file in index["weight_map"].items():
                if (
                    file not in {path.name for path in sharded.glob("model-*")}
                    or file == first.name
                ):
                    index["weight_map"][name] = to

        edit(sharded / INDEX, change)

    for to in ("../outside.safetensors", str(outside)):
        send(to)
        refused(sharded, "leaves its folder; do not use")
    send(first.name)
    first.unlink()
    first.symlink_to(outside)
    refused(sharded, "a link to .*outside.safetensors, which leaves its folder")


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    path, made = folder(tmp_path / "plain", "llama", shard_bytes=3000)
    snapshot = tmp_path / "models--x" / "snapshots" / "1a2b"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.parent.mkdir(parents=True)
    path.rename(snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert_same_params(interop.load(snapshot).params, made.params)


def test_a_tensor_of_another_shape_or_dtype_is_refused(whole):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(whole / WEIGHTS)
    rewrite(whole, lambda t: t.update({name: t[name].T.copy()}))
    refused(whole, rf"{name}' of shape \(16, 20\) and its config requires \(20, 16\)")
    rewrite(whole, lambda t: t.update({name: tensors[name].astype(np.int8)}))
    refused(whole, f"{name}' as I8, which is not supported")


def test_missing_and_unexpected_tensors_are_refused(whole):
    tensors = load_file(whole / WEIGHTS)
    rewrite(whole, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])
    refused(whole, r"lacks 'model.layers.1.*' and \d more of this model's")
    rewrite(whole, lambda t: t.update(tensors | {"model.layers.2.x": np.ones(2, np.float32)}))
    refused(whole, "has 'model.layers.2.x', which is not part of this model")


def test_an_unknown_dtype_is_refused(whole):
    refused(
        whole, "dtype must be one of float32, bfloat16, float16, None, got 'int8'", dtype="int8"
    )


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        InputError, match=r"'safetensors', which is not installed.*swe-prune\[pretrained\]"
    ):
        optional.require("safetensors", "reading")


PEAK = """
import re, sys
from swe_prune import interop

def peak():  # of this process; getrusage counts that of the one that started it, too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

interop.load(sys.argv[1])  # a tiny one: what is imported and traced is not part of the model
before = peak()
model = interop.load(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_model_is_never_twice_in_memory(tmp_path):
    """At the peak there are the parameters, and the largest tensor as it is read and turned round.

    The allocator keeps some 30 MB of freed room between them; holding every tensor twice takes 290.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
    made = model("llama", **sizes, vocab_size=2000, num_attention_heads=8)
    path = interop.export(tmp_path / "model", made)
    leaves = jax.tree.leaves(made.params)
    size, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    assert size > 100e6
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    tiny, _ = folder(tmp_path / "tiny", "llama")
    command = [sys.executable, "-c", PEAK, str(tiny), str(path)]
    home = Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=True)
    assert size < int(done.stdout) < 1.25 * size + 2 * largest + 20e6
