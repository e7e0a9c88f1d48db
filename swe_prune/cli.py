"""`python -m swe_prune COMMAND`: parse, call, and turn errors into one sentence and an exit code.

Each command has a dataclass of settings, whose fields are its options: those of an experiment are
here, those for a pretrained model in `pretrained.settings`. One parser is made of both.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 75 preempted by SIGTERM, or the
terminal was closed (run the same command again to go on), 130 stopped by Ctrl-C, 141 nobody read
the output any more.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from etils import epath
from rich.console import Console
from rich.table import Table

from swe_prune import config as config_lib
from swe_prune import early_signals
from swe_prune.early_signals import STOPPED, SUPERVISED, exit_on_signals
from swe_prune.errors import (
    InputError,
    Preempted,
    RunError,
    check_choice,
    suggestion,
    visible,
    why_unwritten,
)
from swe_prune.pretrained import settings as pretrained
from swe_prune.pretrained.settings import option
from swe_prune.runtime import storage
from swe_prune.version import __version__

if TYPE_CHECKING:
    from swe_prune.ledger import Factors
    from swe_prune.study import Experiment

PROGRAM = "python -m swe_prune"
PLANNED = "SWE_PRUNE_PLANNED"
"""Environment variable of the process that compiles for devices that are not there."""


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
        "cells whose number leaves I when divided by N; N processes, on one machine or several, "
        "may share the workdir",
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


def main(
    arguments: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic
) -> int:
    """Runs a command and returns the exit code.

    Args:
        arguments: Arguments of the command line; None: those of this process.
        clock: Function that returns the time in seconds.
    """
    begun = clock()
    distributed, given = False, None
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        parsed = parse(arguments)
        given = parsed.settings
        if isinstance(given, pretrained.WeightsSettings):
            from swe_prune.pretrained import commands

            commands.main(parsed.command, given)
            sys.stdout.flush()
            return 0
        if given.workdir is not None:
            storage.parse_path(given.workdir, "--workdir")
        if (
            isinstance(given, PlanSettings)
            and given.devices is not None
            and PLANNED not in os.environ
        ):
            return _forced(given.devices, arguments)
        if isinstance(given, DistributedSettings):
            distributed = bool(given.distributed or given.coordinator or given.process)
            if distributed and SUPERVISED not in os.environ:
                return _supervise(given, arguments)
        _dispatch(parsed, distributed, lambda: clock() - begun)
        sys.stdout.flush()  # now, since a full disk is a sentence here
        return 0
    except (InputError, RunError, Preempted) as error:
        return _failed(error, error.exit_code, distributed)
    except BrokenPipeError:  # whoever read the output has ended, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        place = getattr(given, "workdir", None) or getattr(given, "out", None) if given else None
        place = error.filename or _output_that_fails() or place or "a file"
        failed = RunError(
            f"writing or reading {str(place)!r} failed "
            f"({why_unwritten(error)}); make room or choose another folder and run the same "
            "command again; finished phases are kept"
        )
        return _failed(failed, failed.exit_code, distributed)
    except KeyboardInterrupt:
        exit_on_signals(130)
        stopped = RunError(STOPPED)
        return _failed(stopped, 130, distributed)
    except Exception as error:
        if early_signals.INTERRUPTED:
            exit_on_signals(130)
            return _failed(RunError(STOPPED), 130, distributed)
        if storage.failed(error):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed = RunError(
                f"the bucket of --workdir cannot be read or written ({reason}); check that "
                "this machine and its credentials can reach it, and run the same command again; "
                "finished phases are kept"
            )
            return _failed(failed, failed.exit_code, distributed)
        if distributed:  # a bug; the other processes must not wait for this one
            from swe_prune.runtime import processes

            processes.await_verdict(error)
            traceback.print_exc()
            _failed(RunError(f"{type(error).__name__}: {error}"), RunError.exit_code, distributed)
        raise


def _output_that_fails() -> str | None:
    """Returns where standard output goes if that cannot be written; leaves it, then."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # of a file that Python alone knows
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the output of this command"
    return None


def _failed(error: Exception, code: int, distributed: bool) -> int:
    if distributed:
        from swe_prune.runtime import processes

        processes.fail(error, code)  # does not return when other processes are told
    print(f"swe_prune: {visible(str(error))}", file=sys.stderr)
    return code


def _supervise(given: DistributedSettings, arguments: Sequence[str]) -> int:
    from swe_prune.runtime import processes, supervisor

    processes.process_address(given.coordinator, given.process)
    if given.distributed and given.coordinator is not None:
        raise InputError("--distributed and --coordinator were both given; give one")
    join = processes.Timeouts.of_environment().join
    workdir = storage.parse_path(given.workdir, "--workdir")
    return supervisor.supervise(arguments, workdir, given.process, join)


def parse(arguments: Sequence[str]) -> Parsed:
    """Returns what a command line asks for.

    Raises:
        InputError: An option is unknown, missing, or of the other use of the command, or a value
            does not fit its option.
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
    uses = [dataclasses.fields(cls) for cls in _uses(command)]
    overrides = []
    for text in rest:
        name = text.split("=")[0]
        if text.startswith(OVERRIDE):
            overrides.append(text.removeprefix(OVERRIDE))
        elif name.startswith("--"):
            near = suggestion(name, [_flag(field) for fields in uses for field in fields])
            raise InputError(f"{program} has no option {name} (see --help){near}")
        else:
            raise InputError(f"{program} takes no {text!r}; write options as --NAME=VALUE")

    # --model tells the two uses of a command apart; each refuses the options of the other.
    of_model = COMMANDS[command].settings is None or (len(uses) > 1 and "model" in found)
    known = {field.name: field for field in uses[-1 if of_model else 0]}
    others = [
        _flag(field)
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

    wanted = _uses(command)[-1 if of_model else 0]
    hints = typing.get_type_hints(wanted)
    values = {name: _value(value, hints[name], known[name]) for name, value in found.items()}
    for name, field in known.items():
        if field.default == "" and not values.get(name):
            instead = "" if of_model or len(uses) == 1 else ", or --model=PATH and its options"
            raise InputError(f"{program} needs {_flag(field)}; give it{instead}")
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
        experiment, models = about.settings, _uses(name)[about.settings is not None :]
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


def _uses(command: str) -> list[type]:
    """Returns the settings of a command: of an experiment if any, then for a model if any."""
    both = COMMANDS[command].settings, pretrained.COMMANDS.get(command)
    return [one for one in both if one is not None]


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.metadata.get("name", field.name).replace("_", "-")


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default == "" or field.name == "config"


def _usage(command: str, cls: type, more: str = "") -> str:
    hints = typing.get_type_hints(cls)
    needed = [field for field in dataclasses.fields(cls) if _needed(field)]
    shown = [f"{_flag(field)}={_metavar(field, hints[field.name])}" for field in needed]
    return " ".join(filter(None, (PROGRAM, command, *shown, "[OPTION ...]", more)))


def _metavar(field: dataclasses.Field[Any], hint: Any) -> str:
    if choices := typing.get_args(_kind(hint)):
        return "|".join(choices)
    kind = _kind(hint).__name__
    plain = _flag(field).removeprefix("--").replace("-", "_") if kind == "str" else kind
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
        group.add_argument(_flag(field), **how)


def _value(given: Any, hint: Any, field: dataclasses.Field[Any]) -> Any:
    """Returns the value of an option from its text or texts."""
    if isinstance(given, list):
        return tuple(_value(one, _kind(hint), field) for one in given)
    kind = _kind(hint)
    if isinstance(given, bool) or kind is str:
        return given  # text is taken as it was typed, quotes included
    return config_lib.convert(config_lib.Text(given), kind, _flag(field))


def _dispatch(parsed: Parsed, distributed: bool, elapsed: Callable[[], float]) -> None:
    command, given = parsed.command, parsed.settings
    workdir = epath.Path()
    if given.workdir is not None:
        workdir = storage.parse_path(given.workdir, "--workdir")
    if command == "report":
        _report(workdir)
        return
    if distributed:
        _join(given)
    if command == "run":
        from swe_prune import report

        report.need_extra()  # fails now rather than after hours of training
    config = _config(given, parsed.overrides)

    # What computes is imported only once there is something to do.
    from swe_prune import ledger, study
    from swe_prune.runtime import processes
    from swe_prune.runtime.preemption import PREEMPTION
    from swe_prune.training.progress import Progress, duration

    processes.check_same(config_lib.flat(config) | _versions())
    place = config.ledger.factors
    text = getattr(given, "shard", None)
    shard = None if text is None else study.parse(text)
    experiment = study.setup(config, workdir, shard)
    if command == "plan":
        _plan(experiment, given)
        return

    progress = Progress(Console(quiet=True) if processes.index() > 0 else None)
    claimed = study.claim(experiment.workdir, config, shard, progress.say)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed)
        stack.enter_context(PREEMPTION.installed())
        book = ledger.Ledger(workdir / "ledger", process=processes.index())
        stack.enter_context(ledger.opened(book))
        progress.say(study.memory_line(experiment))
        if command == "evaluate":
            rows = study.evaluate(experiment, progress)
            processes.first(lambda: _print_evaluation(rows))
        else:
            with contextlib.ExitStack() as watched:
                if processes.index() == 0:
                    country, folder = config.ledger.country, workdir / "codecarbon"
                    watched.enter_context(ledger.beside(folder, book, place, country, progress.say))
                if command == "finetune":
                    study.mend(experiment, progress)
                    study.control(experiment, progress)
                getattr(study, command)(experiment, progress)
        spent = processes.first(lambda: _account(workdir, config, place))
        if command == "run":
            processes.first(lambda: _report(workdir))
            progress.say(f"Finished in {duration(elapsed())}. {spent}")
    processes.end()


def _account(workdir: epath.Path, config: config_lib.Config, place: "Factors") -> str:
    """Writes ledger.csv from all attempts so far; returns the summary, and when cuts have paid."""
    from swe_prune import ledger
    from swe_prune.study import payback

    entries = ledger.read(workdir / "ledger")
    if not entries:
        return ""
    ledger.write(workdir / "ledger.csv", entries, place)
    found = payback.paybacks(workdir, config, entries)
    return " ".join([ledger.summary(entries, place), *(s for one in found for s in one.sentences)])


def _forced(devices: int, arguments: Sequence[str]) -> int:
    """Runs the command again in a process that sees `devices` devices of its host."""
    if devices < 1:
        raise InputError(f"--devices must be at least 1, got {devices}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", PLANNED: "1"}
    command = [sys.executable, "-m", "swe_prune", *arguments]
    if early_signals.PROGRAM:  # one process, so that a signal is answered once
        os.execve(sys.executable, command, env)
    return subprocess.run(command, env=env, check=False).returncode


def _plan(experiment: "Experiment", given: PlanSettings) -> None:
    from swe_prune.study import plan_at_scale
    from swe_prune.study.plan import as_json, plan

    if given.json and given.devices is None:
        print(json.dumps(as_json(experiment)))
    elif given.json:
        print(json.dumps(plan_at_scale.as_json(plan_at_scale.cost(experiment))))
    elif given.devices is None:
        plan(experiment, Console())
    else:
        plan_at_scale.plan_at_scale(experiment, Console())


def _join(given: DistributedSettings) -> None:
    from swe_prune.runtime import processes

    where = processes.process_address(given.coordinator, given.process)
    processes.start(where, processes.Timeouts.of_environment())


def _versions() -> dict[str, str]:
    import jax

    return {"swe_prune": __version__, "jax": jax.__version__}


def _config(given: WorkdirSettings | PlanSettings, overrides: list[str]) -> config_lib.Config:
    if given.config is not None:
        return config_lib.load(given.config, overrides)
    if given.workdir is None or overrides:
        raise InputError("no --config was given; give the path of a get_config() file")
    from swe_prune.study.workdir import config_of

    return config_of(storage.parse_path(given.workdir, "--workdir"))


def _report(workdir: epath.Path) -> None:
    from swe_prune import report

    for path in report.build(workdir):
        print(path)


def _print_evaluation(rows: list[dict[str, object]]) -> None:
    table = Table("model", "recorded", "computed", title="validation loss, nats per token")
    for row in rows:
        table.add_row(str(row["model"]), f"{row['recorded']:.6f}", f"{row['computed']:.6f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
