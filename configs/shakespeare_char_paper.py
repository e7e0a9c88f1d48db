r"""The 10.7 M-parameter model of arXiv 2502.17071's size, for one GPU; never run yet.

    python -m swe_prune run --config=configs/shakespeare_char_paper.py --workdir=runs/paper
    python -m swe_prune run --config=configs/shakespeare_char_paper.py --workdir=runs/paper-all \
        --config.data.train_chars=None

The first trains on as many characters as tiny_shakespeare has, where this model overfits: there
the claim that pruning lowers the loss has its chance. The second trains on all the plays of the
training split. Sizes and optimizer are those of nanoGPT's train_shakespeare_char: 10,745,088
parameters, batch 64, 5,000 steps, AdamW 1e-3 to 1e-4. What the paper itself used beyond the number
of parameters is not known.

Time: not measured. `python -m swe_prune plan` with this config estimates it on your machine.
Result to expect: unknown, nobody has run it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "shakespeare_char_paper",
            "model": {
                "layers": 6,
                "heads": 6,
                "width": 384,
                "context": 256,
                "vocab_size": 65,
                "dropout": 0.2,
                "activation": "gelu_exact",  # as in nanoGPT
                "dtype": "bfloat16",
            },
            "data": {
                "train_chars": 1_115_394,
                "batch": 64,
                "eval_windows": 1024,
                "eval_batch": 64,
            },
            "train": {"steps": 5000},
            "trajectory": {"every": "5%"},  # twenty snapshots
            "finetune": {
                "steps": 500,
                "learning_rate": 3e-4,
                "final_learning_rate": 3e-5,
                "warmup": 50,
                "eval_every": 0,
                "checkpoint_every": 0,  # a killed cell starts again
            },
            "study": {
                "std_criteria": ("swe", "swe_spread", "magnitude"),
                "std_rates": (0.5, 1.0, 1.4, 2.0, 2.5, 3.0, 4.0),
                "std_seeds": (0, 1, 2),
                "criteria": ("swe", "votes", "forecast_curvature", "magnitude", "random"),
                "sparsities": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
                "seeds": (0, 1, 2),
            },
        }
    )
