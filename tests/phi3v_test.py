"""Phi-3-vision and its tower: published sizes, and a tiny model of torch's, tensor by tensor.

The golden folder is made by golden/make_phi3v_golden.py.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from interop_tiny import assert_logits_close, assert_same_params
from PIL import Image

from swe_prune import interop, masks, tree
from swe_prune import recipe as recipe_lib
from swe_prune.config import ModelConfig, VisionConfig
from swe_prune.data import images
from swe_prune.errors import InputError
from swe_prune.interop import slices
from swe_prune.interop.tensor_names import SAFETENSORS
from swe_prune.models import gpt, phi3v
from swe_prune.models.vision import VisionTower, encoder
from swe_prune.recipe import Recipe

FOLDER = Path(__file__).parent / "golden" / "phi3_v"
GOLDEN = np.load(FOLDER / "golden.npz")
SIZES = ("wide", "high", "square")
FULL = ModelConfig(
    layers=32,
    heads=32,
    width=3072,
    hidden=8192,
    context=131072,
    vision=VisionConfig(),
    **tiny.PHI3V,
)


@pytest.fixture(scope="module")
def model():
    return interop.load(FOLDER, dtype="float32", tokenizer=False)


def golden(size, *names):
    return [GOLDEN[f"{size}_{name}"] for name in names]


def text(size, before=3):
    """The tokens of a golden text, with those of its image, as a batch of one."""
    ids, grid = golden(size, "ids", "grid")
    image = np.full(VisionConfig(image=8, patch=2).tokens(*grid), phi3v.IMAGE_TOKEN)
    return np.concatenate([ids[:before], image, ids[before:]])[None].astype(np.int32)


def inputs(size):
    pixels, grid = golden(size, "pixels", "grid")
    return {"tokens": text(size), "pixels": pixels[None], "grid": grid[None].astype(np.int32)}


def test_tower_and_decoder_start_as_wide_as_each_is_told():
    vision = VisionConfig(2, 2, 64, 128, image=16, patch=4, crops=1, init_stddev=0.05)
    small = {"layers": 1, "heads": 2, "width": 64, "hidden": 128, "context": 64}
    config = ModelConfig(**small, positions="rope", init_stddev=0.08, vision=vision)
    init = jax.jit(phi3v.build(config, 50).init)
    params = init(jax.random.key(0), phi3v.example(config, 4))["params"]
    for kernel, stddev in [
        (params["vision"]["patch_embedding"], 0.05),
        (params["vision"]["block_0"]["mlp"]["up"], 0.05),
        (params["projection"]["first"], 0.08),
        (params["decoder"]["block_0"]["mlp"]["up"], 0.08),
    ]:
        assert np.std(kernel["kernel"]) == pytest.approx(stddev, rel=0.06)


@pytest.mark.parametrize("stddev", [0.0, -0.02, float("nan")])
def test_initial_values_without_a_spread_are_refused(stddev):
    vision = VisionConfig(2, 2, 8, 8, image=8, patch=2, init_stddev=stddev)
    with pytest.raises(InputError, match=r"config\.model\.vision\.init_stddev must be .* above 0"):
        phi3v.build(ModelConfig(vision=vision), 50)


def test_the_published_sizes():
    shapes = slices.param_shapes(FULL, 32064)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count == 4_146_621_440
    parts = {"decoder": 3_821_079_552, "vision": 303_507_456, "projection": 22_034_432}
    for part, wanted in parts.items():
        found = {name: shape for name, shape in shapes.items() if name.startswith(f"{part}/")}
        assert sum(int(np.prod(shape)) for shape in found.values()) == wanted


def test_abstract_initialization_has_the_parameters_of_the_tables():
    small = dataclasses.replace(FULL, layers=2, vision=VisionConfig(layers=3))
    init = phi3v.build(small, 32064).init
    made = jax.eval_shape(init, jax.random.key(0), phi3v.example(small, 1))["params"]
    found = {name: leaf.shape for name, leaf in tree.named_leaves(made)}
    assert found == slices.param_shapes(small, 32064)


@pytest.mark.parametrize(
    ("width", "height", "crops", "count"),
    [(1000, 1000, 16, 2509), (600, 800, 16, 1933), (1200, 400, 16, 1909), (50, 50, 4, 757),
     (1200, 400, 4, 601)],
)  # fmt: skip
def test_token_counts(width, height, crops, count):
    vision = VisionConfig(crops=crops)
    assert vision.tokens(*images.grid_of(width, height, vision)) == count


def test_every_published_tensor_maps_once_both_ways():
    bound = slices.bind(SAFETENSORS["phi3_v"], FULL, 32064)
    stored = {one.name: one.shape for one in bound}
    parts = [part.name for one in bound for part in one.parts]
    assert len(stored) == len(bound)
    assert sorted(parts) == sorted(slices.param_shapes(FULL, 32064))
    place = "model.vision_embed_tokens"
    tower = f"{place}.img_processor.vision_model"
    assert stored[f"{place}.glb_GN"] == (1, 1, 4096)
    assert stored[f"{place}.sub_GN"] == (1, 1, 1, 4096)
    assert stored[f"{place}.img_projection.0.weight"] == (3072, 4096)
    assert stored[f"{tower}.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert stored[f"{tower}.encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert stored["model.layers.31.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert stored["model.layers.0.mlp.gate_up_proj.weight"] == (16384, 3072)
    assert stored["lm_head.weight"] == (32064, 3072)


@pytest.mark.parametrize("size", SIZES)
def test_hidden_states_and_pooled_output_of_the_tower(model, size):
    pixels, hidden, pooled = golden(size, "pixels", "hidden", "pooled")
    vision = model.config.vision
    tower = VisionTower(vision, encoder(vision, model.config))
    run = jax.jit(lambda p, x: tower.apply({"params": p}, x, method="encode"))
    states, found = run(model.params["vision"], pixels)
    assert_logits_close(np.stack(states), hidden)
    assert_logits_close(np.asarray(found), pooled)


@pytest.mark.parametrize("size", SIZES)
def test_embeddings_and_logits(model, size):
    grid, embeds, wanted = golden(size, "grid", "embeds", "logits")
    built = phi3v.build(model.config, model.vocab_size)
    given, variables = inputs(size), {"params": model.params}
    embed = jax.jit(functools.partial(built.apply, method="embed"))
    found = embed(variables, given["pixels"], given["grid"])
    assert len(embeds) == model.config.vision.tokens(*grid)
    assert_logits_close(np.asarray(found)[0, : len(embeds)], embeds)
    assert_logits_close(np.asarray(jax.jit(built.apply)(variables, given))[0], wanted)


@pytest.mark.parametrize("switches", [{"remat": True}, {"scan_layers": True, "remat": True}])
def test_switches_change_no_result(model, switches):
    config = dataclasses.replace(model.config, **switches)
    found = jax.jit(phi3v.build(config, model.vocab_size).apply)(
        {"params": model.params}, inputs("wide")
    )
    assert_logits_close(np.asarray(found)[0], GOLDEN["wide_logits"])


def test_other_crops_padding_and_a_cache_give_the_same_logits(model):
    """An image with an unused crop, behind padding, and its text token by token."""
    built, variables = phi3v.build(model.config, model.vocab_size), {"params": model.params}
    given = inputs("wide")
    tokens_BxL = given["tokens"]
    length, prompt = tokens_BxL.shape[1], tokens_BxL.shape[1] - 2
    unused = np.full_like(given["pixels"][:, :1], np.nan)  # never read
    given["pixels"] = np.concatenate([given["pixels"], unused], axis=1)
    given["tokens"] = np.concatenate([np.zeros((1, 2), np.int32), tokens_BxL[:, :prompt]], axis=1)
    valid_BxL = np.arange(prompt + 2)[None] >= 2
    cache = gpt.empty_cache(model.config, 1, length + 2)
    decode = jax.jit(functools.partial(built.apply, method="decode"))
    logits, cache = decode(variables, given, cache, valid_BxL)
    found = [np.asarray(logits)[0, 2:]]
    for at in range(prompt, length):
        token = jnp.asarray(tokens_BxL[:, at : at + 1])
        logits, cache = decode(variables, token, cache)
        found.append(np.asarray(logits)[0])
    assert_logits_close(np.concatenate(found), GOLDEN["wide_logits"])


def test_what_the_decoder_does_not_read_gets_no_gradient(model):
    built = phi3v.build(model.config, model.vocab_size)
    grads = jax.jit(jax.grad(lambda p: built.apply({"params": p}, inputs("high")).std()))(
        model.params
    )
    dead = {n for n, leaf in tree.named_leaves(grads) if not np.any(np.asarray(leaf))}
    unused = {n for n in dict(tree.named_leaves(grads)) if phi3v.unused(model.config, n)}
    assert len(unused) == 18
    # The bias of keys moves all scores of a query alike, so it has none anywhere.
    assert {n for n in dead ^ unused if not n.endswith("key/bias")} == set()


@pytest.mark.parametrize("size", SIZES)
def test_crops_equal_those_of_torch_and_pillow(model, size):
    image, wanted, grid = golden(size, "image", "pixels", "grid")
    found = images.crops_of(Image.fromarray(image), model.config.vision)
    assert images.grid_of(image.shape[1], image.shape[0], model.config.vision) == tuple(grid)
    one = 1 / 255 / images.STD
    assert (np.abs(found - wanted) <= one).all()
    assert (np.abs(found[1:] - wanted[1:]) <= 1e-6).all()  # the same Pillow makes the crops


def test_out_and_in_again_is_bit_identical(tmp_path):
    one = interop.load(FOLDER, tokenizer=False)
    two = interop.load(interop.export(tmp_path / "out", one), tokenizer=False)
    assert_same_params(one.params, two.params)
    assert one.config == two.config
    assert one.config.vision.crops == 4
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["rope_scaling"]["type"] == "su"


def test_write_config_is_the_inverse_of_read_config(model):
    written = interop.write_config(model.config, model.vocab_size)
    assert written["model_type"] == "phi3_v"
    family, config, _ = interop.read_config(written)
    crops = dataclasses.replace(config.vision, crops=model.config.vision.crops)
    assert (family, dataclasses.replace(config, vision=crops)) == ("phi3_v", model.config)
    assert interop.write_config(FULL, 32064)["img_processor"]["image_dim_out"] == 1024
    assert "vision_config" not in interop.write_config(FULL, 32064)


def test_a_pruned_model_is_written_and_read(tmp_path, model):
    """Magnitudes of the decoder; the tower stays as it came, its unused layer too."""
    chosen = tree.prunable(model.params, phi3v.PRUNABLE)
    recipe = Recipe("magnitude", sparsity=0.5)
    params, mask = recipe_lib.prune(recipe, model.params, prunable=chosen)
    out = interop.export(
        tmp_path / "out", model, params, mask=mask, record=interop.PruningRecord(recipe)
    )
    again = interop.load(out, tokenizer=False)
    assert_same_params(again.params["vision"], model.params["vision"])
    found = masks.summary(interop.read_masks(out))
    assert found.sparsity == 0.5
    assert int(masks.revived(again.params, mask)) == 0


@pytest.mark.parametrize("named", ["vision_model.", ""])
def test_the_tower_of_a_clip_model(tmp_path, model, named):
    from safetensors.numpy import load_file, save_file

    place = "model.vision_embed_tokens.img_processor.vision_model."
    every = load_file(FOLDER / "model.safetensors")
    tower = {k.replace(place, named): v for k, v in every.items() if k.startswith(place)}
    save_file(tower, tmp_path / "model.safetensors")
    sizes = json.loads((FOLDER / "config.json").read_text())["vision_config"]
    config = {"model_type": "clip_vision_model", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vision, params = interop.load_vision_tower(tmp_path)
    assert dataclasses.replace(vision, crops=4) == model.config.vision
    assert_same_params(params, model.params["vision"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"img_processor": {"name": "siglip"}}, "vision tower"),
        ({"img_processor": {"name": "clip_vision_model", "image_dim_out": 1024}}, "image_dim_out"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order"),
        ({"vision_config": {"num_hidden_layers": "3"}}, "num_hidden_layers"),
        ({"vision_config": {"num_hidden_layers": 4}}, "lacks"),
    ],
)
def test_another_tower_is_refused(tmp_path, changes, sentence):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for group, values in changes.items():
        config[group] = config[group] | values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=sentence):
        interop.load(folder, tokenizer=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"image": 9}, "multiple of 2"), ({"heads": 3}, "heads"), ({"layers": 1}, "layers"),
     ({"crops": 0}, "crops")],
)  # fmt: skip
def test_sizes_that_do_not_fit(changes, sentence):
    vision = VisionConfig(**{"layers": 3, "heads": 2, "width": 8, "image": 8, "patch": 2} | changes)
    with pytest.raises(InputError, match=sentence):
        phi3v.build(dataclasses.replace(FULL, vision=vision), 20)
