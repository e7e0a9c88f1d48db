"""Folders that transformers wrote give the logits that it computed; needs no torch.

The folders and arrays are made by golden/make_pretrained_golden.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from interop_tiny import assert_logits_close, assert_same_params, decoded, logits

from swe_prune import interop

FOLDER = Path(__file__).parent / "golden" / "pretrained"
BY_LENGTH = ("llama_dynamic", "phi3_longrope")  # rotated by the length of the text
NAMES = sorted(path.name for path in FOLDER.iterdir())


def test_every_family_is_there():
    there = {
        json.loads((FOLDER / name / "config.json").read_text())["model_type"] for name in NAMES
    }
    # tests/phi3v_test.py has a golden folder of a model with a vision tower.
    assert there == {name for name, family in interop.FAMILIES.items() if not family.vision}


@pytest.fixture(scope="module")
def models():
    return {name: interop.load(FOLDER / name, dtype="float32") for name in NAMES}


def golden(name, case):
    arrays = np.load(FOLDER / name / "golden.npz")
    return [arrays[f"{case}_{what}"] for what in ("tokens", "valid", "logits")]


@pytest.mark.quick(12)
@pytest.mark.parametrize("case", ["long", "padded", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_logits(models, name, case):
    tokens_BxL, valid_BxL, wanted_BxLxV = golden(name, case)
    found = logits(models[name], tokens_BxL, valid_BxL)
    assert_logits_close(found[valid_BxL], wanted_BxLxV[valid_BxL])


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_LENGTH])
def test_logits_of_a_padded_prompt_and_then_one_token_at_a_time(models, name):
    """Of scalings that do not follow the length, whose kept keys are those of the whole text."""
    tokens_BxL, valid_BxL, wanted_BxLxV = golden(name, "padded")
    found = decoded(models[name], tokens_BxL, 10, valid_BxL)
    assert_logits_close(found[valid_BxL], wanted_BxLxV[valid_BxL])


@pytest.mark.parametrize("name", NAMES)
def test_out_and_in_again_is_bit_identical(tmp_path, name):
    one = interop.load(FOLDER / name)
    two = interop.load(interop.export(tmp_path / "out", one))
    assert_same_params(one.params, two.params)
    assert one.config == two.config
    assert str(one.params["embedding"]["embedding"].dtype) == "bfloat16"
