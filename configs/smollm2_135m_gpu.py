"""The study of `smollm2_135m.py` with the budget of a GPU: longer windows, more steps, more text.

python -m swe_prune run --config=configs/smollm2_135m_gpu.py --workdir=runs/smollm2_gpu
"""

from ml_collections import ConfigDict

from swe_prune.config import read


def get_config() -> ConfigDict:
    """Returns the settings of the two cores with larger numbers in their place."""
    config = read("smollm2_135m.py", __file__)
    config.update(
        {
            "name": "smollm2_135m_gpu",
            "data": {"window": 512, "batch": 16, "eval_windows": 96, "eval_batch": 16},
            "train": {"steps": 200, "warmup": 20},
            "finetune": {"steps": 60, "warmup": 6},
            "calibration": {"windows": 128, "batch": 16},
        }
    )
    return config
