"""The command of the related systems: what it refuses before anything is trained."""

import importlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from swe_prune.errors import InputError, RunError
from swe_prune.related import trawl


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


def test_the_mlp_that_is_timed_in_factors_is_the_mlp_of_their_tensor(related):
    rng = np.random.default_rng(0)
    cp = trawl.CP(*(rng.normal(size=(n, 2)).astype(np.float32) for n in (3, 6, 8)))
    up, gate, down = np.asarray(cp.dense(), np.float64)
    x = rng.normal(size=(5, 6))
    hidden = x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)
    np.testing.assert_allclose(related.trawl.factored(x, cp), hidden @ down.T, rtol=2e-5, atol=1e-5)
