"""Is the trajectory of a hot fine-tuning worth more than that of a gentle one?

python -m swe_prune run --config=configs/smollm2_135m_hot.py --workdir=runs/smollm2_hot

`smollm2_135m.py` with five times the tracked steps at twenty times the learning rate, held there to
the end so that the weights still move when they are judged; magnitude and swe alone, without
recovery.
"""

from ml_collections import ConfigDict

from swe_prune.config import read
from swe_prune.sweep import chain, product

BOTH = {"criterion": ["magnitude", "swe"], "recovery": ["none"]}


def get_config() -> ConfigDict:
    """Returns the settings of the short fine-tuning with others in their place."""
    config = read("smollm2_135m.py", __file__)
    config.update(
        {
            "name": "smollm2_135m_hot",
            "train": {"steps": 100, "warmup": 5, "learning_rate": 1e-3,
                      "final_learning_rate": 1e-3},
            "study": {
                "cells": chain(
                    product(BOTH, {"sparsity": [0.3, 0.5, 0.6]}),
                    product(BOTH, {"sparsity": [0.5], "pattern": ["2:4"]}),
                )
            },
        }
    )  # fmt: skip
    return config
