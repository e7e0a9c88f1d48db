"""Folders as people have them: several sets of weights, shards without index, other kinds of files.

What transformers reads is read, what lies next to it is said, and the advice of a refusal works.
"""

import json
import warnings

import numpy as np
import pytest
from interop_tiny import CONFIGS, assert_same_params, folder
from safetensors.numpy import load_file, save_file

from swe_prune import interop
from swe_prune.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def refused(path, sentence, **settings):
    with pytest.raises(InputError, match=sentence) as caught:
        interop.load(path, **settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def one(tmp_path):
    return folder(tmp_path / "one", "llama")


@pytest.fixture
def sharded(tmp_path):
    """A folder of several shards and its index."""
    return folder(tmp_path / "many", "llama", shard_bytes=6000)


@pytest.fixture
def both(one, sharded):
    """A folder of one file, with the same weights as shards and index next to it."""
    for file in sharded[0].glob("model*"):
        file.rename(one[0] / file.name)
    return one


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_an_index_of_the_same_weights_next_to_one_file_is_not_worth_a_word(both):
    path, made = both
    assert (path / WEIGHTS).exists()
    assert (path / INDEX).exists()
    assert_same_params(interop.load(path).params, made.params)
    for file in path.glob("model-*"):
        file.unlink()
    listed = dict.fromkeys(load_file(path / WEIGHTS), WEIGHTS)
    (path / INDEX).write_text(json.dumps({"weight_map": listed}))
    assert_same_params(interop.load(path).params, made.params)


def test_of_one_file_and_an_index_of_other_weights_the_file_is_read_and_it_is_said(both):
    path, made = both
    rewrite(path / WEIGHTS, lambda t: t[UP].fill(0))
    with pytest.warns(UserWarning, match=f"both {WEIGHTS}, which is read.*{INDEX}.*'{UP}' differs"):
        found = interop.load(path).params
    assert not np.asarray(found["block_1"]["mlp"]["up"]["kernel"]).any()
    np.testing.assert_array_equal(
        found["block_0"]["mlp"]["up"]["kernel"], made.params["block_0"]["mlp"]["up"]["kernel"]
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: sorted(path.glob("model-*"))[-1].unlink(), "lacks 'model-0000"),
        (lambda path: (path / INDEX).write_text("{"), "cannot be read"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"x": "../x"}}'), "leaves its"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {}}'), "differs"),
    ],
)
def test_an_index_that_cannot_be_read_next_to_one_file_is_said(both, damage, said):
    path, made = both
    damage(path)
    with pytest.warns(UserWarning, match=said):
        assert_same_params(interop.load(path).params, made.params)


def test_shards_without_an_index_are_read_by_their_names(sharded):
    path, made = sharded
    (path / INDEX).unlink()
    assert len(list(path.glob("model-*"))) > 2
    assert_same_params(interop.load(path).params, made.params)


def test_a_shard_that_is_missing_without_an_index_is_named(sharded):
    path, made = sharded
    (path / INDEX).unlink()
    first = path / sorted(file.name for file in path.glob("model-*"))[0]
    content = first.read_bytes()
    first.unlink()
    refused(path, f"lacks '{first.name}'; get that file")
    first.write_bytes(content)  # the advice, followed
    assert_same_params(interop.load(path).params, made.params)


def test_a_shard_that_was_taken_for_the_whole_is_said_to_have_others_next_to_it(sharded):
    path, made = sharded
    (path / INDEX).unlink()
    first = sorted(path.glob("model-*"))[0]
    first.rename(path / WEIGHTS)
    with pytest.warns(UserWarning, match="give shards their own names"):
        refused(path, "lacks")
    (path / WEIGHTS).rename(first)  # the advice, followed
    assert_same_params(interop.load(path).params, made.params)


def test_a_tensor_in_two_shards_without_an_index_is_refused(sharded):
    path, made = sharded
    index = (path / INDEX).read_text()
    (path / INDEX).unlink()
    first, *_, last = sorted(path.glob("model-*"))
    name = next(iter(load_file(last)))
    rewrite(first, lambda t: t.update({name: np.ones(2, np.float32)}))
    refused(path, f"'{name}' both in {first.name} and in {last.name}.*get the index")
    (path / INDEX).write_text(index)  # the advice, followed
    assert_same_params(interop.load(path).params, made.params)


def test_shards_of_two_models_without_an_index_are_refused(sharded):
    path, made = sharded
    (path / INDEX).unlink()
    save_file({"x": np.ones(2, np.float32)}, path / "model-00001-of-00099.safetensors")
    refused(path, "the shards of 2 models, such as .*move those of all but one")
    (path / "model-00001-of-00099.safetensors").unlink()  # the advice, followed
    assert_same_params(interop.load(path).params, made.params)


def test_a_shard_without_an_index_that_is_a_link_to_elsewhere_is_refused(sharded):
    path, _ = sharded
    (path / INDEX).unlink()
    first = sorted(path.glob("model-*"))[0]
    first.rename(path.parent / "outside.safetensors")
    first.symlink_to(path.parent / "outside.safetensors")
    refused(path, "a link to .*outside.safetensors, which leaves its folder")


def test_a_file_of_another_name_is_read_once_it_is_renamed_as_advised(one):
    path, made = one
    (path / WEIGHTS).rename(path / "weights.safetensors")
    save_file({"x": np.ones(2, np.uint8)}, path / "masks.safetensors")  # of an export, no weights
    refused(path, f"has weights.safetensors .*; rename it to {WEIGHTS}")
    (path / "weights.safetensors").rename(path / WEIGHTS)
    assert_same_params(interop.load(path).params, made.params)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.safetensors", "b.safetensors"], "keep the file of one model and rename it"),
        (["consolidated.safetensors"], "in the format of Mistral"),
        (["pytorch_model.bin", "optimizer.pt", "training_args.bin"], "as pytorch_model.bin, a pic"),
        (["pytorch_model-00001-of-00002.bin"], "a pickle, which can run code.*save_pretrained"),
        (["training_args.bin"], "has no weights"),
        (["tf_model.h5"], "as tf_model.h5, a format that is not read"),
        (["model-q4.gguf"], "give the path .*model-q4.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter.*merge_and_unload"),
        (["adapter_config.json", "adapter_model.bin"], "an adapter.*merge_and_unload"),
        (["masks.safetensors"], "has no weights"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_of_another_kind_are_named_with_what_to_do(tmp_path, files, said, with_config):
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x04")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    elif not any(name.startswith("adapter") or name.endswith("gguf") for name in files):
        said = "has no config.json"
    refused(tmp_path, said)


def test_an_adapter_next_to_the_weights_is_said_not_to_be_applied(one):
    path, made = one
    (path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="has an adapter next to its .*, which is not applied"):
        assert_same_params(interop.load(path).params, made.params)


@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_a_tied_pair_may_be_stored_under_the_name_of_the_head(tmp_path, name):
    path, made = folder(tmp_path / "model", name)
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, path / WEIGHTS, {embedding: "lm_head.weight"})
    loaded = interop.load(path)
    assert_same_params(loaded.params, made.params)
    out = interop.export(tmp_path / "out", loaded)
    assert embedding in load_file(out / WEIGHTS)
    assert_same_params(interop.load(out).params, made.params)


def test_the_head_is_not_taken_for_the_embedding_of_an_untied_pair(one):
    path, _ = one
    rewrite(path / WEIGHTS, lambda t: t.pop("model.embed_tokens.weight"))
    refused(path, "lacks 'model.embed_tokens.weight'")


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model.", "a-b/", "model."]
)
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_a_prefix_is_named_and_accepted(tmp_path, name, prefix):
    path, made = folder(tmp_path / "model", name)
    tensors = load_file(path / WEIGHTS)
    if name == "llama tied":  # under the other name
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file({prefix + key: value for key, value in tensors.items()}, path / WEIGHTS)
    refused(path, f"after the prefix '{prefix}'; give --prefix={prefix} ")
    loaded = interop.load(path, prefix=prefix)
    assert_same_params(loaded.params, made.params)
    if prefix.endswith("."):
        assert_same_params(interop.load(path, prefix=prefix[:-1]).params, made.params)
    out = interop.export(tmp_path / "out", loaded)
    assert_same_params(interop.load(out).params, made.params)


def test_a_prefix_that_is_not_there_is_refused_and_none_is_needed_for_plain_names(one):
    path, made = one
    refused(path, "prefix 'module.' begins none of the names in", prefix="module.")
    assert_same_params(interop.load(path, prefix="").params, made.params)
    assert_same_params(interop.load(path, prefix="model.").params, made.params)


def test_two_prefixes_mixed_are_refused_with_both(one):
    path, _ = one
    tensors = load_file(path / WEIGHTS)

    def mix(first, second, share):
        count = round(len(tensors) * share)
        prefixes = [first] * count + [second] * (len(tensors) - count)
        mixed = {p + key: tensors[key] for p, key in zip(prefixes, tensors, strict=True)}
        save_file(mixed, path / WEIGHTS)

    for share in (0.25, 0.75):
        mix("", "a.", share)
        refused(
            path, "after several prefixes, '', 'a.' \\('' is none\\), which one --prefix cannot"
        )
    mix("module.", "_orig_mod.", 0.5)
    refused(path, "after several prefixes, '_orig_mod.', 'module.'")
    refused(path, "after several prefixes, '', '_orig_mod.'", prefix="module.")


def test_a_part_that_was_wrapped_has_the_prefix_inside_of_its_names(one):
    path, made = one
    tensors = load_file(path / WEIGHTS)
    for inside in ("model.", "model.layers.1."):
        wrapped = {key.replace(inside, f"{inside}_orig_mod.", 1): tensors[key] for key in tensors}
        save_file(wrapped, path / WEIGHTS)
        refused(path, r"has '_orig_mod.' in the names .*; give --prefix=_orig_mod. ")
        assert_same_params(interop.load(path, prefix="_orig_mod.").params, made.params)
    twice = {f"_orig_mod.{key}": value for key, value in wrapped.items()}
    save_file(twice, path / WEIGHTS)
    assert_same_params(interop.load(path, prefix="_orig_mod").params, made.params)


@pytest.mark.parametrize("name", ["model-{}-of-000002", "model-{}-of-2", "pytorch_model-0{}-of-02"])
@pytest.mark.parametrize("first", [0, 1])
def test_shards_may_be_numbered_in_other_ways(one, name, first):
    path, made = one
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    for number in (0, 1):
        part = {key: tensors[key] for key in list(tensors)[number::2]}
        save_file(part, path / f"{name.format(first + number)}.safetensors")
    assert_same_params(interop.load(path).params, made.params)
    last = path / f"{name.format(first + 1)}.safetensors"
    last.rename(path.parent / last.name)
    if first:  # of a set that counts from 0, the first is missing as well as the second
        refused(path, f"has 1 of 2 shards and lacks '{last.name}'; get that file")


def test_of_two_whole_models_under_two_prefixes_one_is_chosen(one):
    path, made = one
    tensors = load_file(path / WEIGHTS)
    policy = {"policy." + key: value for key, value in tensors.items()}
    reference = {"reference." + key: value * 2 for key, value in tensors.items()}
    save_file(policy | reference, path / WEIGHTS)
    refused(path, "give --prefix=policy. or --prefix=reference. ")
    with pytest.warns(UserWarning, match=r"has 'reference.* and \d+ more outside of the prefix"):
        assert_same_params(interop.load(path, prefix="policy.").params, made.params)


def test_a_model_next_to_one_under_a_prefix_needs_no_prefix_itself(one):
    path, _ = one
    tensors = load_file(path / WEIGHTS)
    for other in ("ema.", "model._orig_mod."):
        save_file(tensors | {other + key: tensors[key] for key in tensors}, path / WEIGHTS)
        refused(path, f"has '{other}.*, which is not part of this model")
    short = {key: value for key, value in tensors.items() if key != UP}
    draft = {key.replace("model.", "draft.", 1): tensors[key] for key in tensors if "layers" in key}
    save_file(short | draft, path / WEIGHTS)
    refused(path, f"lacks '{UP}'")


def test_the_language_model_of_a_model_of_text_and_images_may_have_its_head_outside(one):
    path, made = one
    tensors = load_file(path / WEIGHTS)
    inside = {
        key.replace("model.", "model.language_model.", 1): value for key, value in tensors.items()
    }
    inside["model.visual.layers.0.self_attn.q_proj.weight"] = np.ones((2, 2), np.float32)
    save_file(inside, path / WEIGHTS)
    refused(path, "--prefix=model.language_model. ")
    with pytest.warns(UserWarning, match=r"has 'model.visual.* outside of the prefix"):
        assert_same_params(interop.load(path, prefix="model.language_model").params, made.params)


def test_a_model_with_adapters_in_it_is_refused_with_what_to_do(one):
    path, _ = one

    def adapt(tensors):
        tensors["base_model.model." + UP.replace(".weight", ".lora_A.weight")] = tensors.pop(UP)

    rewrite(path / WEIGHTS, adapt)
    refused(path, "has adapters next to its weights; merge them")


def test_a_sharded_folder_takes_a_prefix_without_reading_more(sharded):
    path, made = sharded
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = {"module." + key: file for key, file in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    for file in path.glob("model-*"):
        save_file({"module." + key: value for key, value in load_file(file).items()}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_params(interop.load(path, prefix="module.").params, made.params)
