"""`python -m swe_prune COMMAND`: parse, call, and turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 75 preempted by SIGTERM (run the same
command again to go on), 130 stopped by Ctrl-C.
"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath
from rich.console import Console
from rich.table import Table

from swe_prune import config as config_lib
from swe_prune.errors import InputError, Preempted, RunError
from swe_prune.pretrained import settings
from swe_prune.runtime import storage
from swe_prune.runtime.supervisor import SUPERVISED

if TYPE_CHECKING:
    from swe_prune.study import Experiment

PLANNED = "SWE_PRUNE_PLANNED"
"""Environment variable of the process that compiles for devices that are not there."""

COMMANDS = {
    "run": "every phase: train, prune, control, finetune, report",
    "plan": "print what would be pruned and what it would cost, without training",
    "train": "the dense models, tracked",
    "prune": "score, prune and evaluate every cell",
    "finetune": "fine-tune every pruned cell, and the controls",
    "evaluate": "compute the losses again from what is on disk",
    "report": "figures and page from what has finished",
}

SHARDED = ("run", "train", "prune", "finetune")
DISTRIBUTED = (*SHARDED, "evaluate")
EXPLICIT = ("coordinator", "process")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    distributed = False
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if settings.wanted(arguments):
            from swe_prune.pretrained import commands

            commands.main(arguments)
            return 0
        options, overrides = _parse(arguments)
        distributed = any(getattr(options, name, None) for name in ("distributed", *EXPLICIT))
        if getattr(options, "devices", None) is not None and PLANNED not in os.environ:
            return _forced(options.devices, arguments)
        if distributed and SUPERVISED not in os.environ:
            return _supervise(options, arguments)
        _dispatch(options, overrides, distributed)
        return 0
    except (InputError, RunError, Preempted) as error:
        return _failed(error, error.exit_code, distributed)
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        failed = RunError(
            f"writing or reading{where} failed ({error.strerror or error}); make room "
            "or choose another --workdir and run the same command again, what was finished is kept"
        )
        return _failed(failed, failed.exit_code, distributed)
    except KeyboardInterrupt:
        stopped = RunError("stopped; run the same command again to go on")
        return _failed(stopped, 130, distributed)
    except Exception as error:
        if storage.failed(error):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed = RunError(
                f"the bucket of --workdir cannot be read or written ({reason}); see that this "
                "machine reaches it and its credentials may, and run the same command again, what "
                "was finished is kept"
            )
            return _failed(failed, failed.exit_code, distributed)
        if distributed:  # a fault of ours; the others must not wait for this process
            from swe_prune.runtime import processes

            processes.await_verdict(error)
            traceback.print_exc()
            _failed(RunError(f"{type(error).__name__}: {error}"), RunError.exit_code, distributed)
        raise


def _failed(error: Exception, code: int, distributed: bool) -> int:
    if distributed:
        from swe_prune.runtime import processes

        processes.fail(error, code)  # does not return where others are told
    print(f"swe_prune: {error}", file=sys.stderr)
    return code


def _supervise(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from swe_prune.runtime import processes, supervisor

    processes.process_address(options.coordinator, options.process)
    if options.distributed and options.coordinator is not None:
        raise InputError("--distributed and --coordinator were both given; give one")
    join = processes.Timeouts.of_environment().join
    return supervisor.supervise(arguments, options.workdir, options.process, join)


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m swe_prune",
        description="Prune language models by what their weights did while they trained.",
        epilog="Any setting can be given as --config.GROUP.NAME=VALUE. For a pretrained model give "
        "prune, finetune and evaluate --model=PATH in place of --config: 'prune --model=. --help'.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument(
            "--config",
            metavar="FILE",
            help="a get_config() file; without it, the config that made the workdir",
        )
        command.add_argument("--workdir", required=name != "plan", metavar="DIR")
        if name == "plan":
            command.add_argument(
                "--devices",
                type=int,
                metavar="N",
                help="compile the train step for N devices, which need not be there, and print "
                "what each would hold and receive",
            )
            command.add_argument(
                "--json", action="store_true", help="as JSON, for programs to read"
            )
        if name in SHARDED:
            command.add_argument(
                "--shard",
                metavar="I/N",
                help="take the cells whose number leaves I when divided by N; N processes, on one "
                "machine or several, may share the workdir",
            )
        if name in DISTRIBUTED:
            command.add_argument(
                "--distributed",
                action="store_true",
                help="one of several processes that do one run, found from the environment of "
                "Cloud TPU, Slurm or GKE; start the same command on every host",
            )
            command.add_argument(
                "--coordinator",
                metavar="HOST:PORT",
                help="the same where there is no such environment: where process 0 listens",
            )
            command.add_argument(
                "--process", metavar="I/N", help="with --coordinator: process I of N"
            )
    options, rest = parser.parse_known_args(arguments)
    if options.workdir is not None:
        options.workdir = storage.parse_path(options.workdir, "--workdir")
    prefix = "--config."
    for argument in rest:
        if not argument.startswith(prefix):
            raise InputError(
                f"unknown argument {argument!r}; settings are --config.NAME=VALUE, and "
                f"'python -m swe_prune {options.command} --help' lists the rest"
            )
    return options, [argument.removeprefix(prefix) for argument in rest]


def _dispatch(options: argparse.Namespace, overrides: list[str], distributed: bool) -> None:
    if options.command == "report":
        _report(options.workdir)
        return
    if distributed:
        _join(options)
    if options.command == "run":
        from swe_prune import report

        report.need_extra()  # now rather than after hours of training
    config = _config(options, overrides)
    # jax and all that comes with it, only once there is something to do
    from swe_prune import study
    from swe_prune.runtime import processes
    from swe_prune.runtime.preemption import PREEMPTION
    from swe_prune.training.progress import Progress

    processes.check_same(config_lib.flat(config) | _versions())
    text = getattr(options, "shard", None)
    shard = None if text is None else study.parse(text)
    experiment = study.setup(config, options.workdir or epath.Path(), shard)
    if options.command == "plan":
        _plan(experiment, options)
        return
    progress = Progress(Console(quiet=True) if processes.index() > 0 else None)
    claimed = study.claim(experiment.workdir, config, shard, progress.say)
    with claimed, PREEMPTION.installed():
        progress.say(study.memory_line(experiment))
        if options.command == "evaluate":
            rows = study.evaluate(experiment, progress)
            processes.first(lambda: _print_evaluation(rows))
        else:
            if options.command == "finetune":
                study.control(experiment, progress)
            getattr(study, options.command)(experiment, progress)
        if options.command == "run":
            processes.first(lambda: _report(options.workdir))
    processes.end()


def _forced(devices: int, arguments: Sequence[str]) -> int:
    """Runs the command again in a process that sees so many devices of its host."""
    if devices < 1:
        raise InputError(f"--devices={devices} is none; give 1 or more")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", PLANNED: "1"}
    command = [sys.executable, "-m", "swe_prune", *arguments]
    return subprocess.run(command, env=env, check=False).returncode


def _plan(experiment: "Experiment", options: argparse.Namespace) -> None:
    from swe_prune.study import plan_at_scale
    from swe_prune.study.plan import as_json, plan

    if options.json:
        at_hand = options.devices is None
        print(
            json.dumps(
                as_json(experiment)
                if at_hand
                else plan_at_scale.as_json(plan_at_scale.cost(experiment))
            )
        )
    elif options.devices is None:
        plan(experiment, Console())
    else:
        plan_at_scale.plan_at_scale(experiment, Console())


def _join(options: argparse.Namespace) -> None:
    from swe_prune.runtime import processes

    where = processes.process_address(options.coordinator, options.process)
    processes.start(where, processes.Timeouts.of_environment())


def _versions() -> dict[str, str]:
    import jax

    from swe_prune.version import __version__

    return {"swe_prune": __version__, "jax": jax.__version__}


def _config(options: argparse.Namespace, overrides: list[str]) -> config_lib.Config:
    if options.config is not None:
        return config_lib.load(options.config, overrides)
    if options.workdir is None or overrides:
        raise InputError("no --config was given; give the path of a get_config() file")
    from swe_prune.study.workdir import config_of

    return config_of(options.workdir)


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
