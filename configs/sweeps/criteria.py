"""Which criterion keeps the loss lowest at equal sparsity, before and after fine-tuning.

Run it with

    python -m swe_prune run --config=configs/sweeps/criteria.py --workdir=runs/criteria

or shared by several processes with --shard=0/2, --shard=1/2 and so on; report/tables.md in the
working directory holds the comparison as Markdown.

The demo's model, three seeds, 300 steps of fine-tuning. Every criterion is ranked over all tensors
together, but Wanda and SparseGPT as they were published, Wanda within each output. "wanda" scores
the dense model once; "blockwise" prunes one block after another on what the pruned ones give, and
SparseGPT changes the weights that stay. The same question for a model that has finished training:

    python -m swe_prune run --config=configs/sweeps/criteria.py --workdir=runs/criteria_long \
        --config.train.steps=4000

156 cells, 17 minutes in all of them on two CPU cores. To expect at 60 %: magnitude 0.128 above the
dense model before fine-tuning and 0.019 above the control after it, swe 0.140 and 0.038,
forecast_curvature 0.035 and 0.010, SparseGPT 0.052 and 0.017.
"""

from ml_collections import ConfigDict

from swe_prune.config import read
from swe_prune.sweep import chain, product

CRITERIA = [
    "random",
    "magnitude",
    "swe",
    "forecast",
    "lamp",
    "magnitude_curvature",
    "swe_curvature",
    "stability_curvature",
    "forecast_curvature",
]
SPARSITY = {"sparsity": [0.5, 0.6, 0.7, 0.8]}


def cells() -> list[dict]:
    """Returns the cells, of each of the study's seeds."""
    far = {"criterion": ["forecast_curvature"], "options": [{"horizon": 1.0}]}
    return chain(
        product({"criterion": CRITERIA, "scope": ["global"]}, SPARSITY),
        product({**far, "scope": ["global"]}, SPARSITY),
        product({"criterion": ["wanda"], "scope": ["row"]}, SPARSITY),
        product({"method": ["wanda", "sparsegpt"]}, SPARSITY),
    )


def get_config() -> ConfigDict:
    """Returns the demo's settings with this study in place of its own."""
    config = read("../shakespeare_char.py", __file__)
    study = {"std_criteria": (), "criteria": (), "seeds": (0, 1, 2), "cells": cells()}
    config.update({"name": "criteria", "finetune": {"steps": 300}, "study": study})
    return config
