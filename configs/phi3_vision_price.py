"""Phi-3-vision at its full size, 4,146,621,440 parameters, for a pod or eight GPUs; never run.

    python -m swe_prune plan --config=configs/phi3_vision_price.py --devices=8

compiles its train step for eight devices and prints what each would hold and receive. The decoder's
attention and MLP are trained, tracked and pruned; `--config.train.trained=None` trains the tower
too, as the public recipe does. To start from the published weights, give `model` their folder as
`pretrained` in place of the sizes; they come with their tokenizer.

The data are the price tags, by characters, until `config.data.dataset` names a parquet file of the
product-price set (title, category3_code, full_price, image). A tag becomes 12 crops and a global
view, 1,909 tokens; with `--config.model.vision.crops=4`, 3 crops and 601.

Time: not measured. Result to expect: unknown, nobody has run it.
"""

from ml_collections import ConfigDict

FACTORS = (1.0,) * 48  # those of the checkpoint are in its config.json


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "phi3_vision_price",
            "model": {
                "layers": 32,
                "heads": 32,
                "width": 3072,
                "hidden": 8192,
                "context": 131072,
                "vocab_size": 32064,
                "gated": True,
                "norm": "rms",
                "positions": "rope",
                "rope": {
                    "scaling": "longrope",
                    "original_context": 4096,
                    "short_factors": FACTORS,
                    "long_factors": FACTORS,
                },
                "activation": "silu",
                "tied_head": False,
                "dtype": "bfloat16",
                "remat": True,
                "scan_layers": True,
                "vision": {},  # CLIP ViT-L/14-336
            },
            "data": {
                "dataset": "digit_prices",
                "batch": 64,
                "eval_windows": 8,
                "eval_batch": 8,
            },
            "train": {
                "steps": 150,
                "learning_rate": 5e-5,
                "final_learning_rate": 5e-6,
                "warmup": 10,
                "accumulate": 8,
                "trained": (r"^decoder/block_[0-9]+/(attention|mlp)/",),
            },
            "finetune": {
                "steps": 50,
                "learning_rate": 5e-5,
                "accumulate": 8,
                "trained": (r"^decoder/block_[0-9]+/(attention|mlp)/",),
            },
            "trajectory": {"every": "5%"},
            "parallel": {"fsdp": 8, "statistics": "host"},
            "study": {
                "std_criteria": ("swe",),
                "std_rates": (0.5, 1.0),
                "criteria": ("swe", "magnitude"),
                "sparsities": (0.5, 0.6),
                "scopes": ("tensor",),
                "seeds": (0,),
            },
        }
    )
