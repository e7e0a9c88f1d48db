"""A GPT of 4.2 B parameters, the size of Phi-3-vision, for a pod; planned, never run.

    python -m swe_prune plan --config=configs/gpt_4b.py --devices=64 --config.parallel.fsdp=64

compiles its train step for 64 devices and prints what each would hold and receive. Phi-3-vision is
the larger model of arXiv 2502.17071; of it this has the number of parameters and the vocabulary,
not the architecture. Other sizes:

    1.0 B   --config.model.layers=24 --config.model.heads=14 --config.model.width=1792
    8.0 B   --config.model.layers=31 --config.model.heads=36 --config.model.width=4608

Widths are multiples of 256, so that as many devices can divide them. The text is the plays', by
characters, until `config.data.dataset` names another.

Time: not measured. Result to expect: unknown, nobody has run it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "gpt_4b",
            "model": {
                "layers": 31,
                "heads": 26,
                "width": 3328,
                "context": 2048,
                "vocab_size": 32064,
                "dtype": "bfloat16",
                "remat": True,
                "scan_layers": True,
            },
            "data": {"batch": 256, "eval_windows": 256, "eval_batch": 256},
            "train": {"steps": 10_000, "warmup": 500, "learning_rate": 3e-4},
            "finetune": {"steps": 1000, "learning_rate": 1e-4, "warmup": 50},
            "trajectory": {"every": 100},
            "parallel": {"statistics": "host"},
            "study": {
                "std_criteria": ("swe",),
                "std_rates": (0.5, 1.0),
                "criteria": ("swe", "magnitude"),
                "sparsities": (0.5, 0.6),
                "scopes": ("global",),
                "seeds": (0,),
            },
        }
    )
