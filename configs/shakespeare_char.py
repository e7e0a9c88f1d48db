"""The paper's experiment on a small character model: the demo."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "shakespeare_char",
            "model": {"layers": 3, "heads": 4, "width": 128, "context": 64},
            "data": {"batch": 32, "eval_windows": 256, "eval_batch": 128},
            "train": {
                "steps": 600,
                "learning_rate": 3e-3,
                "final_learning_rate": 3e-4,
                "warmup": 50,
            },
            "finetune": {
                "steps": 60,
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-4,
                "warmup": 10,
                "eval_every": 0,
                "checkpoint_every": 0,
            },
        }
    )
