"""The 10.7 M-parameter model of `shakespeare_char_paper.py` on two cores, in several sittings.

    python -m swe_prune run --config=configs/shakespeare_char_paper_cpu.py --workdir=runs/paper_cpu

The same command goes on where a sitting ended. What differs from the published schedule: batches
of 12 windows and no dropout, as nanoGPT advises for a CPU, float32, one seed, fewer cells, and 100
steps of fine-tuning. 5,000 steps of 12 windows are 14 passes over 1,115,394 characters.

Result to expect: unknown, nobody has run it.
"""

from ml_collections import ConfigDict

from swe_prune.config import read


def get_config() -> ConfigDict:
    """Returns the settings of the paper's size with fewer tokens for a step and fewer cells."""
    config = read("shakespeare_char_paper.py", __file__)
    config.update(
        {
            "name": "shakespeare_char_paper_cpu",
            "model": {"dtype": "float32", "dropout": 0.0},
            "data": {"batch": 12, "eval_windows": 96, "eval_batch": 12},
            "train": {"eval_every": "4%", "checkpoint_every": "1%"},
            "finetune": {"steps": 100, "warmup": 10},
            "study": {
                "std_criteria": ("swe", "magnitude"),
                "std_rates": (1.0, 1.4, 2.0),
                "std_seeds": (0,),
                "criteria": (
                    "swe",
                    "votes",
                    "forecast_curvature",
                    "swe_curvature",
                    "magnitude",
                    "random",
                ),
                "sparsities": (0.5, 0.7, 0.8),
                "scopes": ("tensor",),
                "seeds": (0,),
            },
        }
    )
    return config
