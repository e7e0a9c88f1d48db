"""The settings of an experiment as frozen dataclasses; `ml_collections.ConfigDict` stops here.

A config file defines `get_config()` and returns a ConfigDict of plain values. `from_dict` turns it
into a `Config` and refuses what it does not know, so a typo costs a sentence and not a run.
Durations may be given as steps (`500`), as a share of the phase (`"5%"`) or in passes over the
training text (`"2 epochs"`); `to_steps` makes steps of them.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from swe_prune.errors import InputError, did_you_mean
from swe_prune.recipe import Recipe
from swe_prune.recipe import check as check_recipe

Duration = int | str
"""Steps as an int, or a string `"5%"` or `"2 epochs"`."""

ONE_SHOT = "one_shot"
SCHEDULES = (ONE_SHOT, "cubic", "iterative", "rigl", "set", "ste", "movement")
RECOVERIES = ("none", "finetune", "rewarm", "rewind")
"""Choices of `CellConfig`."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their scaling to longer texts; see `models/rope.py`."""

    theta: float = 10000.0
    share: float = 1.0  # of a head's width that is rotated
    scaling: str = "none"  # or "linear", "dynamic", "yarn", "llama3", "longrope"
    factor: float | None = None  # None: context / original_context
    original_context: int | None = None  # before scaling; None: context
    low_frequency: float = 1.0  # of "llama3", like the next
    high_frequency: float = 4.0
    beta_fast: float = 32.0  # of "yarn", like the next two
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None  # of "yarn", like the next: both or neither
    mscale_all: float | None = None
    attention_factor: float | None = None  # of "yarn" and "longrope"; None: the paper's
    short_factors: tuple[float, ...] = ()  # of "longrope", one for each frequency, like the next
    long_factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: GPT-2, Llama, Mistral or Phi-3; see `models/gpt.py`."""

    layers: int = 6
    heads: int = 6
    width: int = 384
    context: int = 256
    vocab_size: int | None = None  # None: as many as the tokenizer has
    hidden_ratio: int = 4
    activation: str = "gelu"
    use_bias: bool = False
    qkv_bias: bool | None = None  # None: as use_bias
    out_bias: bool | None = None  # of the attention's output; None: as use_bias
    mlp_bias: bool | None = None  # None: as use_bias
    head_bias: bool | None = None  # of a head that is not tied; None: as use_bias
    tied_head: bool = True
    dropout: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False  # training runs each block twice and keeps only what enters it: less memory
    scan_layers: bool = False  # training loops over one compiled block: compiles sooner when deep
    hidden: int | None = None  # width of the MLP; None: hidden_ratio * width
    kv_heads: int | None = (
        None  # heads of keys and values, shared by groups of queries; None: heads
    )
    head_width: int | None = None  # None: width / heads
    gated: bool = False  # the MLP is down(activation(gate(x)) * up(x))
    norm: str = "layer"  # or "rms"
    norm_epsilon: float = 1e-5
    positions: str = "learned"  # or "rope"
    rope: RopeConfig = RopeConfig()
    window: int | None = None  # a token sees itself and the window - 1 before it; None: all
    pretrained: str | None = None  # a checkpoint, whose sizes take the place of the above: a
    # Hugging Face folder, a GGUF file, or "package:NAME" for the GGUF file in an installed package

    @property
    def head_size(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def key_heads(self) -> int:
        """G, how many heads keys and values have."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_size(self) -> int:
        """F, the hidden width of the MLP."""
        return self.hidden_ratio * self.width if self.hidden is None else self.hidden


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, cut and batched how; see `data/`."""

    dataset: str = (
        "shakespeare_plays"  # a TFDS name (with config, "wiki40b/en") or a path to a text
    )
    data_dir: str | None = None  # where TFDS keeps prepared datasets; None: its own default
    train_split: str = "train"
    validation_split: str = "validation"
    text_key: str = "text"
    validation_fraction: float = 0.1  # of a text file, from its end; TFDS datasets bring splits
    train_chars: int | None = None  # only the first so many characters of the training split
    validation_chars: int | None = None
    window: int | None = None  # tokens of a window; None: model.context
    batch: int = 64
    eval_windows: int = 256  # fixed validation windows
    eval_batch: int = 64


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of optimization: AdamW, linear warm-up, cosine decay."""

    steps: Duration = 5000  # "n epochs" or a number
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup: Duration = 100
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0  # of the global gradient norm
    accumulate: int = 1  # parts of the batch, one after another, whose gradients are averaged
    eval_every: Duration = "10%"  # 0: only at the end
    checkpoint_every: Duration = "10%"  # 0: none; a killed phase starts again (not for train)
    keep_latest: int = 2  # checkpoints; the one that a phase ends with is among them
    keep_every: Duration = 0  # those of every so many steps stay for good too; 0: none
    stop_after_skipped: int = 5  # steps in a row whose loss or gradient is not finite


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """What is remembered of every prunable weight; see `trajectory.py`."""

    measures: tuple[str, ...] | None = None  # None: those that the criteria of the study need
    every: Duration = "5%"  # steps between snapshots
    power: float = 0.5
    window_start: int = 1  # the first snapshot that counts for late_mean
    vote_rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What may be pruned and with which values the pruned model goes on."""

    include: tuple[str, ...] | None = None  # None: the default rules of tree.prunable
    exclude: tuple[str, ...] | None = None
    values_from: str = "final"  # or "late_mean": the averaged weights


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """A partition rule: which parameters, and the mesh axis that divides each of their axes."""

    pattern: str = ""  # a regular expression, searched in the parameter's name
    axes: tuple[str | None, ...] = ()  # "data", "fsdp", "tensor", or None for one that stays whole


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work; see `parallel/`. A run may resume with other values."""

    data: int | None = None  # None: the devices that fsdp and tensor leave
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[RuleConfig, ...] | None = None  # None: those of the model
    statistics: str = "device"  # or "host": between snapshots, which then cost two transfers


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """The calibration text: random windows of the training split, for criteria that need data."""

    windows: int = 128
    batch: int = 32
    seed: int = 0  # of the choice of windows


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Text that every model of the study writes, beside its loss; greedy, so that it is the same.

    Its repetition is counted, and how far the model's next-token probabilities are from the dense
    model's: both show what a loss hides.
    """

    prompts: tuple[str, ...] = ()  # none: nothing is written
    tokens: int = 48  # new ones


@dataclasses.dataclass(frozen=True)
class CellConfig(Recipe):
    """One cell of a study, for each of its seeds: a recipe, its schedule and the recovery.

    The fields of `recipe.Recipe` and the following; `sweep` makes many cells at once. Recovery is
    the training that follows pruning with the masks held, each against a control: the dense model
    trained for as long with the same learning rates.

        none      no training
        finetune  the settings of `finetune`
        rewarm    the same, with the learning rate warmed up to the peak of `train` again
        rewind    the last steps of the learning rate of `train` once more (Renda et al., 2020)

    A schedule other than "one_shot" prunes during the recovery, whose length stays the same:

        cubic, iterative  the sparsity rises, at once or in rounds (Zhu and Gupta, 2017; Frankle
                          and Carbin, 2019)
        rigl, set         constant sparsity; weak weights are exchanged (Evci et al., 2020; Mocanu
                          et al., 2018)
        ste               dense weights are trained through masks of their magnitude
        movement          scores are learned and pick the masks (Sanh et al., 2020)
    """

    schedule: str = ONE_SHOT  # One of SCHEDULES.
    recovery: str = "finetune"  # One of RECOVERIES.
    recovery_steps: Duration | None = None  # Length of the recovery; None: `finetune.steps`.
    seeds: tuple[int, ...] | None = None  # Seeds of the dense models; None: those of the study.

    def recipe(self, seed: int) -> Recipe:
        """Returns how the model of a seed is pruned."""
        fields = dataclasses.fields(Recipe)
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields}
        values["seed"] = seed
        return Recipe(**values)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The grid: two separate comparisons, each over its own criteria, amounts and seeds.

    `cells` follow the grid, as a sweep lists them.
    """

    std_criteria: tuple[str, ...] = ("swe", "swe_spread", "magnitude")
    std_rates: tuple[float, ...] = (0.5, 1.0, 1.4, 2.0, 3.0)
    std_seeds: tuple[int, ...] = (0,)
    criteria: tuple[str, ...] = ("swe", "magnitude", "random")
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    scopes: tuple[str, ...] = ("tensor", "global")
    seeds: tuple[int, ...] = (0, 1)
    cells: tuple[CellConfig, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    name: str = "experiment"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: PhaseConfig = PhaseConfig()
    finetune: PhaseConfig = PhaseConfig(steps=500)
    trajectory: TrajectoryConfig = TrajectoryConfig()
    prune: PruneConfig = PruneConfig()
    study: StudyConfig = StudyConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    samples: SamplesConfig = SamplesConfig()
    parallel: ParallelConfig = ParallelConfig()
    log_every: int = 10
    keep_finetuned: bool = False  # keep the fine-tuned parameters of every cell, not only its masks

    @property
    def window(self) -> int:
        """L, the tokens of a window to train, calibrate and evaluate on."""
        return self.model.context if self.data.window is None else self.data.window

    def without_switches(self) -> "Config":
        """Returns this config with the settings that say how, and not what, at their defaults.

        How devices share the work, and what is done for less memory or compile time: a run may
        resume with other values of them. Only dropout's random numbers depend on them.
        """
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, remat=False, scan_layers=False),
            train=dataclasses.replace(self.train, accumulate=1),
            finetune=dataclasses.replace(self.finetune, accumulate=1),
            parallel=ParallelConfig(),
        )

    def fingerprint(self) -> str:
        """Returns a hash of every setting, to recognise a working directory by."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def flat(config: Any) -> dict[str, Any]:
    """Returns every setting by its dotted path.

    >>> flat(CalibrationConfig(windows=2))
    {'windows': 2, 'batch': 32, 'seed': 0}
    """

    def walk(values: Any, path: str) -> dict[str, Any]:
        if isinstance(values, dict):
            found: dict[str, Any] = {}
            for key, value in values.items():
                found |= walk(value, f"{path}.{key}" if path else key)
            return found
        return {path: list(values) if isinstance(values, tuple) else values}

    return walk(dataclasses.asdict(config), "")


def to_steps(duration: Duration, *, total: int | None = None, epoch: int | None = None) -> int:
    """Returns a duration in steps, rounded to the nearest and at least 1 unless it is 0.

    Args:
        duration: steps, `"p%"` of `total`, or `"n epochs"` of `epoch` steps each.
        total: steps of the phase the duration belongs to.
        epoch: steps of one pass over the training text.

    Raises:
        InputError: the duration is malformed or its unit has no meaning here.

    >>> to_steps("5%", total=2000), to_steps("2 epochs", epoch=150), to_steps(7)
    (100, 300, 7)
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|epochs?|steps?)\s*", str(duration))
    if not match:
        raise InputError(
            f"duration {duration!r} is none of: a number of steps, 'p%', 'n epochs'; write e.g. 500"
        )
    value, unit = float(match[1]), match[2].rstrip("s")
    base = {"step": 1, "%": None if total is None else total / 100, "epoch": epoch}[unit]
    if base is None:
        raise InputError(
            f"duration {duration!r} cannot be used here, where a {unit!r} has no length; give steps"
        )
    steps = value * base
    return 0 if steps == 0 else max(1, math.floor(steps + 0.5))


def from_dict(
    values: Mapping[str, Any] | ConfigDict, cls: type = Config, path: str = "config"
) -> Any:
    """Returns the frozen dataclass `cls` filled from nested plain values.

    Raises:
        InputError: an unknown key or a value of another type, named by its dotted path.
    """
    types_of = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in types_of:
            raise InputError(f"{path} has no setting {key!r}; {did_you_mean(key, types_of)}")
        kwargs[key] = _convert(value, types_of[key], f"{path}.{key}")
    return cls(**kwargs)


def _convert(value: Any, wanted: Any, path: str) -> Any:
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, typing.cast(type, wanted)):
            return value
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{path} is a group of settings and got {value!r}; set its members")
        return from_dict(value, typing.cast(type, wanted), path)
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if typing.get_origin(option) is Mapping:
            if isinstance(value, Mapping):
                return dict(value)
        elif typing.get_origin(option) is tuple:
            if isinstance(value, Sequence) and not isinstance(value, str):
                member = typing.get_args(option)[0]
                return tuple(_convert(v, member, f"{path}[{i}]") for i, v in enumerate(value))
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, option) and not (isinstance(value, bool) and option is int):
            return value
    shown = getattr(wanted, "__name__", str(wanted))
    raise InputError(f"{path} must be {shown} and got {value!r}; correct the config")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the Config that the file's `get_config()` gives, with `a.b=value` overrides applied.

    Raises:
        InputError: as `read`; an unknown key, or a value of another type.
    """
    values = read(path).to_dict()
    for override in overrides:
        _apply_override(values, override)
    config = from_dict(values)
    validate(config)
    return config


def read(path: str | Path, start: str | Path | None = None) -> ConfigDict:
    """Returns what the file's `get_config()` gives, for another config file to start from.

        config = read("../shakespeare_char.py", __file__)

    Args:
        path: of a Python file.
        start: the file that a relative path is relative to; None: the working directory.

    Raises:
        InputError: no such file, no `get_config`, one that fails, or that returns something else.
    """
    path = Path(path) if start is None else Path(start).parent / path
    if not path.is_file():
        raise InputError(
            f"config {str(path)!r} is not a file; give the path of a get_config() file"
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {str(path)!r} is not Python; give a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise InputError(
            f"config {str(path)!r} fails to run: {type(error).__name__}: {error}; correct the file"
        ) from error
    if not hasattr(module, "get_config"):
        raise InputError(f"config {str(path)!r} defines no get_config(); add it")
    if not isinstance(values, Mapping | ConfigDict):
        raise InputError(
            f"get_config() of {str(path)!r} returns {type(values).__name__}; return a ConfigDict"
        )
    return values if isinstance(values, ConfigDict) else ConfigDict(values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r} has no '='; write --config.train.steps=100")
    *groups, leaf = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise InputError(f"override {override!r}: {group!r} is no group of settings; name one")
    try:
        values[leaf] = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        values[leaf] = text


def validate(config: Config) -> None:
    """Checks what one value alone or two together can get wrong; names live with their registries.

    Raises:
        InputError: the first setting that cannot work, with the mend.
    """

    def need(ok: bool, key: str, value: Any, rule: str) -> None:
        if not ok:
            raise InputError(f"config.{key} = {value!r} cannot be used: {rule}")

    model, data, study = config.model, config.data, config.study
    for group, keys in (
        (model, "layers heads width context hidden_ratio"),
        (data, "batch eval_windows eval_batch"),
        (config, "log_every"),
    ):
        name = {ModelConfig: "model.", DataConfig: "data."}.get(type(group), "")
        for key in keys.split():
            need(getattr(group, key) >= 1, name + key, getattr(group, key), "give at least 1")
    need(model.head_width is not None or model.width % model.heads == 0,
         "model.width", model.width, "make it a multiple of heads")  # fmt: skip
    for key in ("hidden", "kv_heads", "head_width", "window"):
        value = getattr(model, key)
        need(value is None or value >= 1, f"model.{key}", value, "give at least 1")
    need(data.window is None or data.window >= 1, "data.window", data.window, "give at least 1")
    need(config.samples.tokens >= 1, "samples.tokens", config.samples.tokens, "give at least 1")
    need(0 <= model.dropout < 1, "model.dropout", model.dropout, "give a share in [0, 1)")
    need(
        data.eval_windows % data.eval_batch == 0,
        "data.eval_windows",
        data.eval_windows,
        f"make it a multiple of eval_batch = {data.eval_batch}",
    )
    need(
        0 < data.validation_fraction < 1,
        "data.validation_fraction",
        data.validation_fraction,
        "give a share between 0 and 1",
    )
    for name in ("train", "finetune"):
        phase: PhaseConfig = getattr(config, name)
        need(phase.accumulate >= 1 and data.batch % phase.accumulate == 0, f"{name}.accumulate",
             phase.accumulate, f"let it divide data.batch = {data.batch}")  # fmt: skip
        need(phase.keep_latest >= 1, f"{name}.keep_latest", phase.keep_latest, "give at least 1")
        need(phase.stop_after_skipped >= 1, f"{name}.stop_after_skipped",
             phase.stop_after_skipped, "give at least 1")  # fmt: skip
        for key in ("learning_rate", "clip"):
            value = getattr(phase, key)
            need(
                value > 0 and math.isfinite(value), f"{name}.{key}", value, "give a number above 0"
            )
    need(config.trajectory.window_start >= 1, "trajectory.window_start",
         config.trajectory.window_start, "snapshots are counted from 1")  # fmt: skip
    need(config.train.checkpoint_every != 0, "train.checkpoint_every", 0,
         "pruning starts from the dense checkpoint; give a cadence")  # fmt: skip
    for rate in study.std_rates:
        need(rate >= 0 and math.isfinite(rate), "study.std_rates", rate, "give rates of 0 or more")
    for sparsity in study.sparsities:
        need(0 <= sparsity < 1, "study.sparsities", sparsity, "give shares in [0, 1)")
    for scope in study.scopes:
        need(scope in ("tensor", "global", "row"), "study.scopes", scope,
             "give 'tensor', 'global' or 'row'")  # fmt: skip
    need(
        config.prune.values_from in ("final", "late_mean"),
        "prune.values_from",
        config.prune.values_from,
        "give 'final' or 'late_mean'",
    )
    need(config.parallel.statistics in ("device", "host"), "parallel.statistics",
         config.parallel.statistics, "give 'device' or 'host'")  # fmt: skip
    for key in ("data", "fsdp", "tensor"):
        value = getattr(config.parallel, key)
        need(value is None or value >= 1, f"parallel.{key}", value, "give at least 1")
    for key in ("windows", "batch"):
        value = getattr(config.calibration, key)
        need(value >= 1, f"calibration.{key}", value, "give at least 1")
    for number, cell in enumerate(study.cells):
        _validate_cell(cell, f"study.cells[{number}]", need)


def _validate_cell(cell: CellConfig, path: str, need: Callable[..., None]) -> None:
    """Checks what a cell adds to its recipe, then the recipe itself."""
    for key, known in (("schedule", SCHEDULES), ("recovery", RECOVERIES)):
        value = getattr(cell, key)
        need(value in known, f"{path}.{key}", value, did_you_mean(value, known))
    gradual = cell.schedule != ONE_SHOT
    need(cell.seed == 0, f"{path}.seed", cell.seed, f"give seeds = ({cell.seed},)")
    need(cell.seeds is None or len(cell.seeds) > 0, f"{path}.seeds", cell.seeds,
         "give at least one, or None for those of the study")  # fmt: skip
    need(not (gradual and cell.recovery == "none"), f"{path}.schedule", cell.schedule,
         "it prunes during the recovery; choose one that is not 'none'")  # fmt: skip
    need(not (gradual and cell.rate is not None), f"{path}.schedule", cell.schedule,
         "a rate is not a sparsity that can grow; give a sparsity")  # fmt: skip
    try:
        check_recipe(cell.recipe(0))
        gradual_only = cell.method is None and not cell.n_of_m
    except InputError as error:
        raise InputError(f"config.{path}: {error}") from error
    need(not gradual or gradual_only, f"{path}.schedule", cell.schedule,
         "a method or an n:m pattern prunes at once; give 'one_shot'")  # fmt: skip
    ranked_by = {"ste": "magnitude", "movement": "movement"}.get(cell.schedule)
    need(ranked_by in (None, cell.criterion), f"{path}.criterion", cell.criterion,
         f"schedule {cell.schedule!r} ranks by its own; give {ranked_by!r}")  # fmt: skip
    need(cell.schedule in (ONE_SHOT, "cubic", "iterative") or cell.pattern is None,
         f"{path}.pattern", cell.pattern,
         f"schedule {cell.schedule!r} prunes single weights; leave it out")  # fmt: skip
    need(ranked_by is None or cell.allocation is None, f"{path}.allocation", cell.allocation,
         f"schedule {cell.schedule!r} distributes by scope; leave it out")  # fmt: skip
