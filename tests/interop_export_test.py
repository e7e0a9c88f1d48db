"""The exported folder: what is in it, that it comes back bit for bit, and what leaves nothing."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_tiny import CONFIGS, assert_same_params, folder, logits, model
from safetensors.numpy import load_file

from swe_prune import interop, masks, tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, RunError
from swe_prune.interop.hf_config import read_config
from swe_prune.recipe import Recipe

RECORD = interop.PruningRecord(
    Recipe("magnitude", sparsity=0.5, seed=3),
    calibration={"text": "plays", "windows": 8},
    evaluation={"perplexity": {"dense": 10.5, "pruned": 11.0}},
    commit="0123abc",
)


def half_mask(params):
    """Keeps the larger half of each prunable tensor."""
    scores = tree.map_named(
        lambda _, weight, chosen: jnp.abs(weight.astype("float32")) if chosen else None,
        params,
        tree.prunable(params),
    )
    return masks.by_sparsity(scores, 0.5)


@pytest.mark.quick(24)
@pytest.mark.parametrize(("dtype", "shard_bytes"), [("float32", 10**9), ("bfloat16", 2500)])
@pytest.mark.parametrize("name", CONFIGS)
def test_out_and_in_again_is_bit_identical(tmp_path, name, shard_bytes, dtype):
    path, made = folder(tmp_path / "one", name, dtype, shard_bytes=shard_bytes)
    one = interop.load(path)
    assert_same_params(one.params, made.params)
    two = interop.load(interop.export(tmp_path / "two", one, shard_bytes=shard_bytes))
    assert_same_params(two.params, made.params)
    assert (two.config, two.vocab_size, two.family) == (one.config, one.vocab_size, one.family)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["torch_dtype"] == dtype


def test_parameters_of_several_dtypes_keep_theirs(tmp_path):
    made = model("llama", "bfloat16")
    params = tree.map_named(
        lambda name, leaf: leaf.astype("float32") if "norm" in name else leaf, made.params
    )
    path = interop.export(tmp_path / "out", made, params)
    assert_same_params(interop.load(path).params, params)
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_pruned_weights_are_exactly_zero_and_the_masks_come_back(tmp_path, name):
    made = model(name, "bfloat16")
    mask = half_mask(made.params)
    path = interop.export(tmp_path / "out", made, mask=mask, record=RECORD)
    assert_same_params(interop.load(path).params, masks.apply(made.params, mask))

    stored = load_file(path / "model.safetensors")
    zeros = sum(int((values.astype("float32") == 0).sum()) for values in stored.values())
    assert zeros == masks.summary(mask).pruned > 0

    back = interop.read_masks(path)
    assert jax.tree.structure(back) == jax.tree.structure(mask)
    for (name_, one), (_, two) in zip(
        tree.named_leaves(mask), tree.named_leaves(back), strict=True
    ):
        assert (one is None) == (two is None), name_
        if one is not None:
            np.testing.assert_array_equal(one, two)
    bits = sum(one.total for one in masks.summary(mask).tensors.values())
    packed = load_file(path / "masks.safetensors")
    assert sum(values.nbytes for values in packed.values()) == bits // 8


def test_the_record_says_what_was_pruned_and_how(tmp_path):
    made = model("llama")
    mask = half_mask(made.params)
    path = interop.export(tmp_path / "out", made, mask=mask, record=RECORD)
    said = json.loads((path / "pruning.json").read_text())
    assert said | dataclasses.asdict(RECORD) == said
    assert said["sparsity"] == 0.5
    assert said["pruned"] * 2 == said["prunable"]
    up = said["tensors"]["block_1/mlp/up/kernel"]
    assert up == {"sparsity": 0.5, "pruned": 160, "of": 320}
    assert said["version"]
    assert interop.read_record(path) == said
    with pytest.raises(InputError, match=r"has no pruning\.json"):
        interop.read_record(tmp_path)


def test_the_config_of_the_source_is_kept_and_one_that_changed_is_made(tmp_path):
    made = model("llama", initializer_range=0.5)
    made = dataclasses.replace(made, hf_config={**made.hf_config, "dtype": "bfloat16"})
    path = interop.export(tmp_path / "kept", made)
    kept = json.loads((path / "config.json").read_text())
    assert kept["initializer_range"] == 0.5
    assert kept["dtype"] == kept["torch_dtype"] == "float32"
    assert kept["architectures"] == ["LlamaForCausalLM"]

    # One neuron fewer in every MLP, as structured pruning leaves it.
    def shorter(name, leaf):
        cut = {"gate/kernel": (slice(None), slice(19)), "up/kernel": (slice(None), slice(19))}
        cut["down/kernel"] = (slice(19),)
        return leaf[next((by for end, by in cut.items() if name.endswith(end)), ())]

    params = tree.map_named(shorter, made.params)
    smaller = dataclasses.replace(
        made, params=params, config=dataclasses.replace(made.config, hidden=19)
    )
    path = interop.export(tmp_path / "smaller", smaller)
    assert json.loads((path / "config.json").read_text())["intermediate_size"] == 19
    assert_same_params(interop.load(path).params, params)


def test_files_of_the_source_come_along(tmp_path):
    path, _ = folder(tmp_path / "one", "gpt2")
    contents = {"tokenizer.model": b"\x00\x01", "LICENSE": b"as it is", "merges.txt": b"#version"}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    loaded = interop.load(path, tokenizer=False)
    out = interop.export(tmp_path / "two", loaded)
    for name, content in contents.items():
        assert (out / name).read_bytes() == content


def test_code_that_the_source_names_is_not_passed_on(tmp_path):
    path, _ = folder(tmp_path / "one", "gpt2")
    code = {
        "auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["x.T", None]},
        "custom_pipelines": {"text": {"impl": "x.P"}},
        "trust_remote_code": True,
    }
    kept = {"initializer_range": 0.5, "nested": {"a": [1]}}
    nested = {"nested": {"a": [1], "auto_map": {"AutoModel": "x.Y"}}}
    config = json.loads((path / "config.json").read_text()) | code | kept | nested
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_x.py").write_text("raise SystemExit('code of a stranger')")
    words = {"tokenizer_class": "X", "model_max_length": 9}
    (path / "tokenizer_config.json").write_text(json.dumps(words | code))
    (path / "generation_config.json").write_text(json.dumps({"top_k": 3} | code))
    (path / "tokenizer.json").write_text("{}")
    out = interop.export(tmp_path / "two", interop.load(path, tokenizer=False))
    for name in ("config", "tokenizer_config", "generation_config"):
        text = (out / f"{name}.json").read_text()
        assert not any(key in text for key in code), name
    written = json.loads((out / "config.json").read_text())
    assert written | kept == written
    words = json.loads((out / "tokenizer_config.json").read_text())
    assert words == {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 9}
    assert json.loads((out / "generation_config.json").read_text()) == {"top_k": 3}
    assert not (out / "modeling_x.py").exists()


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "config.json"])
def test_a_link_to_elsewhere_is_not_followed_into_an_export(tmp_path, name):
    path, _ = folder(tmp_path / "one", "gpt2")
    outside = tmp_path / "private"
    outside.write_text("{}")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"has '{name}', a link to .*private, which leaves"):
        interop.load(path)


def test_others_may_read_the_folder(tmp_path):
    made = model("gpt2")
    old = os.umask(0o022)
    try:
        path = interop.export(tmp_path / "out", made)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o755


def refused(folder, sentence, *args, **settings):
    with pytest.raises(InputError, match=sentence) as caught:
        interop.export(folder, *args, **settings)
    assert "\n" not in str(caught.value)


def test_a_folder_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", "already exists", model("gpt2"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "already exists", model("gpt2"))
    refused(tmp_path / "no" / "out", "the parent of out, is not a folder", model("gpt2"))


def test_parameters_that_do_not_fit_are_refused(tmp_path):
    made = model("llama")
    params = made.params | {"extra": jnp.ones(3)}
    refused(tmp_path / "out", "'extra' must have shape none .* got .3,.", made, params)
    params = {name: leaf for name, leaf in made.params.items() if name != "final_norm"}
    refused(tmp_path / "out", "'final_norm/scale' must have shape .* got none", made, params)
    other = dataclasses.replace(made, config=ModelConfig(norm="rms"))
    refused(tmp_path / "out", "must have shape", other)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_needs_a_record_and_must_fit(tmp_path):
    made = model("llama")
    mask = half_mask(made.params)
    refused(tmp_path / "out", "belong together", made, mask=mask)
    refused(tmp_path / "out", "belong together", made, record=RECORD)
    wrong = tree.map_tracked(lambda keep: keep[1:], mask)
    refused(tmp_path / "out", "mask of .* the weight's shape", made, mask=wrong, record=RECORD)
    odd = interop.PruningRecord(RECORD.recipe, evaluation={"loss": float("nan")})
    refused(tmp_path / "out", "PruningRecord is not JSON", made, mask=mask, record=odd)
    assert list(tmp_path.iterdir()) == []


def test_integers_are_no_weights(tmp_path):
    made = model("gpt2")
    params = jax.tree.map(lambda leaf: leaf.astype("int32"), made.params)
    refused(tmp_path / "out", "is int32, which is not supported", made, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, error):
    def fail(*_):
        assert len(list(tmp_path.iterdir())) == 1  # the partial folder
        raise error

    monkeypatch.setattr("swe_prune.interop.exporting.write_masks", fail)
    made = model("gpt2")
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        interop.export(tmp_path / "out", made, mask=half_mask(made.params), record=RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_masks_is_refused(tmp_path):
    path, made = folder(tmp_path / "dense", "gpt2")
    with pytest.raises(InputError, match=re.escape("masks.safetensors does not exist")):
        interop.read_masks(path)
    with pytest.raises(InputError, match=r"is not a \S+ mask file"):
        interop.read_masks(path / "model.safetensors")
    out = interop.export(tmp_path / "out", made, mask=half_mask(made.params), record=RECORD)
    content = (out / "masks.safetensors").read_bytes()
    (out / "masks.safetensors").write_bytes(content[:-1])
    with pytest.raises(InputError, match="is truncated: it has"):
        interop.read_masks(out)
    shapes = re.sub(rb"\[16, ?20\]", rb"[99, 20]", content)
    (out / "masks.safetensors").write_bytes(re.sub(rb"\[16, ?64\]", rb"[99, 64]", shapes))
    with pytest.raises(InputError, match=r"cannot be read .*: \d+ bytes for \d+ weights"):
        interop.read_masks(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_folder_and_a_made_config(tmp_path, name):
    torch = pytest.importorskip("torch", reason="transformers needs it to load a model")
    transformers = pytest.importorskip("transformers", reason="loads the folder")
    made = model(name)
    written = interop.write_config(made.config, made.vocab_size, made.family)
    made = dataclasses.replace(made, hf_config=written | {"pad_token_id": 0})
    assert read_config(made.hf_config)[1] == made.config
    mask = half_mask(made.params)
    path = interop.export(tmp_path / "out", made, mask=mask, record=RECORD)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens_BxL = np.random.default_rng(0).integers(0, made.vocab_size, (2, 20))
    with torch.no_grad():
        wanted = loaded.eval()(torch.tensor(tokens_BxL)).logits.numpy()
    pruned = dataclasses.replace(made, params=masks.apply(made.params, mask))
    found = logits(pruned, tokens_BxL)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
