"""A whole experiment on a pretrained model: its weights, its tokenizer, its text."""

import csv
import json
import math
import shutil

import pretrained_tiny
import pytest
from ml_collections import ConfigDict

from swe_prune import cli, interop, study
from swe_prune.config import from_dict
from swe_prune.errors import InputError
from swe_prune.training.progress import Progress

CELLS = (
    {"criterion": "swe", "sparsity": 0.5},
    {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    {"criterion": "magnitude", "pattern": "2:4", "sparsity": 0.5},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


def config_of(place, **model):
    phase = {"steps": 4, "learning_rate": 1e-3, "warmup": 1, "eval_every": 0, "checkpoint_every": 0}
    return {
        "model": {"pretrained": str(place.model), **model},
        "data": {"dataset": str(place.train), "validation_fraction": 0.3, "window": 32,
                 "batch": 4, "eval_windows": 4, "eval_batch": 4},
        "train": phase | {"checkpoint_every": 2},
        "finetune": phase,
        "trajectory": {"every": 1},
        "calibration": {"windows": 8, "batch": 4},
        "samples": {"prompts": ("You may",), "tokens": 6},
        "study": {"std_criteria": (), "criteria": (), "seeds": (0,), "cells": CELLS},
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    file = folder / "config.py"
    values = json.dumps(config_of(place))
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    arguments = [f"--config={file}", f"--workdir={folder / 'w'}"]
    assert cli.main(["run", *arguments]) == 0
    return folder / "w", arguments


@pytest.mark.slow
def test_it_starts_from_the_checkpoint(place, done):
    workdir, _ = done
    result = json.loads((workdir / "seed_0" / "dense" / "result.json").read_text())
    assert result["pretrained_loss"] < math.log(pretrained_tiny.VOCAB) - 1
    assert result["dense_loss"] == pytest.approx(result["pretrained_loss"], abs=0.5)
    model = interop.load(place.model)
    config = from_dict(ConfigDict(config_of(place)))
    experiment = study.setup(config, workdir)
    assert experiment.config.model.layers == model.config.layers
    assert experiment.validation_loss(model.params) == pytest.approx(
        result["pretrained_loss"], rel=1e-6
    )


@pytest.mark.slow
def test_each_cell_says_what_it_wrote_and_how_far_it_is_from_the_dense_model(done):
    workdir, _ = done
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["criterion"] or row["method"] for row in rows] == ["swe", "wanda", "magnitude"]
    for row in rows:
        assert float(row["sparsity_prunable"]) == pytest.approx(0.5, abs=0.03)
        assert 0 < float(row["pruned_kl"]) < 5
        assert 0 < float(row["finetuned_kl"]) < 5
        assert 0 <= float(row["finetuned_repetition"]) <= 1
    for result in workdir.glob("seed_0/cells/*/result.json"):
        found = json.loads(result.read_text())
        assert [one["prompt"] for one in found["pruned_samples"]] == ["You may"]
        assert found["finetuned_samples"][0]["text"]


@pytest.mark.slow
def test_the_report_shows_them(done):
    workdir, _ = done
    page = (workdir / "report" / "report.html").read_text()
    assert "You may" in page
    assert "perplexity" in page.lower()


@pytest.mark.slow
def test_it_is_evaluated_and_run_again_without_doing_anything_twice(done, capsys):
    _, arguments = done
    assert cli.main(["evaluate", *arguments[1:]]) == 0
    assert "blockwise" in capsys.readouterr().out
    assert cli.main(["run", *arguments]) == 0
    assert "done before" in capsys.readouterr().err


def test_sizes_beside_a_checkpoint_are_refused(place, tmp_path):
    config = from_dict(ConfigDict(config_of(place, layers=3)))
    with pytest.raises(InputError, match=r"config.model.layers = 3 was given beside"):
        study.setup(config, tmp_path)


def test_windows_longer_than_the_models_context_are_refused(place, tmp_path):
    values = config_of(place)
    values["data"]["window"] = 129
    with pytest.raises(InputError, match=r"config\.data\.window = 129 exceeds the 128 tokens"):
        study.setup(from_dict(ConfigDict(values)), tmp_path)


def test_a_text_that_the_model_knows_nothing_of_is_refused(place, tmp_path):
    text = tmp_path / "noise.txt"
    text.write_text("".join(chr(0x4E00 + i * 7919 % 20000) for i in range(900)))
    values = config_of(place)
    values["data"]["dataset"] = str(text)
    experiment = study.setup(from_dict(ConfigDict(values)), tmp_path / "w")
    with pytest.raises(InputError, match="guessing among its symbols"):
        study.train(experiment, Progress())


def test_a_prefix_and_another_tokenizer_are_settings(place, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    wrapped = tmp_path / "wrapped"
    shutil.copytree(place.model, wrapped)
    tokenizer = shutil.move(wrapped / "tokenizer.json", tmp_path / "tokenizer.json")
    file = wrapped / "model.safetensors"
    tensors = {f"_orig_mod.{name}": leaf for name, leaf in numpy_files.load_file(file).items()}
    numpy_files.save_file(tensors, file)
    given = {"prefix": "_orig_mod.", "tokenizer": str(tokenizer)}
    values = config_of(place, **given)
    values["model"]["pretrained"] = str(wrapped)
    experiment = study.setup(from_dict(ConfigDict(values)), tmp_path / "w")
    assert experiment.data.tokenizer.vocab_size == pretrained_tiny.VOCAB
    for name, value in given.items():
        lacks = config_of(place) | {"model": {name: value}}
        with pytest.raises(InputError, match=rf"config\.model\.{name} is of a pretrained model"):
            study.setup(from_dict(ConfigDict(lacks)), tmp_path / name)
