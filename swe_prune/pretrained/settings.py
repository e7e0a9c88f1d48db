"""What the commands of a pretrained model may be told: each field is an option of theirs."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from swe_prune.errors import InputError, did_you_mean

CALIBRATION = "shakespeare_plays:train"
EVALUATION = "shakespeare_plays:validation[:2]"
"""Texts that need no download: of the second, two plays, the first has nothing."""


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model, in which precision."""

    model: str = _option(
        "", "a Hugging Face folder of safetensors, a GGUF file, or package:NAME", metavar="PATH"
    )
    dtype: str | None = _option(
        None, "of the weights: float32, bfloat16 or float16; as stored without it"
    )
    compute_dtype: str = _option("float32", "of the computation: float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class JudgingSettings:
    """On which text a model is judged, and how."""

    evaluation: str = _option(EVALUATION, "text: a file, or DATASET:SPLIT", metavar="TEXT")
    protocol: str = _option("wikitext2", "of the perplexity, see evaluation.protocols")
    window: int | None = _option(None, "tokens of a window, in place of the protocol's")
    eval_windows: int | None = _option(None, "only the first so many windows")
    eval_batch: int = _option(4, "windows at a time")
    prompts: tuple[str, ...] = _option(
        ("Once upon a time",), "what the model goes on from; may be given again", name="prompt"
    )
    new_tokens: int = _option(40, "how far it goes on")
    at_most: float | None = _option(
        None, "a perplexity that the dense model must reach, or nothing is pruned"
    )


@dataclasses.dataclass(frozen=True)
class PruneSettings(ModelSettings, JudgingSettings):
    """`prune --model`."""

    out: str = _option("", "the folder to write, which must not exist", metavar="DIR")
    criterion: str = _option("", "a registered name, or sparsegpt or wanda_variant")
    sparsity: float | None = _option(None, "share of the prunable weights to remove, in [0, 1)")
    pattern: str | None = _option(None, "the shape of what goes, such as 2:4 or row")
    scope: str = _option("tensor", "where the sparsity is met: tensor, global or row")
    allocation: str | None = _option(None, "how much of each tensor, such as owl")
    options: tuple[str, ...] = _option(
        (), "NAME=VALUE of the criterion; may be given again", name="option"
    )
    at_once: bool = _option(
        False, "score the whole dense model at once instead of block after block"
    )
    calibration: str = _option(CALIBRATION, "text: a file, or DATASET:SPLIT", metavar="TEXT")
    calibration_windows: int = _option(128, "random windows of it")
    calibration_window: int | None = _option(
        None, "tokens of one; the model's context, at most 2048, without it"
    )
    calibration_batch: int = _option(8, "windows at a time")
    offload: bool = _option(False, "keep weights and activations in host memory but for one block")
    seed: int = _option(0, "of the calibration windows and of what is random")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(ModelSettings, JudgingSettings):
    """`finetune --model`."""

    out: str = _option("", "the folder to write, which must not exist", metavar="DIR")
    text: str = _option(CALIBRATION, "to train on: a file, or DATASET:SPLIT", metavar="TEXT")
    track: bool = _option(False, "keep the trajectory, for prune --criterion=swe")
    track_every: int = _option(5, "steps between its snapshots")
    measures: tuple[str, ...] = _option(
        ("late_mean",), "what is kept of it; may be given again", name="measure"
    )
    steps: int = _option(100, "of AdamW")
    batch: int = _option(8, "windows of a step")
    accumulate: int = _option(1, "parts of a batch, one after another")
    train_window: int = _option(512, "tokens of a window")
    learning_rate: float = _option(2e-5, "its peak")
    warmup: int = _option(10, "steps")
    weight_decay: float = _option(0.0, "of AdamW")
    checkpoint_every: int = _option(50, "steps; a killed run goes on from the last")
    remat: bool = _option(False, "keep no activations: less memory, more time")
    lora_rank: int | None = _option(None, "train adapters of this rank instead of the weights")
    lora_alpha: float | None = _option(None, "their scale; twice the rank without it")
    teacher: str | None = _option(None, "the dense model, to be imitated", metavar="PATH")
    distillation: float = _option(0.5, "share of the loss that is the distance to the teacher")
    temperature: float = _option(1.0, "of that distance")
    seed: int = _option(0, "of the order of the text")


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(ModelSettings, JudgingSettings):
    """`evaluate --model`."""

    dense: str | None = _option(
        None, "the model it was pruned from, to compare with", metavar="PATH"
    )


COMMANDS = {"prune": PruneSettings, "finetune": FinetuneSettings, "evaluate": EvaluateSettings}


def wanted(arguments: Sequence[str]) -> bool:
    """Returns whether a command line is about a pretrained model: a command here, and --model."""
    given = any(one == "--model" or one.startswith("--model=") for one in arguments[1:])
    return bool(arguments) and arguments[0] in COMMANDS and given


def parse(arguments: Sequence[str]) -> Any:
    """Returns the settings of a command line.

    Raises:
        InputError: an unknown or missing option, or a value that is none.
    """
    command = arguments[0]
    cls = COMMANDS[command]
    parser = _Parser(
        prog=f"python -m swe_prune {command}",
        description=f"{command} a pretrained language model",
        allow_abbrev=False,
    )
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag = "--" + field.metadata.get("name", field.name).replace("_", "-")
        hint, text = types[field.name], field.metadata["help"]
        if hint is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", help=text)
            continue
        several = typing.get_origin(hint) is tuple
        kinds = [one for one in (typing.get_args(hint) or (hint,)) if one not in (type(None), ...)]
        shown = "" if field.default in ("", None, ()) else f" ({field.default})"
        parser.add_argument(
            flag,
            dest=field.name,
            type=kinds[0],
            action="append" if several else "store",
            metavar=field.metadata.get("metavar", kinds[0].__name__.upper()),
            help=text + shown,
            default=argparse.SUPPRESS,
        )
    found = vars(parser.parse_args(list(arguments[1:])))
    found = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
    }
    settings = cls(**found)
    for field in dataclasses.fields(cls):
        if field.default == "" and not getattr(settings, field.name):
            raise InputError(f"{command} --model needs --{field.name}; give it")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        name = message.removeprefix("unrecognized arguments: ").split()[0]
        if name.startswith("--"):
            known = [option for action in self._actions for option in action.option_strings]
            name = name.split("=")[0]
            raise InputError(f"{self.prog} has no {name}; {did_you_mean(name, known)}")
        raise InputError(f"{self.prog}: {message}")


def number(text: str) -> Any:
    """Returns the int, the float or else the text of an option's value."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
