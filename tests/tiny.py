"""A complete experiment small enough to run in a test, on the real text."""

import dataclasses
from pathlib import Path

from swe_prune.config import (
    Config,
    DataConfig,
    ModelConfig,
    PhaseConfig,
    StudyConfig,
    TrajectoryConfig,
)

PHI3V = {
    "gated": True,
    "norm": "rms",
    "positions": "rope",
    "activation": "silu",
    "tied_head": False,
}
"""The family of Phi-3-vision's decoder, without its sizes."""

CONFIG_FILE = '''
"""A tiny experiment."""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
'''


def config(data_dir: Path | None = None, **changes) -> Config:
    tiny = Config(
        name="tiny",
        model=ModelConfig(layers=1, heads=2, width=16, context=16),
        data=DataConfig(
            data_dir=None if data_dir is None else str(data_dir),
            train_chars=20_000,
            validation_chars=4_000,
            batch=4,
            eval_windows=8,
            eval_batch=8,
        ),
        train=PhaseConfig(steps=24, warmup=2, learning_rate=3e-3, checkpoint_every=4),
        finetune=PhaseConfig(steps=4, warmup=1, eval_every=0, checkpoint_every=2),
        trajectory=TrajectoryConfig(every=3),
        study=StudyConfig(
            std_criteria=("swe", "swe_spread"),
            std_rates=(0.5, 1.4),
            std_seeds=(0,),
            criteria=("swe", "magnitude", "random"),
            sparsities=(0.5,),
            scopes=("tensor", "global"),
            seeds=(0, 1),
        ),
        log_every=4,
    )
    return dataclasses.replace(tiny, **changes)


def config_file(folder: Path, values: Config) -> Path:
    path = folder / "tiny_config.py"
    path.write_text(CONFIG_FILE.format(values=dataclasses.asdict(values)))
    return path
