"""Pruning during the recovery: a cell for each schedule and each kind of rewinding.

Run it with

    python -m swe_prune run --config=configs/sweeps/sparse_training.py --workdir=runs/sparse

The demo's model of 233,952 parameters with three seeds, pruned to 80 % and 90 % and recovered for
200 steps: 72 cells, some 10 minutes on two cores. Expect straight-through training and weight
rewinding to beat one-shot magnitude pruning (+0.049 and +0.039 against +0.061 nats per token at
80 %), the other schedules not to, and `forecast_curvature` to beat all of them (+0.034).
`docs/results.md` has the table.
"""

from ml_collections import ConfigDict

from swe_prune.config import read
from swe_prune.sweep import chain, product

SPARSITIES = {"sparsity": [0.8, 0.9]}
DURING = ["one_shot", "cubic", "iterative", "rigl", "set", "ste", "elsa"]


def cells() -> list[dict]:
    """Returns the cells, of each of the study's seeds."""
    return chain(
        product({"criterion": ["magnitude"], "schedule": DURING}, SPARSITIES),
        product({"criterion": ["movement"], "schedule": ["movement"]}, SPARSITIES),
        product({"criterion": ["magnitude"], "recovery": ["rewind", "rewind_weights"]}, SPARSITIES),
        product({"criterion": ["forecast_curvature", "random"], "scope": ["global"]}, SPARSITIES),
    )


def get_config() -> ConfigDict:
    """Returns the demo's settings with this study in place of its own."""
    config = read("../shakespeare_char.py", __file__)
    study = {"std_criteria": (), "criteria": (), "seeds": (0, 1, 2), "cells": cells()}
    config.update(
        {
            "name": "sparse_training",
            # Step 600 of 800 is retained, for the weights to be rewound to.
            "train": {"keep_every": "25%"},
            "finetune": {"steps": 200},
            "study": study,
        }
    )
    return config
