"""The paper's experiment on a small character model: the demo.

Run it with

    python -m swe_prune run --config=configs/shakespeare_char.py --workdir=runs/demo

A model of 233,952 parameters, of which 221,184 are prunable, trains for 800 steps on Shakespeare's
plays with two seeds; 110 cells are pruned and fine-tuned for 80 steps. Six to nine minutes on two
CPU cores. To expect: dense validation loss 2.01 nats per token, control 1.99; 60 % of the weights
removed costs 0.0015 over the control after fine-tuning by forecast_curvature, all tensors together,
0.013 by magnitude and 0.039 by swe.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "shakespeare_char",
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
                "std_criteria": ("swe", "swe_spread", "magnitude"),
                "std_rates": (0.5, 1.0, 1.4, 2.0, 3.0),
                "std_seeds": (0, 1),
                "criteria": ("swe", "forecast_curvature", "magnitude", "random"),
                "sparsities": (0.3, 0.5, 0.6, 0.8, 0.9),
                "seeds": (0, 1),
            },
        }
    )
