"""The settings of an experiment as frozen dataclasses; `ml_collections.ConfigDict` stops here.

A config file defines `get_config()` and returns a ConfigDict of plain values. `from_dict` turns it
into a `Config` and refuses unknown keys and wrong values, so a typo costs a sentence and not a run.
Values from files and from command lines go through one converter, `convert`. Durations may be given
as steps (`500`), as a percentage of the phase (`"5%"`) or in passes over the training text
(`"2 epochs"`); `to_steps` converts them.

    model       `ModelConfig` and its parts
    experiment  `Config` and its groups
    conversion  plain values to settings and back
    checks      what the settings must be
    files       `read` and `load`
"""

from swe_prune.config.checks import PHASE, validate
from swe_prune.config.conversion import (
    Text,
    check_choices,
    convert,
    flat,
    from_dict,
    literal,
    to_steps,
)
from swe_prune.config.experiment import (
    ONE_SHOT,
    CalibrationConfig,
    CellConfig,
    Config,
    CutConfig,
    DataConfig,
    Duration,
    LedgerConfig,
    ParallelConfig,
    PhaseConfig,
    PruneConfig,
    Recovery,
    RuleConfig,
    SamplesConfig,
    Schedule,
    ScheduleConfig,
    StudyConfig,
    TrajectoryConfig,
)
from swe_prune.config.files import load, read
from swe_prune.config.model import (
    PER_LAYER,
    RANGES,
    Activation,
    ComputeDtype,
    ModelConfig,
    Norm,
    RopeConfig,
    VisionConfig,
    check_width,
)

__all__ = [
    "ONE_SHOT",
    "PER_LAYER",
    "PHASE",
    "RANGES",
    "Activation",
    "CalibrationConfig",
    "CellConfig",
    "ComputeDtype",
    "Config",
    "CutConfig",
    "DataConfig",
    "Duration",
    "LedgerConfig",
    "ModelConfig",
    "Norm",
    "ParallelConfig",
    "PhaseConfig",
    "PruneConfig",
    "Recovery",
    "RopeConfig",
    "RuleConfig",
    "SamplesConfig",
    "Schedule",
    "ScheduleConfig",
    "StudyConfig",
    "Text",
    "TrajectoryConfig",
    "VisionConfig",
    "check_choices",
    "check_width",
    "convert",
    "flat",
    "from_dict",
    "literal",
    "load",
    "read",
    "to_steps",
    "validate",
]
