"""The commands of an experiment: what each does once its line is parsed."""

import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from etils import epath
from rich.console import Console
from rich.table import Table

from swe_prune import config as config_lib
from swe_prune.cli.parsing import DistributedSettings, Parsed, PlanSettings, WorkdirSettings
from swe_prune.errors import InputError
from swe_prune.runtime import storage
from swe_prune.version import __version__

if TYPE_CHECKING:
    from swe_prune.ledger import Factors
    from swe_prune.study import Experiment


def main(parsed: Parsed, distributed: bool, elapsed: Callable[[], float]) -> None:
    """Runs a command.

    Args:
        parsed: Command line.
        distributed: Whether this is one of several processes.
        elapsed: Function that returns the seconds since the command began.
    """
    command, given = parsed.command, parsed.settings
    workdir = epath.Path()
    if given.workdir is not None:
        workdir = storage.parse_path(given.workdir, "--workdir")
    if command == "report":
        if given.config is not None or parsed.overrides:
            from swe_prune.study.workdir import check_config

            check_config(workdir, _config(given, parsed.overrides))
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
