"""`python -m swe_prune COMMAND`: parse, call, and turn errors into one sentence and an exit code.

parsing      the options of each command, and what a command line asks for
experiments  what the commands of an experiment do; `pretrained.commands`, those of a model

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 75 preempted by SIGTERM, or the
terminal was closed (run the same command again to go on), 130 stopped by Ctrl-C, 141 nobody read
the output any more.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from swe_prune import early_signals
from swe_prune.cli.parsing import DistributedSettings, PlanSettings, parse
from swe_prune.early_signals import STOPPED, SUPERVISED, exit_on_signals
from swe_prune.errors import (
    NO_QUOTA,
    NO_SPACE,
    InputError,
    Preempted,
    RunError,
    first_line,
    visible,
    why_unwritten,
)
from swe_prune.pretrained import settings as pretrained
from swe_prune.runtime import storage

PLANNED = "SWE_PRUNE_PLANNED"
"""Environment variable of the process that compiles for devices that are not there."""


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
        # What computes is imported only once there is something to do.
        from swe_prune.cli import experiments

        experiments.main(parsed, distributed, lambda: clock() - begun)
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
        why = why_unwritten(error)
        full = why in (NO_SPACE, NO_QUOTA)
        advice = "make room" if full else "see to this path and its rights"
        failed = RunError(
            f"writing or reading {str(place)!r} failed ({why}); {advice} or choose another folder "
            "and run the same command again; finished phases are kept"
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
            failed = RunError(
                f"the bucket of --workdir cannot be read or written ({first_line(error)}); check "
                "that this machine and its credentials can reach it, and run the same command "
                "again; finished phases are kept"
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

    where = processes.process_address(given.coordinator, given.process)
    if given.distributed and given.coordinator is not None:
        raise InputError("--distributed and --coordinator were both given; give one")
    join = processes.Timeouts.of_environment().join
    workdir = storage.parse_path(given.workdir, "--workdir")
    process = None if where.index is None or where.count is None else (where.index, where.count)
    return supervisor.supervise(arguments, workdir, process, join)


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
