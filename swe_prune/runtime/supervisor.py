"""Parent of each process of a distributed run, which reports why its child ended.

JAX's runtime aborts, in C++, a process whose coordinator is gone or that waited too long for the
others, so no Python code can report it. The work therefore runs in a child. The parent does not use
JAX; it forwards the child's output and prints the message that the child could not.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

from etils import epath

from swe_prune.early_signals import SUPERVISED, ignored
from swe_prune.errors import visible
from swe_prune.runtime import storage

RUNTIME_NOISE = re.compile(
    r"[IWEF]\d{4} [\d:.]+ +\d+ .*(coordination_service|preemption_\w+|client\.h)"
    r"|\[Gloo\] |Additional GRPC error information|:UNKNOWN:Error received from peer"
)
FIRST_GONE = "process 0 is gone; see its log for the reason and run the same command again"
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"


def supervise(
    arguments: Sequence[str], workdir: epath.Path, process: tuple[int, int] | None, join: float
) -> int:
    """Runs the command in a child and returns the exit code for this process.

    Args:
        arguments: Arguments of the command line.
        workdir: Folder shared by all processes, in which each leaves a file when it comes up.
        process: Process index and count, or None if the cluster provides them.
        join: Seconds that the processes wait for each other.
    """
    sign = _sign(workdir, process)
    command = [sys.executable, "-m", "swe_prune", *arguments]
    env = os.environ | {SUPERVISED: str(os.getpid()), "GLOG_minloglevel": "3"}
    # Forward signals to the child, and its messages to standard error.
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as child:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if not ignored(number):
                signal.signal(number, lambda number, _: child.send_signal(number))
        assert child.stderr is not None
        fatal = _pass_on(child.stderr)
        code = child.wait()
    if sign is not None:
        sign.unlink(missing_ok=True)
    # The runtime aborted the child: report absent processes, or that process 0 is gone.
    if fatal:
        say(_absent(workdir, sign, process, join) if "RegisterTask" in fatal else FIRST_GONE)
        return 1
    # Use the exit code of shells for a process that was ended by a signal.
    if code < 0:
        name = signal.Signals(-code).name
        say(f"this process was ended by {name}; run the same command again to continue")
        return 128 - code
    return code


def _pass_on(stream: IO[str]) -> str:
    """Copies a stream to standard error, except the runtime's fatal message, which it returns."""
    fatal = ""
    for line in stream:
        if fatal or ABORTED in line:
            fatal += line
        elif not RUNTIME_NOISE.match(line):
            sys.stderr.write(line)
            sys.stderr.flush()
    return fatal


def _signs(workdir: epath.Path) -> epath.Path:
    return workdir / ".processes"


def _sign(workdir: epath.Path, process: tuple[int, int] | None) -> epath.Path | None:
    """Writes a file that says that this process came up; None if it cannot be written."""
    name = f"{socket.gethostname()}-{os.getpid()}" if process is None else str(process[0])
    try:
        storage.write(
            _signs(workdir) / name, json.dumps({"host": socket.gethostname(), "time": time.time()})
        )
    except Exception as error:
        if not isinstance(error, OSError) and not storage.failed(error):
            raise
        return None  # the child reports this in more detail
    return _signs(workdir) / name


def _absent(
    workdir: epath.Path, sign: epath.Path | None, process: tuple[int, int] | None, join: float
) -> str:
    """Returns a message that names the processes that did not come up."""
    fix = "start it, or correct N or HOST:PORT, and run the same command again"
    # Files older than this are from earlier runs.
    since = time.time() - 2 * join
    came = {}
    for file in _signs(workdir).glob("*"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # damaged is absent
            left = storage.read_json(file)
            if left["time"] > since:
                came[file.name] = left["host"]
    if sign is not None:
        came[sign.name] = socket.gethostname()
    here = ", ".join(f"{name} on {host}" for name, host in sorted(came.items()))
    if process is None:
        return f"not all processes came up within {join:g} s; those that did: {here}; {fix}"
    # The number of processes is known, so name those that are missing.
    count = process[1]
    missing = [str(number) for number in range(count) if str(number) not in came]
    if not missing:
        return (
            f"the processes did not reach each other within {join:g} s, though all came up "
            f"({here}); check that HOST:PORT is process 0's and reachable from the others"
        )
    return (
        f"process {', '.join(missing)} of {count} did not come up within {join:g} s "
        f"(up: {here}); {fix}"
    )


def say(text: str) -> None:
    """Prints a message for the user on standard error."""
    print(f"swe_prune: {visible(text)}", file=sys.stderr, flush=True)
