"""Which pruning, how much, with which recovery: the question of arXiv 2310.04573, on the demo.

Run it with

    python -m swe_prune run --config=configs/sweeps/pruning_study.py --workdir=runs/study

or, to share the work, as several processes on one working directory, each with its --shard=0/2,
--shard=1/2 and so on. A killed run goes on cell by cell.

Criterion × scope × schedule × sparsity × recovery, with three seeds, of a model of 233,952
parameters that trained for 800 steps on Shakespeare's plays; 80 steps of recovery. Every recovery
has a control of its own: the dense model trained for the same steps at the same learning rates.
The report answers in one sentence whether some pruned and fine-tuned model generalises better than
that; only the abstract of the paper is known, so the grid is ours.

552 cells, 468 of which are trained on. Some 20 minutes on two CPU cores, by the 1.6 s for a trained
cell and 0.3 s for another that a part of it took; the whole has not been run yet, so there is no
result to expect. That part (two seeds, a dense model of only 100 steps) did not show any pruned
model to be better than its control.
"""

from ml_collections import ConfigDict

from swe_prune.sweep import chain, product

SPARSITIES = [0.2, 0.4, 0.6, 0.8]
AT_ONCE = {"schedule": ["one-shot"], "recovery": ["none", "finetune", "rewarm", "rewind"]}
DURING_RECOVERY = {"schedule": ["cubic"], "recovery": ["finetune", "rewarm", "rewind"]}


def cells() -> list[dict]:
    """Returns the cells, of each of the study's seeds."""
    ranked = product(
        {
            "criterion": ["magnitude", "magnitude_curvature", "taylor"],
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
    return ConfigDict(
        {
            "name": "pruning_study",
            "model": {"layers": 2, "heads": 4, "width": 96, "context": 64},
            "data": {"batch": 16, "eval_windows": 256, "eval_batch": 64},
            "train": {
                "steps": 800,
                "learning_rate": 3e-3,
                "final_learning_rate": 3e-4,
                "warmup": 50,
                "checkpoint_every": "25%",
            },
            "trajectory": {"every": "5%"},
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
