"""The dense models and the pruned students that docs/related.md compares other systems on.

Run it with

    python -m swe_prune run --config=configs/sweeps/related.py --workdir=runs/related
    python benchmarks/related.py all --workdir=runs/related --out=runs/related/tables

The first command is optional: the second makes what it lacks of the same workdir, and then runs the
systems, which are not cells of a study: they change the training, the model or the inference. It
reads this config.

The demo's model of 233,952 parameters with three seeds; 90 % of the weights removed over all
tensors and recovered for 300 steps: 9 cells, some three minutes on two cores.
"""

from ml_collections import ConfigDict

from swe_prune.config import read
from swe_prune.sweep import product

CRITERIA = ["random", "magnitude", "forecast_curvature"]


def get_config() -> ConfigDict:
    """Returns the demo's settings with this study in place of its own."""
    config = read("../shakespeare_char.py", __file__)
    cells = product({"criterion": CRITERIA, "scope": ["global"], "sparsity": [0.9]})
    study = {"std_criteria": (), "criteria": (), "seeds": (0, 1, 2), "cells": cells}
    config.update(
        {"name": "related", "keep_finetuned": True, "finetune": {"steps": 300}, "study": study}
    )
    return config
