"""The command of the related systems: what it refuses before anything is trained."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

from swe_prune.errors import InputError, RunError


@pytest.fixture
def related(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("related")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--seeds 0 0", "--seeds must be different"),
        ("--seeds -1", "--seeds must be an integer of at least 0"),
        ("--steps 0", "--steps must be an integer of at least 1"),
        ("--windows 0", "--windows must be an integer of at least 1"),
        ("--more -1", "--more must be an integer of at least 1"),
        (f"--out {__file__}/folder", "--out .* choose another folder"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(related, line, sentence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["related.py", "digits", *line.split()])
    with pytest.raises((InputError, RunError), match=sentence):
        related.parse()


def test_dense_models_of_other_steps_are_not_taken(related, tmp_path):
    def settings(steps, seeds):
        return related.demo(Namespace(steps=steps, windows=64, seeds=seeds))

    with related.claim(settings(40, [0]), tmp_path):
        pass
    with related.claim(settings(40, [1, 2]), tmp_path):  # more seeds of the same
        pass
    with pytest.raises(InputError, match=r"made by another config: train.steps .40 there, 60 now"):
        related.claim(settings(60, [0]), tmp_path).__enter__()
