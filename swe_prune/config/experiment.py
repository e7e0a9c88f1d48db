"""The settings of an experiment, group by group, and of the whole."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from swe_prune.choices import Scope
from swe_prune.config.model import ModelConfig
from swe_prune.ledger import Factors, of_country
from swe_prune.recipe import CutRecipe, Recipe

Values = Literal["final", "late_mean"]
Index = Literal["window", "absolute"]
Memory = Literal["device", "host"]
Schedule = Literal["one_shot", "cubic", "iterative", "rigl", "set", "ste", "movement", "elsa"]
Recovery = Literal["none", "finetune", "rewarm", "rewind", "rewind_weights"]
"""Choices of the settings below; `convert` and `check_choices` refuse every other value."""

Duration = int | str
"""Steps as an int, or a string `"5%"` or `"2 epochs"`."""

ONE_SHOT: Schedule = "one_shot"
"""The schedule that prunes before the recovery; all others prune during it."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut into windows and batches; see `data/`."""

    dataset: str = "shakespeare_plays"  # TFDS name ("wiki40b/en" with its config) or path of a text
    data_dir: str | None = None  # folder of prepared TFDS datasets; None: the default of TFDS
    train_split: str = "train"  # name of the TFDS split to train on
    validation_split: str = "validation"  # name of the TFDS split to evaluate on
    text_key: str = "text"  # feature of a TFDS example, or field of a JSON object, with the text
    validation_fraction: float = 0.1  # fraction at the end of a text file to evaluate on
    train_chars: int | None = None  # number of leading characters to train on; None: all
    validation_chars: int | None = None  # number of leading characters to evaluate on; None: all
    skip_bad_rows: bool = False  # whether rows with a bad image or no price are left out
    window: int | None = None  # tokens per window; None: model.context
    batch: int = 64  # windows per training step
    eval_windows: int = 256  # number of fixed validation windows
    eval_batch: int = 64  # windows per evaluation step


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of optimization: AdamW, linear warm-up, cosine decay."""

    steps: Duration = 5000  # length of the phase, in steps or "n epochs"
    learning_rate: float = 1e-3  # peak learning rate
    final_learning_rate: float = 1e-4  # learning rate at the end of the cosine decay
    warmup: Duration = 100  # length of the linear warm-up
    decay_from: float = 0.0  # share of the steps from which the rate decays; 0: from the warm-up
    weight_decay: float = 0.1  # weight decay of AdamW
    b1: float = 0.9  # decay rate of AdamW's first moment
    b2: float = 0.99  # decay rate of AdamW's second moment
    clip: float = 1.0  # largest global gradient norm; larger gradients are scaled down
    trained: tuple[str, ...] | None = None  # rules of the weights that change; None: all
    accumulate: int = 1  # number of microbatches per step whose gradients are averaged
    eval_every: Duration = "10%"  # interval between evaluations; 0: only at the end
    checkpoint_every: Duration = "10%"  # interval between checkpoints; 0: none (not in train)
    keep_latest: int = 2  # number of latest checkpoints to retain, the final one included
    keep_every: Duration = 0  # interval between checkpoints to retain for good; 0: none
    stop_after_skipped: int = 5  # consecutive non-finite steps after which the run stops


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """What is recorded of every prunable weight; see `trajectory.py`."""

    measures: tuple[str, ...] | None = (
        None  # names of the measures to track; None: the ones that the criteria of the study need
    )
    every: Duration = "5%"  # interval between snapshots
    power: float = 0.5  # exponent of a snapshot's number in its weight for late_mean
    window_start: int = 1  # number of the first snapshot that counts for late_mean, from 1
    vote_rate: float = 1.0  # multiple of the standard deviation that earns a weight a vote
    index: Index = "window"  # what a snapshot's number counts from: the window, or the run


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Which weights may be pruned, and the values that the pruned model starts from."""

    include: tuple[str, ...] | None = None  # rules of prunable weights; None: of tree.prunable
    exclude: tuple[str, ...] | None = None  # rules of dense weights; None: of tree.prunable
    values_from: Values = "final"  # values of the retained weights: final, or averaged (late_mean)


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """A partition rule: the parameters it matches, and the mesh axis that divides each axis."""

    pattern: str = ""  # regular expression, searched in the parameter's name
    axes: tuple[str | None, ...] = ()  # "data", "fsdp", "tensor" or None (undivided) for each axis


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices divide the work; see `parallel/`. A run may resume with other values."""

    data: int | None = None  # size of the mesh axis "data"; None: the remaining devices
    fsdp: int = 1  # size of the mesh axis "fsdp", which divides parameters and batch
    tensor: int = 1  # size of the mesh axis "tensor", which divides hidden axes
    rules: tuple[RuleConfig, ...] | None = None  # partition rules; None: those of the model
    statistics: Memory = "device"  # memory of the statistics between snapshots; "host": transfers


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """The calibration text: random windows of the training split, for criteria that need data."""

    windows: int = 128  # number of calibration windows
    batch: int = 32  # windows per calibration batch
    seed: int = 0  # seed of the choice of windows


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Text that every model of the study generates, greedily, next to its loss.

    Its repetition is counted, and the distance of the model's next-token probabilities from the
    dense model's is measured: both show what a loss hides.
    """

    prompts: tuple[str, ...] = ()  # texts to continue; empty: nothing is generated
    tokens: int = 48  # number of new tokens per prompt
    pictures: int = 8  # number of pictures to show with what each model reads off them


@dataclasses.dataclass(frozen=True)
class LedgerConfig:
    """Where the energy of a run comes from, and how serving is measured; see `swe_prune.ledger`."""

    country: str = "WORLD"  # country of the electricity: three letters of ISO 3166, or "WORLD"
    pue: float | None = None  # energy of the building per energy of the devices; None: a survey's
    grid: float | None = None  # own carbon intensity, g CO2e/kWh; None: the country's
    water_site: float | None = None  # own water on site, L/kWh of the devices; None: published
    water_grid: float | None = None  # own water of the electricity, L/kWh; None: a published one
    windows: int = 20  # windows in which each model of a cut serves, in turns, for the break-even
    window_seconds: float = 5.0  # least length of a window
    batch: int = 16  # texts that are served at once
    prompt: int | None = None  # tokens of a prompt; None: half of the context
    new_tokens: int | None = None  # new tokens of a text; None: a quarter of the context
    margin: float = 0.02  # nats per token by which a cut model may be worse at equal quality

    @property
    def factors(self) -> Factors:
        """Factors of the place; see `ledger.of_country`."""
        names = ("pue", "grid", "water_site", "water_grid")
        return of_country(self.country, **{name: getattr(self, name) for name in names})


def _changed(settings: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns those of the named settings that are not at their defaults."""
    usual = type(settings)()
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How a schedule prunes during the recovery; each setting is of the schedules that it names.

    The defaults of exchange_end and drop_fraction (RigL's alpha) are those of the paper; that of
    penalty was the best of 0.01, 0.1 and 1 on one seed of the demo's model.
    """

    ramp_end: float = 0.6  # share of the recovery at which the sparsity is reached (cubic,
    # iterative, movement)
    rounds: int = 5  # largest number of rounds of pruning (iterative)
    updates: int = 10  # largest number of mask updates (cubic, rigl, set)
    exchange_end: float = 0.75  # share of the recovery at which exchanges end (rigl, set)
    drop_fraction: float = 0.3  # share of the active weights exchanged at first (rigl, set)
    penalty: float = 1.0  # weight of the distance from sparse weights, lambda (elsa)

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not at their defaults, by name."""
        return _changed(self, [field.name for field in dataclasses.fields(self)])


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
        rewind_weights  the same, from the values that the weights had at that step (Frankle et
                  al., 2020); `train.keep_every` must have kept the checkpoint

    A schedule other than "one_shot" prunes during the recovery, whose length stays the same:

        cubic, iterative  the sparsity rises, at once or in rounds (Zhu and Gupta, 2017; Frankle
                          and Carbin, 2019)
        rigl, set         constant sparsity; weak weights are exchanged (Evci et al., 2020; Mocanu
                          et al., 2018)
        ste               dense weights are trained through masks of their magnitude
        movement          scores are learned and pick the masks (Sanh et al., 2020)
        elsa              dense weights are drawn towards sparse ones by ADMM over the training,
                          and pruned at its end (Lee et al., 2025)
    """

    schedule: Schedule = ONE_SHOT  # when the weights are removed
    recovery: Recovery = "finetune"  # training that follows
    recovery_steps: Duration | None = None  # length of the recovery; None: `finetune.steps`
    seeds: tuple[int, ...] | None = None  # seeds of the dense models; None: those of the study
    include: tuple[str, ...] | None = None  # rules of the prunable weights to prune; None: all
    schedule_options: ScheduleConfig = ScheduleConfig()  # settings of the schedule

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

    std_criteria: tuple[str, ...] = ("swe", "swe_spread", "magnitude")  # criteria pruned by a rate
    std_rates: tuple[float, ...] = (0.5, 1.0, 1.4, 2.0, 3.0)  # rates for each of them
    std_seeds: tuple[int, ...] = (0,)  # seeds of the dense models pruned by a rate
    criteria: tuple[str, ...] = ("swe", "magnitude", "random")  # criteria pruned to equal sparsity
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities for each of them
    scopes: tuple[Scope, ...] = ("tensor", "global")  # scopes for each of them
    seeds: tuple[int, ...] = (0, 1)  # seeds of the dense models pruned to equal sparsity
    cells: tuple[CellConfig, ...] = ()  # further cells, as `sweep` lists them

    def seeds_of(self, one: "CellConfig | CutConfig") -> tuple[int, ...]:
        """Returns the seeds of a cell or a cut: its own, or those of the study."""
        return self.seeds if one.seeds is None else one.seeds


@dataclasses.dataclass(frozen=True)
class CutConfig(CutRecipe):
    """A cut of the dense models, whose arrays become smaller; see `study/cuts.py`.

    The fields of `recipe.CutRecipe` and the following. What is cut is trained by the settings of
    `finetune`, and compared with the dense model and with models of smaller shapes that are trained
    from random weights for as many tokens in all. Of a model of images and text the decoder is cut,
    or by "vision_neurons" the vision tower.
    """

    sparsity: float = 0.5  # share of the units to remove
    restore: bool = True  # whether a least-squares refit makes up for what goes, before training
    smaller: tuple[float, ...] = ()  # shares of the units that the shapes trained from random
    # weights lack; empty: that of the cut
    seeds: tuple[int, ...] | None = None  # seeds of the dense models; None: those of the study

    @property
    def name(self) -> str:
        """Folder name, unique within a seed."""
        more = {**self.unusual, **self.options}
        more.pop("options", None)
        words = "".join(f"-{name}={value}" for name, value in sorted(more.items()))
        restored = "-restored" if self.restore else ""
        name = f"{self.units}-{self.criterion}-{self.sparsity:g}{restored}"
        return name + re.sub(r"[^\w.,=+-]+", "-", words)

    @property
    def unusual(self) -> dict[str, Any]:
        """Settings of the scores and of the counts that are not at their defaults, by name."""
        return _changed(self, ("options", "reduce", "multiple", "zeros"))

    def as_json(self) -> dict[str, Any]:
        """Returns what a result says of the cut: the unusual settings only where there are some."""
        names = ("units", "sparsity", "criterion", "restore", "smaller", "seeds")
        return {name: getattr(self, name) for name in names} | self.unusual


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    name: str = "experiment"  # name of the experiment, shown in its report
    model: ModelConfig = ModelConfig()  # model to train or to load
    data: DataConfig = DataConfig()  # text to train and evaluate on
    train: PhaseConfig = PhaseConfig()  # training of the dense model
    finetune: PhaseConfig = PhaseConfig(steps=500)  # training after pruning
    trajectory: TrajectoryConfig = TrajectoryConfig()  # statistics recorded during training
    prune: PruneConfig = PruneConfig()  # choice of prunable weights
    study: StudyConfig = StudyConfig()  # grid of pruning settings to compare
    cuts: tuple[CutConfig, ...] = ()  # cuts of the dense models, and when they have paid
    calibration: CalibrationConfig = CalibrationConfig()  # text for criteria that need data
    samples: SamplesConfig = SamplesConfig()  # text to generate with every model
    parallel: ParallelConfig = ParallelConfig()  # mesh and partition rules
    ledger: LedgerConfig = LedgerConfig()  # place of the run, for its carbon and water
    log_every: int = 10  # steps between logged metrics
    keep_finetuned: bool = False  # whether to save the fine-tuned parameters of every cell

    @property
    def window(self) -> int:
        """L, the length in tokens of a window to train, calibrate and evaluate on."""
        return self.model.context if self.data.window is None else self.data.window

    def without_switches(self) -> "Config":
        """Returns this config with the settings that do not change the result at their defaults.

        These are how devices divide the work, what saves memory or compile time, and the place of
        the run: a run may resume with other values of them. Only dropout's random numbers depend on
        them.
        """
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, remat=False, scan_layers=False),
            train=dataclasses.replace(self.train, accumulate=1),
            finetune=dataclasses.replace(self.finetune, accumulate=1),
            parallel=ParallelConfig(),
            ledger=LedgerConfig(),
        )

    def fingerprint(self) -> str:
        """Returns a hash of every setting, which identifies a working directory."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
