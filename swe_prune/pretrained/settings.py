"""Settings of the commands for a pretrained model: each field is an option of the command line."""

import dataclasses
from typing import Any, Literal

from swe_prune.bounds import COUNT, DAY, INDEX, NOT_NEGATIVE, PART, POSITIVE, SEED, TURNS
from swe_prune.choices import BlockRestore, Scope, Zeros
from swe_prune.config import PHASE, ComputeDtype
from swe_prune.structured.unit_scores import Reduce

CALIBRATION = "shakespeare_plays:train"
EVALUATION = "shakespeare_plays:validation[:2]"
"""Texts that need no download; the second is two plays that are not in the first."""


def option(default: Any, text: str, **more: Any) -> Any:
    """Returns a dataclass field that is an option of a command; `cli` makes the parser of them.

    Args:
        default: Value without the option; "" where the option must be given.
        text: Line of the help.
        **more: `name`, the option's name if it is not the field's; `metavar`, the name of its value
            in the help; `bound`, the range of its number; `needs`, the field of the option without
            which it has no effect.
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})


def check_numbers(settings: Any) -> None:
    """Raises InputError for a number of the settings that is out of its range."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not None and "bound" in field.metadata:
            field.metadata["bound"].check(value, f"--{field.name.replace('_', '-')}")


@dataclasses.dataclass(frozen=True)
class WeightsSettings:
    """The model and its precision."""

    model: str = option(
        "", "Hugging Face folder of safetensors, GGUF file, or package:NAME", metavar="PATH"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the weights; default: as stored"
    )
    compute_dtype: ComputeDtype = option("float32", "dtype of the computation")
    prefix: str | None = option(
        None, "prefix of the names of the tensors, such as _orig_mod., which is removed"
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings(WeightsSettings):
    """A model that reads text."""

    tokenizer: str | None = option(
        None,
        "tokenizer.json, folder or GGUF file of another tokenizer; default: the model's own",
        metavar="PATH",
    )


@dataclasses.dataclass(frozen=True)
class ChoiceSettings:
    """The weights that may be pruned."""

    include: tuple[str, ...] = option(
        (), "rule (regular expression) of weights to choose; may be given again", metavar="RULE"
    )
    exclude: tuple[str, ...] = option(
        (), "rule of weights to leave dense; may be given again", metavar="RULE"
    )
    blocks: str | None = option(
        None, "range of blocks as a Python slice, such as 0:15 or -4:", metavar="START:STOP"
    )


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The text to calibrate on."""

    calibration: str = option(
        CALIBRATION, "text to calibrate on: a file, or DATASET:SPLIT", metavar="TEXT"
    )
    calibration_windows: int = option(128, "number of random windows to calibrate on", bound=COUNT)
    calibration_window: int | None = option(
        None,
        "tokens per calibration window; default: the model's context, at most 2048",
        bound=COUNT,
    )
    calibration_batch: int = option(8, "calibration windows per batch", bound=COUNT)
    seed: int = option(0, "seed of the calibration windows and of random criteria", bound=SEED)


@dataclasses.dataclass(frozen=True)
class JudgingSettings:
    """The text on which a model is evaluated, and how."""

    evaluation: str = option(
        EVALUATION, "text to evaluate on: a file, or DATASET:SPLIT", metavar="TEXT"
    )
    protocol: str = option("wikitext2", "perplexity protocol, see evaluation.protocols")
    window: int | None = option(None, "tokens per window; default: the protocol's", bound=COUNT)
    eval_windows: int | None = option(
        None, "number of leading windows to use; default: all", bound=COUNT
    )
    eval_batch: int = option(4, "windows per batch", bound=COUNT)
    prompts: tuple[str, ...] = option(
        ("Once upon a time",), "text to continue; may be given again", name="prompt"
    )
    new_tokens: int = option(40, "number of tokens to generate", bound=COUNT)
    at_most: float | None = option(
        None,
        "largest perplexity of the dense model for which to go on; default: any",
        bound=POSITIVE,
    )


@dataclasses.dataclass(frozen=True)
class RequestSettings(ModelSettings, ChoiceSettings, CalibrationSettings):
    """What is to be pruned, and how: `plan --model`."""

    criterion: str | None = option(
        None,
        "registered criterion, or sparsegpt, admm or wanda_variant; default: the best measured",
    )
    sparsity: float | None = option(None, "fraction of the prunable weights to remove, in [0, 1)")
    pattern: str | None = option(None, "shape of what is removed, such as 2:4 or row")
    scope: Scope | None = option(
        None, "where the sparsity is met; default: tensor, without a criterion global"
    )
    max_sparsity: float | None = option(
        None, "largest fraction that any tensor loses, with scope global"
    )
    zeros: Zeros = option("keep", "weights that are 0 already: removed, or free")
    restore: Literal["none", BlockRestore] | None = option(
        None, "update of the weights that stay; default: none, without a criterion admm"
    )
    allocation: str | None = option(None, "rule for the sparsity of each tensor, such as owl")
    options: tuple[str, ...] = option(
        (), "NAME=VALUE of the criterion; may be given again", name="option"
    )
    at_once: bool = option(
        False, "scores of the whole dense model at once, instead of block after block"
    )
    offload: bool = option(False, "weights and activations in host memory but for one block")


@dataclasses.dataclass(frozen=True)
class OutSettings:
    """The folder that a command writes."""

    out: str = option("", "folder to write, which must not exist", metavar="DIR")
    compress: bool = option(
        False, "weights without their zeros, in a smaller file that transformers cannot read"
    )


@dataclasses.dataclass(frozen=True)
class PruneSettings(OutSettings, RequestSettings, JudgingSettings):
    """`prune --model`."""


@dataclasses.dataclass(frozen=True)
class CutSettings(OutSettings, ModelSettings, CalibrationSettings, JudgingSettings):
    """`cut --model`."""

    units: Literal["neurons", "heads", "query_heads", "layers"] = option(
        "", "what is removed as a whole"
    )
    criterion: str = option(
        "", "registered criterion of weights, or one of units, such as activation_norm"
    )
    sparsity: float | None = option(None, "fraction of the units to remove, in [0, 1)")
    budget: str | None = option(
        None,
        "limit of the cut model, in place of a sparsity: params=N, bytes=N of weights, flops=N or "
        "latency=SECONDS of decoding one token",
        metavar="NAME=NUMBER",
    )
    reduce: Reduce = option("l2", "how the scores of the weights of a unit become one")
    restore: bool = option(
        False, "least-squares refit of the projections that read what goes, to make up for it"
    )
    multiple: int | None = option(
        None, "number of which the kept units are a multiple; default: 8 of neurons, 1 of others"
    )
    options: tuple[str, ...] = option(
        (), "NAME=VALUE of the criterion; may be given again", name="option"
    )


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(OutSettings, ModelSettings, ChoiceSettings, JudgingSettings):
    """`finetune --model`."""

    text: str = option(CALIBRATION, "text to train on: a file, or DATASET:SPLIT", metavar="TEXT")
    track: bool = option(False, "statistics of the trajectory, for prune --criterion=swe")
    track_every: int = option(
        5, "steps between snapshots of the trajectory", bound=COUNT, needs="track"
    )
    measures: tuple[str, ...] = option(
        ("late_mean",),
        "measure of the trajectory; may be given again",
        name="measure",
        needs="track",
    )
    steps: int = option(100, "number of training steps", bound=COUNT)
    batch: int = option(8, "windows per step", bound=COUNT)
    accumulate: int = option(1, "number of microbatches per step", bound=COUNT)
    train_window: int = option(512, "tokens per training window", bound=COUNT)
    learning_rate: float = option(2e-5, "peak learning rate", bound=PHASE["learning_rate"])
    warmup: int = option(10, "number of warm-up steps", bound=INDEX)
    weight_decay: float = option(0.0, "weight decay of AdamW", bound=PHASE["weight_decay"])
    checkpoint_every: int = option(
        50, "steps between checkpoints; a killed run resumes from one", bound=COUNT
    )
    remat: bool = option(False, "rematerialization of activations: less memory, more time")
    zeros: Zeros = option("keep", "zeros of a model without a mask file: held at 0, or free")
    masks: Literal["check", "apply", "ignore"] = option(
        "check",
        "mask file of the model: refused where its weights are not 0 already, applied to them, or "
        "not read",
    )
    lora_rank: int | None = option(
        None, "rank of the adapters; default: the weights are trained", bound=COUNT
    )
    lora_alpha: float | None = option(
        None, "scale of the adapters; default: twice the rank", bound=POSITIVE, needs="lora_rank"
    )
    teacher: str | None = option(None, "dense model to distill from", metavar="PATH")
    teacher_prefix: str | None = option(
        None, "prefix of the names of the teacher's tensors", metavar="PREFIX", needs="teacher"
    )
    distillation: float = option(
        0.5, "weight of the distance to the teacher in the loss", bound=PART, needs="teacher"
    )
    final_distillation: float | None = option(
        None,
        "the same weight at the last step, approached linearly; default: it stays",
        bound=PART,
        needs="teacher",
    )
    temperature: float = option(
        1.0, "temperature of the distance to the teacher", bound=POSITIVE, needs="teacher"
    )
    features: float = option(
        0.0,
        "weight of the distance between the outputs of blocks in the loss",
        bound=NOT_NEGATIVE,
        needs="teacher",
    )
    second_evaluation: str | None = option(
        None,
        "text of another kind, a file or DATASET:SPLIT, on which the model must not get worse; it "
        "is said if it does",
        metavar="TEXT",
    )
    seed: int = option(0, "seed of the order of the text", bound=SEED)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(ModelSettings, JudgingSettings):
    """`evaluate --model`."""

    dense: str | None = option(
        None, "model that it was pruned from, to compare with", metavar="PATH"
    )
    dense_prefix: str | None = option(
        None, "prefix of the names of the dense model's tensors", metavar="PREFIX", needs="dense"
    )
    at_most: float | None = option(
        None,
        "largest perplexity of the dense model for which to go on; default: any",
        bound=POSITIVE,
        needs="dense",
    )


@dataclasses.dataclass(frozen=True)
class BenchSettings(WeightsSettings):
    """`bench --model`."""

    against: str | None = option(
        None, "model to time in the same run, the base of the ratios", metavar="PATH"
    )
    against_prefix: str | None = option(
        None, "prefix of the names of the other model's tensors", metavar="PREFIX", needs="against"
    )
    batch: tuple[int, ...] = option((1, 32), "number of texts at once; may be given again")
    prompt_tokens: int = option(128, "tokens of each prompt")
    new_tokens: int = option(32, "tokens of each text to decode after the first")
    runs: int = option(50, "number of runs of each model that count", bound=TURNS)
    warmup: int = option(3, "number of runs before them", bound=TURNS)
    energy_windows: int | None = option(
        None,
        "windows of each model to measure energy in, 0: none; default: the runs, at most 20",
        bound=TURNS,
    )
    energy_seconds: float | None = option(
        None,
        "least seconds of a window; default: 5 with a counter of the hardware, else one run",
        bound=DAY,
    )
    json: bool = option(False, "JSON output with the seconds of every run, for programs to read")


COMMANDS = {
    "plan": RequestSettings,
    "prune": PruneSettings,
    "cut": CutSettings,
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
    "bench": BenchSettings,
}
