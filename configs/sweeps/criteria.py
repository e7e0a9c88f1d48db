"""Which criterion keeps the loss lowest at equal sparsity, before and after fine-tuning.

Run it with

    python -m swe_prune run --config=configs/sweeps/criteria.py --workdir=runs/criteria

or shared by several processes with --shard=0/2, --shard=1/2 and so on; report/tables.md in the
working directory holds the comparison as Markdown, `magnitude`, `swe` and `random` in every table.

The demo's model, three seeds, 50 to 80 % of the weights removed over all tensors together
(criterion and allocation) and of every tensor (the ranking alone). Wanda and SparseGPT, which pay
for calibration, are there as scores in both, and as their authors run them: Wanda by the rows of
each kernel, both block after block, SparseGPT with its weight update.

288 cells. Some 12 minutes on two CPU cores, by the 2 s a cell that a part of another study of this
model took; the whole has not been run yet, so there is no result to expect.
"""

from ml_collections import ConfigDict

from swe_prune.sweep import chain, product

CRITERIA = [
    "magnitude",
    "swe",
    "random",
    "magnitude_curvature",
    "swe_curvature",
    "forecast_curvature",
    "stability_curvature",
    "displacement_curvature",
    "wanda",
    "sparsegpt",
]
SPARSITY = {"sparsity": [0.5, 0.6, 0.7, 0.8]}


def cells() -> list[dict]:
    """Returns the cells, of each of the study's seeds."""
    return chain(
        product({"criterion": CRITERIA, "scope": ["global", "tensor"]}, SPARSITY),
        product({"criterion": ["magnitude", "wanda"], "scope": ["row"]}, SPARSITY),
        product({"criterion": ["blockwise:wanda", "blockwise:sparsegpt"]}, SPARSITY),
    )


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "criteria",
            "model": {"layers": 2, "heads": 4, "width": 96, "context": 64},
            "data": {"batch": 16, "eval_windows": 256, "eval_batch": 64},
            "train": {
                "steps": 800,
                "learning_rate": 3e-3,
                "final_learning_rate": 3e-4,
                "warmup": 50,
                "checkpoint_every": "25%",
            },
            "trajectory": {"every": "5%"},  # twenty snapshots
            "finetune": {
                "steps": 80,
                "learning_rate": 1e-3,
                "final_learning_rate": 0.0,
                "warmup": 10,
                "eval_every": 0,
                "checkpoint_every": 0,  # a killed cell starts again: it takes seconds
            },
            "study": {
                "std_criteria": (),
                "criteria": (),
                "seeds": (0, 1, 2),
                "cells": cells(),
            },
        }
    )
