"""Cut models of images and text: they compute what the masked ones do, in studies and commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained_tiny
import pytest
import tiny
from image_text_test import encoded, picture, table
from pretrained_commands_test import QUICK

from swe_prune import cli, interop, masks, structured, study, tree
from swe_prune import config as config_lib
from swe_prune.config import CutConfig, LedgerConfig, ModelConfig, VisionConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import latency
from swe_prune.interop import hf_config
from swe_prune.models import gpt, phi3v
from swe_prune.report import page
from swe_prune.report.read import load
from swe_prune.study import cut_shapes, cuts
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib

VISION = VisionConfig(layers=3, heads=2, width=8, hidden=24, image=8, patch=2, crops=2)
CONFIG = ModelConfig(
    layers=2,
    heads=4,
    kv_heads=2,
    width=8,
    hidden=16,
    context=64,
    vision=VISION,
    **tiny.PHI3V,
)
VOCAB = 20
UNITS = ("neurons", "heads", "query_heads", "vision_neurons", "layers")


@pytest.fixture(scope="module")
def params():
    model = phi3v.build(CONFIG, VOCAB)
    made = state_lib.init_params(model, 0, phi3v.example(CONFIG, 4))
    # Far from the initial values, so that every unit and bias counts.
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), made
    )


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    given = phi3v.example(CONFIG, 24, 2, 2)
    pixels = rng.normal(size=given["pixels"].shape).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (2, 24)).astype(np.int32)
    tokens[:, 2 : 2 + VISION.tokens(1, 2)] = phi3v.IMAGE_TOKEN
    return {"tokens": tokens, "pixels": pixels, "grid": given["grid"]}


def half(groups):
    """A random half of every group."""
    rng = np.random.default_rng(1)
    scores = {name: rng.random(group.shape) for name, group in groups.items()}
    return structured.choose(groups, scores, sparsity=0.5)


def hidden_of_tower(config):
    assert config.vision is not None
    return config.vision.hidden


@pytest.fixture(scope="module")
def run():
    return jax.jit(phi3v.build(CONFIG, VOCAB).apply)


@pytest.mark.quick(2)
@pytest.mark.parametrize("units", UNITS)
def test_cut_logits_are_masked_logits(params, inputs, run, units):
    groups = structured.groups(CONFIG, units)
    keep = half(groups)
    small = structured.cut(params, groups, keep)
    config = structured.cut_config(CONFIG, keep)
    masked = masks.apply(params, structured.unit_mask(params, groups, keep))
    wanted = np.asarray(run({"params": masked}, inputs))
    found = np.asarray(jax.jit(phi3v.build(config, VOCAB).apply)({"params": small}, inputs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    assert np.abs(wanted - np.asarray(run({"params": params}, inputs))).max() > 1e-2
    # It has the shapes of a model of its config, and so has the state of its optimizer.
    init = phi3v.build(config, VOCAB).init
    shapes = jax.eval_shape(init, jax.random.key(0), phi3v.example(config, 4))["params"]
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
    state = structured.cut(optax.adam(1e-3).init(params), groups, keep)
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, shapes)
    # The other tower is as it was.
    other = "decoder" if units == "vision_neurons" else "vision"
    assert jax.tree.map(jnp.shape, small[other]) == jax.tree.map(jnp.shape, params[other])


def test_blocks_of_a_tower_keep_as_many_neurons():
    groups = structured.groups(CONFIG, "vision_neurons")
    assert set(groups) == {f"block_{layer}/vision_neurons" for layer in range(3)}
    assert hidden_of_tower(structured.cut_config(CONFIG, half(groups))) == 16
    one = {"block_0/vision_neurons": np.arange(8)}
    with pytest.raises(InputError, match="one number of neurons, got 8, 24; cut all"):
        structured.cut_config(CONFIG, one)
    text = dataclasses.replace(CONFIG, vision=None)
    with pytest.raises(InputError, match="no vision tower"):
        structured.groups(text, "vision_neurons")


def test_operations_of_a_token_are_those_of_the_decoder(params):
    text = dataclasses.replace(CONFIG, vision=None)
    alone = structured.flops(text, params["decoder"])
    assert structured.flops(CONFIG, params) == alone


@pytest.mark.slow
def test_latency_of_prompts_with_pictures(params):
    load = latency.Workload(batch=2, prompt=20, new=2, crops=2)
    model = phi3v.build(CONFIG, VOCAB)
    work = latency.compiled(model, gpt.fuse(params), load)
    assert work.tokens() == 44
    without = dataclasses.replace(load, crops=0, prompt=4)
    assert latency.compiled(model, params, without).tokens() == 12
    with pytest.raises(InputError, match="prompt of 17 tokens has no room for the 17"):
        latency.compiled(model, params, dataclasses.replace(load, prompt=17))


SETTINGS = {
    "model": {
        "layers": 1,
        "heads": 2,
        "width": 8,
        "hidden": 16,
        "context": 160,
        **tiny.PHI3V,
        "vision": {"layers": 3, "heads": 1, "width": 4, "hidden": 16, "image": 8, "patch": 2,
                   "crops": 2},
    },
    "data": {"batch": 4, "eval_windows": 4, "eval_batch": 2, "validation_fraction": 0.3},
    "train": {"steps": 4, "warmup": 1, "checkpoint_every": 2},
    "finetune": {"steps": 2, "warmup": 1, "eval_every": 0, "checkpoint_every": 0},
    "trajectory": {"every": 1},
    "calibration": {"windows": 4, "batch": 4},
    "samples": {"pictures": 2},
    "ledger": {"windows": 3, "window_seconds": 0.01, "batch": 2},
    "study": {
        "std_criteria": (),
        "criteria": (),
        "seeds": (0,),
        "cells": [{"criterion": "forecast_curvature", "sparsity": 0.5, "recovery": "none"}],
    },
    "cuts": [{"criterion": "forecast_curvature", "sparsity": 0.5}],
}  # fmt: skip
NAME = "seed_0/cuts/neurons-forecast_curvature-0.5-restored"


def settings(folder, **changes):
    wide = [{"bytes": encoded(picture(16, 8, (9 * number, 20, 30))), "path": None}
            for number in range(20)]  # fmt: skip
    data = table(folder / "prices.parquet", count=20, image=wide)
    own = {"data": SETTINGS["data"] | {"dataset": data.dataset}}
    return dataclasses.replace(config_lib.from_dict(SETTINGS | own), **changes)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prices")
    return study.setup(settings(folder), folder / "work")


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True])
def test_neurons_of_the_tower_go_by_what_they_compute(experiment, restore):
    """Nothing is known of the last block, which is cut to the width of the others."""
    cut = CutConfig("vision_neurons", 0.5, restore=restore)
    state = experiment.fresh_state(0)
    before = jax.device_get(state.params)
    found = cuts._cut(experiment, 0, cut, state)
    params, keep = found.params, found.keep
    config = cut_shapes.shape(experiment.config.model, cut, 0.5)
    assert found.config == config
    assert hidden_of_tower(config) == 8
    groups = structured.groups(experiment.config.model, "vision_neurons")
    if not restore:
        masked = masks.apply(before, structured.unit_mask(before, groups, keep))
        small = phi3v.build(config, experiment.model.vocab_size)
        wanted, found = (
            jax.jit(model.apply)({"params": weights}, experiment.calibration[0]["inputs"])
            for model, weights in ((experiment.model, masked), (small, params))
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    moved = {name for (name, one), (_, other) in zip(
        tree.named_leaves(structured.cut(before, groups, keep)), tree.named_leaves(params),
        strict=True) if np.any(np.asarray(one) != np.asarray(other))}  # fmt: skip
    down = {f"vision/block_{at}/mlp/down/{part}" for at in (0, 1) for part in ("kernel", "bias")}
    assert moved == (down if restore else set())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cuts": (CutConfig("vision_neurons", criterion="swe"),)}, r"cuts\[0\].*swe.*prunable.*"),
        ({"ledger": LedgerConfig(prompt=17)}, "no room for the 17 tokens of a picture of 2 crops"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused_before_any_training(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        study.setup(settings(tmp_path, **changes), tmp_path / "work")


@pytest.mark.slow
def test_a_study_cuts_and_reads_prices_and_is_resumed(tmp_path):
    given = settings(tmp_path)
    path = tmp_path / "config.py"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n"
                    f"    return ConfigDict({dataclasses.asdict(given)!r})\n")  # fmt: skip
    work = tmp_path / "work"
    assert cli.main(["run", f"--config={path}", f"--workdir={work}"]) == 0
    result = json.loads((work / NAME / "result.json").read_text())
    sizes = result["parameters"]
    assert sizes["cut"] == sizes["smaller_0.5"] == sizes["dense"] - 3 * 8 * 8
    assert (result["kept"], result["of"]) == (8, 16)
    for model in ("cut", "recovered", "smaller_0.5"):
        assert set(result[f"{model}_prices"]["generated"]) == {"own", "blank", "shuffled"}
    serving = json.loads((work / NAME / "serving.json").read_text())
    assert (serving["crops"], serving["prompt"]) == (2, 80)
    # The report has the prices of the cut next to those of its rivals.
    (found,) = load(work).cuts
    assert (found.seed, found.units, found.sparsity) == (0, "neurons", 0.5)
    assert set(found.prices) == {"cut", "recovered", "smaller_0.5"}
    page.build(work)
    text = (work / "report" / "tables.md").read_text()
    assert "| neurons-forecast_curvature-0.5-restored | cut neurons | 50" in text
    assert "| from random weights | cut neurons | 50" in text
    # A killed recovery is made again with the same numbers; all else stays.
    (work / NAME / "result.json").unlink()
    stamp = (work / NAME / "serving.json").stat().st_mtime_ns
    assert cli.main(["run", f"--workdir={work}"]) == 0
    assert json.loads((work / NAME / "result.json").read_text()) == result
    assert (work / NAME / "serving.json").stat().st_mtime_ns == stamp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Phi-3-vision that has learned a text, as a folder with a tokenizer, and the texts."""
    pytest.importorskip("safetensors")
    place = tmp_path_factory.mktemp("phi3_v")
    content = (pretrained_tiny.ROOT / "LICENSE").read_text()
    at = content.index("4. Redistribution")
    (place / "train.txt").write_text(content[:at])
    (place / "held_out.txt").write_text(content[at:])
    words = pretrained_tiny.tokenizer(content[:at])
    config = dataclasses.replace(CONFIG, kv_heads=4, context=128)
    written = hf_config.write_config(config, pretrained_tiny.VOCAB, "phi3_v")
    written["eos_token_id"] = 0
    family, config, vocab_size = hf_config.read_config(written)
    module = phi3v.build(config, vocab_size)
    optimizer = optax.adam(1e-2)
    tokens = words.encode(content[:at])[: 16 * 33].reshape(16, 33).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    params = state_lib.init_params(module, 0, phi3v.example(config, 4))
    state = state_lib.create(params, optimizer, 0)
    step = step_lib.compile_train_step(module, optimizer)
    for _ in range(40):
        state, _ = step(state, batch)
    made = interop.Pretrained(
        config, vocab_size, state.params, words, family, place / "model", "safetensors", written
    )
    interop.export(place / "model", made)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "criterion", "more"),
    [
        ("neurons", "input_norm_product", ["--restore"]),
        ("layers", "block_influence", []),
    ],
)
def test_the_decoder_of_a_folder_is_cut(folder, tmp_path, capsys, units, criterion, more):
    out = tmp_path / "out"
    given = ["cut", f"--model={folder / 'model'}", f"--out={out}", *QUICK, *more,
             f"--calibration={folder / 'train.txt'}", f"--evaluation={folder / 'held_out.txt'}",
             f"--units={units}", f"--criterion={criterion}", "--sparsity=0.5"]  # fmt: skip
    assert cli.main(given) == 0, capsys.readouterr().err
    small = interop.load(out)
    assert (small.config.layers, small.config.hidden_size) == {
        "neurons": (2, 8), "layers": (1, 16),
    }[units]  # fmt: skip
    dense = interop.load(folder / "model")
    jax.tree.map(np.testing.assert_array_equal, small.params["vision"], dense.params["vision"])
    kept = json.loads((out / "kept_units.json").read_text())["kept"]
    keep = {name: np.array(some) for name, some in kept.items()}
    assert structured.cut_config(dense.config, keep) == small.config
