"""A whole study of a model of images and text: trained, pruned, fine-tuned, reported."""

import dataclasses
import json

import pytest
import tiny
from image_text_test import table
from rich.console import Console

from swe_prune import config as config_lib
from swe_prune import study, tree
from swe_prune.report import page
from swe_prune.report.read import load
from swe_prune.study.plan import as_json
from swe_prune.training.progress import Progress

VISION = {"layers": 2, "heads": 1, "width": 4, "hidden": 8, "image": 8, "patch": 2, "crops": 2}
SETTINGS = {
    "model": {
        "layers": 1,
        "heads": 2,
        "width": 8,
        "hidden": 8,
        "context": 160,
        **tiny.PHI3V,
        "vision": VISION,
    },
    "data": {"batch": 4, "eval_windows": 4, "eval_batch": 2, "validation_fraction": 0.3},
    "train": {"steps": 4, "warmup": 1, "checkpoint_every": 2},
    "finetune": {"steps": 2, "warmup": 1, "trained": (r"^decoder/block_0/",)},
    "trajectory": {"every": 1},
    "calibration": {"windows": 4, "batch": 2},
    "samples": {"pictures": 3},
    "study": {
        "std_criteria": (),
        "criteria": ("swe",),
        "sparsities": (0.5,),
        "scopes": ("tensor",),
        "seeds": (0,),
        "cells": [{"criterion": "wanda", "sparsity": 0.5, "scope": "row", "recovery": "none"}],
    },
}


@pytest.mark.slow
def test_train_prune_finetune_and_report(tmp_path):
    data = table(tmp_path / "prices.parquet", count=20)
    settings = config_lib.from_dict(
        SETTINGS | {"data": SETTINGS["data"] | {"dataset": data.dataset}}
    )
    config_lib.validate(settings)
    experiment = study.setup(settings, tmp_path / "run")
    chosen = {name for name, mark in tree.named_leaves(experiment.prunable) if mark}
    kinds = ("attention/query", "attention/key", "attention/value", "attention/out")
    kinds += ("mlp/gate", "mlp/up", "mlp/down")
    assert chosen == {f"decoder/block_0/{kind}/kernel" for kind in kinds}
    planned = as_json(experiment)["tensors"]
    assert {name for name, one in planned.items() if one["dense"] is None} == chosen
    both = dataclasses.replace(settings.prune, include=(r"/block_\d+/.*kernel$",))
    of_both = dataclasses.replace(experiment, config=dataclasses.replace(settings, prune=both))
    planned = as_json(of_both)["tensors"]
    assert planned["vision/block_1/mlp/up/kernel"]["dense"] == "in no computation"
    assert planned["vision/block_0/mlp/up/kernel"]["dense"] is None
    with open(tmp_path / "log", "w") as log:
        study.run(experiment, Progress(Console(file=log)))
    # Every model has all the errors; the cells say what they removed.
    results = load(tmp_path / "run")
    assert len(results.rows) == 2
    for row in results.rows:
        assert row.sparsity_prunable == pytest.approx(0.5, abs=0.05)
    dense = json.loads((tmp_path / "run" / "seed_0" / "dense" / "result.json").read_text())
    errors = dense["dense_prices"]
    assert set(errors["generated"]) == {"own", "blank", "shuffled"}
    assert errors["teacher_forced"] >= 0
    assert [len(one["picture"]) > 0 for one in dense["dense_answers"]] == [True] * 3
    names = {path.name for path in page.build(tmp_path / "run")}
    assert {"report.html", "answers.png"} <= names
    text = (tmp_path / "run" / "report" / "tables.md").read_text()
    assert "Mean absolute error of prices" in text
