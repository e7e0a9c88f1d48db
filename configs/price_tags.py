"""Prices read off pictures of price tags: the paper's second experiment at the size of a laptop.

Run it with

    python -m swe_prune run --config=configs/price_tags.py --workdir=runs/price_tags

The classes of Phi-3-vision at 375,264 parameters train from scratch on tags of real handwritten
digits, tracked, for three seeds; the attention and MLP of the decoder, of the vision tower and of
both are pruned and trained on, and half of the decoder's neurons are cut out. Every model's prices
are generated with the picture, with a blank one and with another tag's, and read by the published
recipe too: see `swe_prune/evaluation/prices.py`.

Result to expect: each seed learns to read the figures, and ends at 0.17 to 0.19 nats per token. See
docs/vision.md.
"""

from ml_collections import ConfigDict

from swe_prune import sweep

DECODER, VISION = (r"^decoder/block_\d+/.*kernel$",), (r"^vision/block_\d+/.*kernel$",)
TOWERS = {"include": [["^decoder/"], ["^vision/"], None]}


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "price_tags",
            "model": {
                "layers": 2,
                "heads": 4,
                "width": 96,
                "hidden": 256,
                "context": 64,
                "gated": True,
                "norm": "rms",
                "positions": "rope",
                "activation": "silu",
                "tied_head": False,
                "init_stddev": 0.06,  # 0.02 * sqrt(768 / 96), see docs/vision.md
                "vision": {
                    "layers": 3,  # two are used
                    "heads": 4,
                    "width": 64,
                    "hidden": 128,
                    "image": 32,
                    "patch": 8,
                    "crops": 3,  # a tag is three crops wide
                    "init_stddev": 0.06,
                },
            },
            "data": {
                "dataset": "digit_prices",
                "batch": 32,
                "eval_windows": 128,
                "eval_batch": 64,
            },
            "train": {
                "steps": 1200,
                "learning_rate": 1e-3,  # at 3e-3, from 0.02, nothing is learned in 600 steps
                "final_learning_rate": 1e-4,
                "warmup": 100,
                "weight_decay": 0.05,
                "checkpoint_every": "25%",
            },
            "trajectory": {"every": "5%"},
            "prune": {"include": DECODER + VISION},
            "finetune": {
                "steps": 40,
                "learning_rate": 3e-4,  # at 1e-3 the control loses 0.1 nats per token
                "final_learning_rate": 0.0,
                "warmup": 5,
                "eval_every": 0,
                "checkpoint_every": 0,  # a killed cell starts again: it takes seconds
            },
            "calibration": {"windows": 64, "batch": 32},
            "study": {
                "std_criteria": (),
                "criteria": (),
                "seeds": (0, 1, 2),
                "cells": sweep.chain(
                    sweep.product(
                        TOWERS,
                        {
                            "criterion": [
                                "swe",
                                "forecast_curvature",
                                "magnitude",
                                "wanda",
                                "random",
                            ],
                            "sparsity": [0.5, 0.8],
                        },
                    ),
                    sweep.product(TOWERS, {"criterion": ["swe"], "rate": [0.5, 1.4]}),
                    sweep.product(
                        TOWERS,
                        {
                            "criterion": ["wanda"],
                            "sparsity": [0.8],
                            "allocation": ["ecoflap", "owl"],
                        },
                    ),
                ),
            },
            "cuts": ({"criterion": "forecast_curvature", "sparsity": 0.5},),
            "ledger": {"windows": 5},
        }
    )
