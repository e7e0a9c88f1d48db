from ml_collections import ConfigDict


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
                "vision": {
                    "layers": 3,
                    "heads": 4,
                    "width": 64,
                    "hidden": 128,
                    "image": 32,
                    "patch": 8,
                    "crops": 2,
                },
            },
            "data": {
                "dataset": "digit_prices",
                "batch": 32,
                "eval_windows": 256,
                "eval_batch": 64,
            },
            "train": {
                "steps": 1500,
                "learning_rate": 3e-3,
                "final_learning_rate": 3e-4,
                "warmup": 100,
                "weight_decay": 0.05,
                "checkpoint_every": "25%",
            },
            "trajectory": {"every": "5%"},
            "finetune": {
                "steps": 60,
                "learning_rate": 1e-3,
                "final_learning_rate": 0.0,
                "warmup": 10,
                "eval_every": 0,
                "checkpoint_every": 0,
            },
            "study": {
                "std_criteria": ("swe",),
                "std_rates": (1.0,),
                "criteria": ("swe", "magnitude"),
                "sparsities": (0.5,),
                "scopes": ("tensor",),
                "seeds": (0,),
            },
        }
    )
