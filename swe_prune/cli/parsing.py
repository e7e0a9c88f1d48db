"""Command lines: the options of each command, and what a line asks for.

Each command has a dataclass of settings, whose fields are its options: those of an experiment are
here, those for a pretrained model in `pretrained.settings`. One parser is made of both.
"""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from swe_prune import config as config_lib
from swe_prune.errors import InputError, check_choice, suggestion
from swe_prune.pretrained import settings as pretrained
from swe_prune.pretrained.settings import option
from swe_prune.version import __version__

PROGRAM = "python -m swe_prune"


@dataclasses.dataclass(frozen=True)
class ExperimentSettings:
    """The config of an experiment."""

    config: str | None = option(
        None, "get_config() file; default: the config that made the workdir", metavar="FILE"
    )


@dataclasses.dataclass(frozen=True)
class PlanSettings(ExperimentSettings):
    """`plan`."""

    workdir: str | None = option(None, "folder or bucket of a run to continue", metavar="DIR")
    devices: int | None = option(
        None,
        "number of devices, which need not be there, to compile the train step for; prints what "
        "each would hold and receive",
        metavar="N",
    )
    json: bool = option(False, "JSON output, for programs to read")


@dataclasses.dataclass(frozen=True)
class WorkdirSettings(ExperimentSettings):
    """`report`."""

    workdir: str = option("", "folder or gs:// bucket of the run", metavar="DIR")


@dataclasses.dataclass(frozen=True)
class DistributedSettings(WorkdirSettings):
    """`evaluate`."""

    distributed: bool = option(
        False,
        "one of several processes of one run, found from the environment of Cloud TPU, Slurm or "
        "GKE; start the same command on every host",
    )
    coordinator: str | None = option(
        None, "address of process 0, where there is no such environment", metavar="HOST:PORT"
    )
    process: str | None = option(None, "process I of N, with --coordinator", metavar="I/N")


@dataclasses.dataclass(frozen=True)
class RunSettings(DistributedSettings):
    """`run`, `train`, `prune` and `finetune`."""

    shard: str | None = option(
        None,
        "the I-th of N shares of the cells, of as few seeds as possible; N processes, on one "
        "machine or several, may share the workdir",
        metavar="I/N",
    )


class Command(NamedTuple):
    """What a command does to an experiment, and the settings of that."""

    text: str
    settings: type[ExperimentSettings] | None  # None: only for a pretrained model


COMMANDS = {
    "run": Command("every phase: train, prune, control, finetune, report", RunSettings),
    "plan": Command("print what would be pruned and its cost, without training", PlanSettings),
    "train": Command("train the dense models and track them", RunSettings),
    "prune": Command("score, prune and evaluate every cell", RunSettings),
    "finetune": Command("fine-tune every pruned cell, and the controls", RunSettings),
    "evaluate": Command("compute the losses again from what is on disk", DistributedSettings),
    "report": Command("figures and page from what has finished", WorkdirSettings),
    "cut": Command("cut neurons, heads or layers out of a pretrained model", None),
    "bench": Command("time a pretrained model, alone or in turns with another", None),
}
OVERRIDE = "--config."


class Parsed(NamedTuple):
    """A command line.

    Attributes:
        command: Name of the command.
        settings: Instance of the command's settings, of an experiment or of `pretrained.settings`.
        overrides: Texts such as "train.steps=100", which override the config of an experiment.
    """

    command: str
    settings: Any
    overrides: list[str]


def parse(arguments: Sequence[str]) -> Parsed:
    """Returns what a command line asks for.

    Raises:
        InputError: An option is unknown, missing, of the other use of the command, or without
            effect because another is missing, or a value does not fit its option.
    """
    if not arguments:
        raise InputError(f"a command must be given, one of {', '.join(COMMANDS)}; see --help")
    if not arguments[0].startswith("-"):
        check_choice(arguments[0], COMMANDS, "the command")
    for text in arguments:
        # Files of such names can be opened, but packages that write next to them fail at the end.
        if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
            raise InputError(
                f"{text!r} has NUL or bytes that are not UTF-8, which no option or path may; leave "
                "it out, or rename the file"
            )
    options, rest = _parser().parse_known_args(arguments)
    found = vars(options)
    command = found.pop("command")
    program = f"{PROGRAM} {command}"
    uses = [dataclasses.fields(cls) for cls in uses_of(command)]
    overrides = []
    for text in rest:
        name = text.split("=")[0]
        if text.startswith(OVERRIDE):
            overrides.append(text.removeprefix(OVERRIDE))
        elif name.startswith("--"):
            near = suggestion(name, [flag(field) for fields in uses for field in fields])
            raise InputError(f"{program} has no option {name} (see --help){near}")
        else:
            raise InputError(f"{program} takes no {text!r}; write options as --NAME=VALUE")

    # --model tells the two uses of a command apart; each refuses the options of the other.
    of_model = COMMANDS[command].settings is None or (len(uses) > 1 and "model" in found)
    known = {field.name: field for field in uses[-1 if of_model else 0]}
    others = [
        flag(field)
        for fields in uses
        for field in fields
        if field.name in found and field.name not in known
    ]
    if of_model:
        others += [OVERRIDE + text.split("=")[0] for text in overrides]
    if others:
        raise InputError(
            f"{others[0]} is for an experiment; leave out either it or --model"
            if of_model
            else f"{others[0]} is for a pretrained model; give --model=PATH with it"
        )

    wanted = uses_of(command)[-1 if of_model else 0]
    hints = typing.get_type_hints(wanted)
    values = {name: _value(value, hints[name], known[name]) for name, value in found.items()}
    for name, field in known.items():
        if field.default == "" and not values.get(name):
            instead = "" if of_model or len(uses) == 1 else ", or --model=PATH and its options"
            raise InputError(f"{program} needs {flag(field)}; give it{instead}")
    for name, field in known.items():
        other = known.get(field.metadata.get("needs", ""))
        if name in values and other is not None and other.name not in values:
            wanting = flag(other)
            if hints[other.name] is not bool:
                wanting += f"={_metavar(other, hints[other.name])}"
            raise InputError(
                f"{flag(field)} has no effect without {flag(other)}; give {wanting} with it"
            )
    return Parsed(command, wanted(**values), overrides)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        said = message.replace("ignored explicit argument", "takes no value, got")
        raise InputError(f"{self.prog}: {said}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Prune language models by what their weights did while they trained.",
        epilog="plan, prune, finetune and evaluate also take a pretrained model, as --model=PATH "
        f"in place of --config: see '{PROGRAM} prune --help'.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"swe_prune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        experiment, models = about.settings, uses_of(name)[about.settings is not None :]
        usages = [_usage(name, cls) for cls in models]
        if experiment is not None:
            usages = [_usage(name, experiment, f"[{OVERRIDE}GROUP.NAME=VALUE ...]"), *usages]
        command = commands.add_parser(
            name,
            help=about.text,
            description=f"{about.text[0].upper()}{about.text[1:]}."
            + (
                f" With --model: {name} a pretrained language model."
                if models[experiment is None :]
                else ""
            ),
            usage="\n       ".join(usages),
            allow_abbrev=False,
        )
        if experiment is not None:
            group = command.add_argument_group(
                "options of an experiment", f"and any setting as {OVERRIDE}GROUP.NAME=VALUE"
            )
            _add_options(group, experiment)
        for cls in models:
            _add_options(command.add_argument_group("options for a pretrained model"), cls)
    return parser


def uses_of(command: str) -> list[type]:
    """Returns the settings of a command: of an experiment if any, then for a model if any."""
    both = COMMANDS[command].settings, pretrained.COMMANDS.get(command)
    return [one for one in both if one is not None]


def flag(field: dataclasses.Field[Any]) -> str:
    """Returns the option of a field of the settings, such as "--learning-rate"."""
    return "--" + field.metadata.get("name", field.name).replace("_", "-")


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default == "" or field.name == "config"


def _usage(command: str, cls: type, more: str = "") -> str:
    hints = typing.get_type_hints(cls)
    needed = [field for field in dataclasses.fields(cls) if _needed(field)]
    shown = [f"{flag(field)}={_metavar(field, hints[field.name])}" for field in needed]
    return " ".join(filter(None, (PROGRAM, command, *shown, "[OPTION ...]", more)))


def _metavar(field: dataclasses.Field[Any], hint: Any) -> str:
    if choices := typing.get_args(_kind(hint)):
        return "|".join(choices)
    kind = _kind(hint).__name__
    plain = flag(field).removeprefix("--").replace("-", "_") if kind == "str" else kind
    return field.metadata.get("metavar", plain.upper())


def _kind(hint: Any) -> Any:
    """Returns the type of one value of an option: of its members, if it may be given again."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    return next((one for one in kinds if one is not type(None)), hint)


def _add_options(group: Any, cls: type) -> None:
    hints = typing.get_type_hints(cls)
    own = cls.__annotations__
    # What must be given comes first, what other commands have too comes last.
    for field in sorted(
        dataclasses.fields(cls), key=lambda field: (not _needed(field), field.name not in own)
    ):
        hint, text = hints[field.name], field.metadata["help"]
        if field.default not in ("", None, (), False):
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            text += f"; default: {', '.join(map(str, values))}"
        how: dict[str, Any] = {"action": "store_true"}
        if hint is not bool:
            several = typing.get_origin(hint) is tuple
            how = {"action": "append" if several else "store", "metavar": _metavar(field, hint)}
        how |= {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        group.add_argument(flag(field), **how)


def _value(given: Any, hint: Any, field: dataclasses.Field[Any]) -> Any:
    """Returns the value of an option from its text or texts."""
    if isinstance(given, list):
        return tuple(_value(one, _kind(hint), field) for one in given)
    kind = _kind(hint)
    if isinstance(given, bool) or kind is str:
        return given  # text is taken as it was typed, quotes included
    return config_lib.convert(config_lib.Text(given), kind, flag(field))
