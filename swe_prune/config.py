"""The settings of an experiment as frozen dataclasses; `ml_collections.ConfigDict` stops here.

A config file defines `get_config()` and returns a ConfigDict of plain values. `from_dict` turns it
into a `Config` and refuses unknown keys and wrong values, so a typo costs a sentence and not a run.
Values from files and from command lines go through one converter, `convert`. Durations may be given
as steps (`500`), as a percentage of the phase (`"5%"`) or in passes over the training text
(`"2 epochs"`); `to_steps` converts them.
"""

import ast
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from swe_prune import importance
from swe_prune.bounds import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Bound
from swe_prune.errors import InputError, check_choice, did_you_mean
from swe_prune.ledger import Factors, of_country
from swe_prune.recipe import Recipe
from swe_prune.recipe import check as check_recipe

Activation = Literal["gelu", "gelu_exact", "quick_gelu", "relu", "silu", "tanh"]
Norm = Literal["layer", "rms"]
Norms = Literal["pre", "post", "sandwich"]
HeadNorm = Literal["none", "head", "each_head", "projection"]
Residual = Literal["sequential", "parallel", "parallel_one_norm"]
Positions = Literal["learned", "rope", "none"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]
ComputeDtype = Literal["float32", "bfloat16"]
Values = Literal["final", "late_mean"]
Index = Literal["window", "absolute"]
Memory = Literal["device", "host"]
Schedule = Literal["one_shot", "cubic", "iterative", "rigl", "set", "ste", "movement", "elsa"]
Recovery = Literal["none", "finetune", "rewarm", "rewind", "rewind_weights"]
Units = Literal["neurons", "heads", "query_heads", "layers"]
"""Choices of the settings below; `convert` and `check_choices` refuse every other value."""

Duration = int | str
"""Steps as an int, or a string `"5%"` or `"2 epochs"`."""

ONE_SHOT: Schedule = "one_shot"
"""The schedule that prunes before the recovery; all others prune during it."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their scaling to longer texts; see `models/rope.py`."""

    theta: float = 10000.0  # base of the rotation frequencies
    share: float = 1.0  # fraction of a head's width that is rotated
    scaling: RopeScaling = "none"  # method that extends the positions to a longer context
    factor: float | None = None  # scaling factor; None: context / original_context
    original_context: int | None = None  # context before scaling; None: context
    low_frequency: float = 1.0  # low-frequency factor of "llama3"
    high_frequency: float = 4.0  # high-frequency factor of "llama3"
    beta_fast: float = 32.0  # rotations above which "yarn" leaves a frequency unchanged
    beta_slow: float = 1.0  # rotations below which "yarn" interpolates a frequency fully
    truncate: bool = True  # whether "yarn" rounds the bounds of its ramp to whole frequencies
    mscale: float | None = None  # numerator of the attention scale of "yarn"; needs mscale_all
    mscale_all: float | None = None  # denominator of the attention scale of "yarn"; needs mscale
    attention_factor: float | None = None  # attention scale of "yarn" and "longrope"; None: derived
    short_factors: tuple[float, ...] = ()  # one divisor per frequency of "longrope", short texts
    long_factors: tuple[float, ...] = ()  # one divisor per frequency of "longrope", long texts


PER_LAYER = ("sliding", "rotary", "layer_hidden", "layer_heads", "layer_kv_heads")
"""Fields of `ModelConfig` with an entry for each layer, or none."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower of a model of images and text; see `models/vision.py`.

    The sizes are those of CLIP ViT-L/14-336, the tower of Phi-3-vision.
    """

    layers: int = 24  # number of Transformer blocks; the last one feeds no decoder
    heads: int = 16  # number of heads per layer
    width: int = 1024  # width of the residual stream
    hidden: int = 4096  # width of the MLP
    image: int = 336  # side of a crop in pixels, a multiple of 2 * patch
    patch: int = 14  # side of a patch in pixels
    crops: int = 16  # largest number of crops of an image, next to its global view
    activation: Activation = "quick_gelu"  # nonlinearity of the MLP
    norm_epsilon: float = 1e-5  # constant added to the variance in a norm

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return self.image // self.patch

    @property
    def cells(self) -> int:
        """Image tokens along one side of a crop, each of 2 x 2 patches."""
        return self.side // 2

    def tokens(self, rows: int, columns: int) -> int:
        """Returns the number of tokens of an image with a grid of crops.

        >>> VisionConfig().tokens(4, 4), VisionConfig().tokens(1, 3)
        (2509, 601)
        """
        own = (rows * columns + 1) * self.cells**2
        return own + 1 + (rows + 1) * self.cells  # and a separator after each row


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer of one of many families, from GPT-2 on; see `models/gpt.py`."""

    layers: int = 6  # number of Transformer blocks
    heads: int = 6  # number of query heads per layer
    width: int = 384  # width of the residual stream
    context: int = 256  # largest number of tokens the model attends to
    vocab_size: int | None = None  # number of token ids; None: the size of the tokenizer
    hidden_ratio: int = 4  # width of the MLP as a multiple of width, where hidden is None
    activation: Activation = "gelu"  # nonlinearity of the MLP; "gelu": its tanh form, as in GPT-2
    use_bias: bool = False  # whether dense layers and layer norms have a bias
    qkv_bias: bool | None = None  # bias of queries, keys and values; None: use_bias
    out_bias: bool | None = None  # bias of the attention output; None: use_bias
    mlp_bias: bool | None = None  # bias of the MLP; None: use_bias
    head_bias: bool | None = None  # bias of an untied output head; None: use_bias
    tied_head: bool = True  # whether the output head is the transposed embedding
    dropout: float = 0.0  # dropout rate of training, in [0, 1)
    dtype: ComputeDtype = "float32"  # dtype of the computation; parameters are float32
    remat: bool = False  # rematerialization of each block in the backward pass: less memory
    scan_layers: bool = False  # a scan over one compiled block: deep models compile sooner
    hidden: int | None = None  # width of the MLP; None: hidden_ratio * width
    kv_heads: int | None = None  # number of key-value heads, shared by query groups; None: heads
    head_width: int | None = None  # width of one head; None: width / heads
    gated: bool = False  # gated MLP: down(activation(gate(x)) * up(x))
    norm: Norm = "layer"  # normalization: LayerNorm or RMSNorm
    norm_epsilon: float = 1e-5  # constant added to the variance in a norm
    norm_plus_one: bool = False  # whether RMSNorm multiplies by 1 + scale, as in Gemma
    norms: Norms = "pre"  # norms on the inputs of attention and MLP, on their outputs, or on both
    head_norm: HeadNorm = "none"  # norm of queries and keys: within each head, with one scale for
    # all heads ("head") or one for each ("each_head"), or over all heads together ("projection")
    residual: Residual = "sequential"  # whether the MLP reads what attention added, or both read
    # the input of the block ("parallel"), or both read it through the same norm
    embedding_scale: float = 1.0  # factor of the token embeddings
    residual_scale: float = 1.0  # factor of what attention and MLP add to the residual stream
    attention_scale: float | None = None  # factor of the attention scores; None: 1 / sqrt(width of
    # one head)
    attention_cap: float | None = None  # cap of the attention scores: cap * tanh(score / cap)
    logit_divisor: float = 1.0  # number that the logits are divided by
    logit_cap: float | None = None  # cap of the logits: cap * tanh(logit / cap)
    positions: Positions = "learned"  # position encoding: learned embeddings, rotary, or none
    position_offset: int = 0  # rows of the learned embeddings before that of position 0
    rope: RopeConfig = RopeConfig()  # settings of rotary positions
    rotary: tuple[bool, ...] = ()  # which layers have rotary positions; empty: all
    window: int | None = None  # length of the attention window, the token included; None: all
    sliding: tuple[bool, ...] = ()  # which layers have the window; empty: all
    sliding_theta: float | None = None  # theta of the layers with the window, without scaling;
    # None: as the other layers
    layer_hidden: tuple[int, ...] = ()  # hidden of each layer, after a cut; empty: all alike
    layer_heads: tuple[int, ...] = ()  # heads of each layer, after a cut; empty: all alike
    layer_kv_heads: tuple[int, ...] = ()  # kv_heads of each layer, given with layer_heads
    experts: int | None = None  # number of experts in each MLP; None: one MLP for all tokens
    experts_per_token: int = 2  # number of experts that each token is routed to
    causal: bool = True  # whether a token attends to earlier tokens only
    vision: VisionConfig | None = None  # vision tower of Phi-3-vision; None: text only
    pretrained: str | None = None  # pretrained model whose sizes replace the ones above: a
    # Hugging Face folder, a GGUF file, or "package:NAME" for the GGUF file in an installed package;
    # None: random initialization
    prefix: str | None = None  # prefix of the names of the pretrained model's tensors, such as
    # "_orig_mod.", which is removed
    tokenizer: str | None = None  # tokenizer.json, folder or GGUF file of another tokenizer; None:
    # the pretrained model's own

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

    def of_layer(self, layer: int) -> "ModelConfig":
        """Returns the config of one layer, with a window and rotary positions only if it has them.

        Layers that are alike have equal configs. `sliding_theta` is None where it does not apply.
        """
        changes: dict[str, Any] = dict.fromkeys(PER_LAYER, ())
        if self.layer_hidden:
            changes["hidden"] = self.layer_hidden[layer]
        if self.layer_heads:
            changes |= {
                "heads": self.layer_heads[layer],
                "kv_heads": self.layer_kv_heads[layer],
                "head_width": self.head_size,
            }
        if self.sliding and not self.sliding[layer]:
            changes |= {"window": None, "sliding_theta": None}
        if self.rotary and not self.rotary[layer]:
            changes["positions"] = "none"
        return dataclasses.replace(self, **changes)


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
    scopes: tuple[str, ...] = ("tensor", "global")  # scopes for each of them
    seeds: tuple[int, ...] = (0, 1)  # seeds of the dense models pruned to equal sparsity
    cells: tuple[CellConfig, ...] = ()  # further cells, as `sweep` lists them


@dataclasses.dataclass(frozen=True)
class CutConfig:
    """A cut of the dense models, whose arrays become smaller; see `study/cuts.py`.

    What is cut is trained by the settings of `finetune`, and compared with the dense model and with
    models of smaller shapes that are trained from random weights for as many tokens in all.
    """

    units: Units = "neurons"  # what is removed as a whole
    sparsity: float = 0.5  # share of the units to remove
    criterion: str = "input_norm_product"  # criterion of weights, or of the units' activations
    restore: bool = True  # whether a least-squares refit makes up for what goes, before training
    smaller: tuple[float, ...] = ()  # shares of the units that the shapes trained from random
    # weights lack; empty: that of the cut
    seeds: tuple[int, ...] | None = None  # seeds of the dense models; None: those of the study

    @property
    def name(self) -> str:
        """Folder name, unique within a seed."""
        restored = "-restored" if self.restore else ""
        return f"{self.units}-{self.criterion}-{self.sparsity:g}{restored}"

    @property
    def recipe(self) -> Recipe | None:
        """Request of a criterion of weights; None of one of activations."""
        named = self.criterion in importance.names()
        return Recipe(self.criterion, sparsity=self.sparsity) if named else None


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
        duration: Number of steps, `"p%"` of `total`, or `"n epochs"` of `epoch` steps each.
        total: Number of steps of the phase that the duration belongs to.
        epoch: Number of steps of one pass over the training text.

    Raises:
        InputError: The duration is malformed, or its unit has no length here.

    >>> to_steps("5%", total=2000), to_steps("2 epochs", epoch=150), to_steps(7)
    (100, 300, 7)
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|epochs?|steps?)\s*", str(duration))
    if not match:
        raise InputError(
            "a duration must be a number of steps, 'p%' or 'n epochs', "
            f"got {duration!r}; write e.g. 500"
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
        InputError: A key is unknown, or a value does not fit its type; named by its dotted path.
    """
    types_of = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in types_of:
            raise InputError(f"{path} has no setting {key!r}; {did_you_mean(key, types_of)}")
        kwargs[key] = convert(value, types_of[key], f"{path}.{key}")
    return cls(**kwargs)


class Text(str):
    """Text from a command line, which `convert` reads as the type it is to become."""


def literal(text: str) -> Any:
    """Returns the Python value that a text spells, or else the text.

    >>> literal("3"), literal("1e-3"), literal("inf"), literal("[1, None]"), literal("5%")
    (3, 0.001, inf, [1, None], '5%')
    """
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return str(text)


def convert(value: Any, wanted: Any, what: str) -> Any:
    """Returns a value as the type of its setting.

    Args:
        value: Python value, or `Text`.
        wanted: Type hint of the setting.
        what: Name of the setting, for the sentence.

    Raises:
        InputError: The value does not fit the type.

    >>> convert(Text("3"), int | None, "--steps"), convert([1, 2.5], tuple[float, ...], "rates")
    (3, (1.0, 2.5))
    """
    if isinstance(value, Text):
        return _read(value, wanted, what)
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, typing.cast(type, wanted)):
            return value
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{what} is a group of settings, got {value!r}; set its members")
        return from_dict(value, typing.cast(type, wanted), what)
    if choices := _choices(wanted):
        check_choice(value, choices, what)
        return value
    for one in _alternatives(wanted):
        origin = typing.get_origin(one) or one
        grouped: Any = one
        if dataclasses.is_dataclass(grouped) and isinstance(value, Mapping | ConfigDict):
            return from_dict(value, typing.cast(type, grouped), what)
        if origin is Mapping:
            if isinstance(value, Mapping):
                return dict(value)
        elif origin is tuple:
            if isinstance(value, Sequence) and not isinstance(value, str):
                member = typing.get_args(one)[0]
                return tuple(convert(v, member, f"{what}[{i}]") for i, v in enumerate(value))
        elif one is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, one) and not (isinstance(value, bool) and one is int):
            return value
    kinds = [typing.get_origin(one) or one for one in _alternatives(wanted)]
    names = [_KINDS.get(kind, str(kind)) for kind in kinds]
    raise InputError(f"{what} must be {' or '.join(names)}, got {value!r}")


_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple: "a list",
    Mapping: "a dict",
    types.NoneType: "None",
}


def _read(text: Text, wanted: Any, what: str) -> Any:
    try:
        return convert(literal(text), wanted, what)
    except InputError:
        kinds = set(_alternatives(wanted))
        if str in kinds and not kinds & {int, float, bool}:
            return str(text)  # a name such as "123", which spells a number
        raise


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    united = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return typing.get_args(wanted) if united else (wanted,)


def _choices(wanted: Any) -> tuple[str | None, ...]:
    """Returns the values of a Literal, and None where it may be None; () for other types."""
    found = [one for one in _alternatives(wanted) if typing.get_origin(one) is Literal]
    values = tuple(value for one in found for value in typing.get_args(one))
    return (*values, None) if values and types.NoneType in _alternatives(wanted) else values


def check_choices(settings: Any, path: str = "config") -> None:
    """Checks every choice in a dataclass of settings and in the groups inside it.

    For settings that were made without `from_dict`, which has checked them already.

    Raises:
        InputError: A setting is not one of its choices.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if choices := _choices(hint):
            check_choice(value, choices, f"{path}.{name}")
        members = enumerate(value) if isinstance(value, tuple) else ()
        for suffix, one in (("", value), *((f"[{i}]", member) for i, member in members)):
            if dataclasses.is_dataclass(one):
                check_choices(one, f"{path}.{name}{suffix}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the Config that the file's `get_config()` gives, with `a.b=value` overrides applied.

    Raises:
        InputError: The file gives no config (see `read`), a key is unknown, or a value cannot be
            used.
    """
    values = read(path).to_dict()
    for override in overrides:
        _apply_override(values, override)
    config = from_dict(values)
    validate(config)
    return config


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Loads a file without bytecode, which passes for the file when both are of one second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def read(path: str | Path, start: str | Path | None = None) -> ConfigDict:
    """Returns what the file's `get_config()` gives, for another config file to start from.

        config = read("../shakespeare_char.py", __file__)

    Args:
        path: Path of a Python file.
        start: File that a relative path is relative to; None: the working directory.

    Raises:
        InputError: There is no such file, it fails to run, or its `get_config` is missing, fails,
            or does not return a ConfigDict.
    """
    path = Path(path) if start is None else Path(start).parent / path
    if not path.is_file():
        raise InputError(
            f"config {str(path)!r} is not a file; give the path of a get_config() file"
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {str(path)!r} is not Python; give a .py file with get_config()")
    spec.loader = _AsItIs(spec.name, str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise InputError(
            f"config {str(path)!r} fails to run: {type(error).__name__}: {error}; fix the file"
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
            raise InputError(f"override {override!r}: {group!r} is not a group of settings")
    values[leaf] = Text(text)


PHASE: dict[str, Bound] = {
    **dict.fromkeys(("learning_rate", "clip"), POSITIVE),
    **dict.fromkeys(("final_learning_rate", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("b1", "b2"), SHARE),
    **dict.fromkeys(("accumulate", "keep_latest", "stop_after_skipped"), COUNT),
}
"""Range of each number of a phase."""

_COUNTS = """
model.layers model.heads model.width model.context model.hidden_ratio model.hidden model.kv_heads
model.head_width model.window data.batch data.eval_windows data.eval_batch data.window
trajectory.window_start calibration.windows calibration.batch samples.tokens parallel.data
parallel.fsdp parallel.tensor log_every ledger.windows ledger.batch ledger.prompt ledger.new_tokens
"""
_BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(_COUNTS.split(), COUNT),
    **{f"{phase}.{key}": one for phase in ("train", "finetune") for key, one in PHASE.items()},
    "model.dropout": SHARE,
    "trajectory.power": NOT_NEGATIVE,
    "trajectory.vote_rate": NOT_NEGATIVE,
    "calibration.seed": SEED,
    "study.seeds": SEED,
    "study.std_seeds": SEED,
    "study.std_rates": NOT_NEGATIVE,
    "study.sparsities": SHARE,
    "ledger.window_seconds": NOT_NEGATIVE,
    "ledger.margin": NOT_NEGATIVE,
}
"""Range of each number, or of each member of a list; None is left to the setting's type."""


def validate(config: Config) -> None:
    """Checks single values and pairs of them; registries check their own names.

    Raises:
        InputError: The first setting that cannot be used, and what it must be.
    """

    def must(ok: bool, key: str, rule: str, value: Any) -> None:
        if not ok:
            raise InputError(f"config.{key} must be {rule}, got {value!r}")

    # Each setting by itself.
    check_choices(config)
    for key, bound in _BOUNDS.items():
        value = operator.attrgetter(key)(config)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                bound.check(one, f"config.{key}")
    model, data, study = config.model, config.data, config.study
    fraction = data.validation_fraction
    must(0 < fraction < 1, "data.validation_fraction", "between 0 and 1", fraction)
    cadence = config.train.checkpoint_every
    rule = "above 0, because pruning starts from the dense checkpoint"
    must(cadence != 0, "train.checkpoint_every", rule, cadence)

    # Settings that depend on others.
    divided = model.head_width is not None or model.width % model.heads == 0
    must(divided, "model.width", f"a multiple of model.heads = {model.heads}", model.width)
    rule = f"a multiple of data.eval_batch = {data.eval_batch}"
    must(data.eval_windows % data.eval_batch == 0, "data.eval_windows", rule, data.eval_windows)
    for name, phase in (("train", config.train), ("finetune", config.finetune)):
        divides = phase.accumulate >= 1 and data.batch % phase.accumulate == 0
        rule = f"a divisor of data.batch = {data.batch}"
        must(divides, f"{name}.accumulate", rule, phase.accumulate)

    # The study.
    for scope in study.scopes:
        check_choice(scope, ("tensor", "global", "row"), "config.study.scopes")
    for number, cell in enumerate(study.cells):
        _validate_cell(cell, f"study.cells[{number}]", must)
    for number, cut in enumerate(config.cuts):
        path = f"cuts[{number}]"
        for name, share in (("sparsity", cut.sparsity), *(("smaller", one) for one in cut.smaller)):
            SHARE.check(share, f"config.{path}.{name}")
        rule = "False, since whole layers have no projection to refit"
        must(not (cut.restore and cut.units == "layers"), f"{path}.restore", rule, cut.restore)
        rule = "at least one seed, or None for those of the study"
        must(cut.seeds is None or len(cut.seeds) > 0, f"{path}.seeds", rule, cut.seeds)


def _validate_cell(cell: CellConfig, path: str, must: Callable[..., None]) -> None:
    """Checks the recipe of a cell, then what its schedule and recovery allow."""
    try:
        check_recipe(cell.recipe(0))
    except InputError as error:
        raise InputError(f"config.{path}: {error}") from error
    must(cell.seed == 0, f"{path}.seed", f"left out; give seeds = ({cell.seed},)", cell.seed)
    rule = "at least one seed, or None for those of the study"
    must(cell.seeds is None or len(cell.seeds) > 0, f"{path}.seeds", rule, cell.seeds)
    if cell.schedule == ONE_SHOT:
        return
    # All other schedules prune during the recovery.
    schedule = cell.schedule
    rule = f"other than 'none', since schedule {schedule!r} prunes during it"
    must(cell.recovery != "none", f"{path}.recovery", rule, cell.recovery)
    at_once = cell.rate is not None or cell.method is not None or cell.n_of_m
    at_once = at_once or cell.restore is not None
    rule = f"{ONE_SHOT!r}, since a rate, a restoration, a method or an n:m pattern prunes at once"
    must(not at_once, f"{path}.schedule", rule, schedule)
    if schedule in ("cubic", "iterative"):
        return
    rule = f"None, since schedule {schedule!r} prunes single weights"
    must(cell.pattern is None, f"{path}.pattern", rule, cell.pattern)
    ranked_by = {"ste": "magnitude", "elsa": "magnitude", "movement": "movement"}.get(schedule)
    if ranked_by is not None:
        rule = f"{ranked_by!r}, by which schedule {schedule!r} ranks"
        must(cell.criterion == ranked_by, f"{path}.criterion", rule, cell.criterion)
        rule = f"None, since schedule {schedule!r} distributes the sparsity by scope"
        must(cell.allocation is None, f"{path}.allocation", rule, cell.allocation)
