"""`python -m swe_prune COMMAND`: parse, call, and turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 75 preempted by SIGTERM (run the same
command again to go on), 130 stopped by Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from swe_prune import config as config_lib
from swe_prune.errors import InputError, Preempted, RunError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    try:
        options, overrides = _parse(arguments)
        _dispatch(options, overrides)
        return 0
    except (InputError, RunError, Preempted) as error:
        print(f"swe_prune: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        print(
            f"swe_prune: writing or reading{where} failed ({error.strerror or error}); make room "
            "or choose another --workdir and run the same command again, what was finished is kept",
            file=sys.stderr,
        )
        return RunError.exit_code
    except KeyboardInterrupt:
        print("swe_prune: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m swe_prune",
        description="Prune language models by what their weights did while they trained.",
        epilog="Any setting can be given as --config.GROUP.NAME=VALUE.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument(
            "--config",
            metavar="FILE",
            help="a get_config() file; without it, the config that made the workdir",
        )
        command.add_argument("--workdir", required=name != "plan", type=Path, metavar="DIR")
        if name in SHARDED:
            command.add_argument(
                "--shard",
                metavar="I/N",
                help="take the cells whose number leaves I when divided by N; N processes, on one "
                "machine or several, may share the workdir",
            )
    options, rest = parser.parse_known_args(arguments)
    prefix = "--config."
    for argument in rest:
        if not argument.startswith(prefix):
            raise InputError(
                f"unknown argument {argument!r}; settings are --config.NAME=VALUE, and "
                f"'python -m swe_prune {options.command} --help' lists the rest"
            )
    return options, [argument.removeprefix(prefix) for argument in rest]


def _dispatch(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.command == "report":
        _report(options.workdir)
        return
    if options.command == "run":
        from swe_prune import report

        report.need_extra()  # now rather than after hours of training
    config = _config(options, overrides)
    # jax and all that comes with it, only once there is something to do
    from swe_prune import experiment as experiment_lib
    from swe_prune.training.preemption import NOTICE
    from swe_prune.training.progress import Progress

    text = getattr(options, "shard", None)
    shard = None if text is None else experiment_lib.parse(text)
    experiment = experiment_lib.setup(config, options.workdir or Path(), shard)
    if options.command == "plan":
        experiment_lib.plan(experiment, Console())
        return
    progress = Progress()
    with experiment_lib.claim(experiment.workdir, config, shard), NOTICE.heeded():
        progress.say(experiment_lib.memory_line(experiment))
        if options.command == "evaluate":
            _print_evaluation(experiment_lib.evaluate(experiment, progress))
            return
        if options.command == "finetune":
            experiment_lib.control(experiment, progress)
        getattr(experiment_lib, options.command)(experiment, progress)
        if options.command == "run":
            _report(options.workdir)


def _config(options: argparse.Namespace, overrides: list[str]) -> config_lib.Config:
    if options.config is not None:
        return config_lib.load(options.config, overrides)
    if options.workdir is None or overrides:
        raise InputError("no --config was given; give the path of a get_config() file")
    from swe_prune.experiment.workdir import config_of

    return config_of(options.workdir)


def _report(workdir: Path) -> None:
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
