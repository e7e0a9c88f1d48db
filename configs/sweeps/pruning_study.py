"""Which pruning, how much, with which recovery: the question of arXiv 2310.04573, on the demo.

Run it with

    python -m swe_prune run --config=configs/sweeps/pruning_study.py --workdir=runs/study

or, to share the work, as several processes on one working directory, each with its --shard=0/2,
--shard=1/2 and so on. A killed run goes on cell by cell.

Criterion × scope × schedule × sparsity × recovery, with three seeds, of a model of 233,952
parameters that trained for 800 steps on Shakespeare's plays; 80 steps of recovery. Every recovery
has a control of its own: the dense model trained for the same steps at the same learning rates.
Only the abstract of the paper is known, so the grid is ours.

414 cells, 11 minutes in all of them on two CPU cores. To expect: the best, forecast_curvature at
50 % with the learning rate warmed up again, ends 0.012 ± 0.005 below its control.
"""

from ml_collections import ConfigDict

from swe_prune.config import read
from swe_prune.sweep import chain, product

SPARSITIES = [0.3, 0.5, 0.7]
AT_ONCE = {"schedule": ["one_shot"], "recovery": ["none", "finetune", "rewarm", "rewind"]}
DURING_RECOVERY = {"schedule": ["cubic"], "recovery": ["finetune", "rewarm", "rewind"]}


def cells() -> list[dict]:
    """Returns the cells, of each of the study's seeds."""
    ranked = product(
        {
            "criterion": ["magnitude", "taylor", "forecast_curvature"],
            "scope": ["global", "tensor"],
            "sparsity": SPARSITIES,
        },
        chain(product(AT_ONCE), product(DURING_RECOVERY)),
    )
    chance = product({"criterion": ["random"], "scope": ["global"], "sparsity": SPARSITIES})
    neurons = product(
        {"criterion": ["magnitude"], "pattern": ["neuron"], "sparsity": SPARSITIES},
        {"recovery": ["none", "finetune", "rewarm"]},
    )
    return chain(ranked, chance, neurons)


def get_config() -> ConfigDict:
    """Returns the demo's settings with this study in place of its own."""
    config = read("../shakespeare_char.py", __file__)
    study = {"std_criteria": (), "criteria": (), "seeds": (0, 1, 2), "cells": cells()}
    config.update({"name": "pruning_study", "study": study})
    return config
