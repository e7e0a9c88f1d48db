"""The parent of each process of a distributed run: turns how it ends into a sentence.

JAX's runtime aborts a process whose coordinator is gone, or that waited too long for others to come
up, in C++ where no Python can speak. So the work is done by a child, and the parent, which uses no
JAX, passes on what the child says, and says what the child could not.
"""

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

from swe_prune.runtime import storage

SUPERVISED = "SWE_PRUNE_SUPERVISED"
"""Environment variable of the child: its parent's process number."""

RUNTIME_NOISE = re.compile(
    r"[IWEF]\d{4} [\d:.]+ +\d+ .*(coordination_service|preemption_\w+|client\.h)"
    r"|\[Gloo\] |Additional GRPC error information|:UNKNOWN:Error received from peer"
)
FIRST_GONE = "process 0 is gone, and its log says why; run the same command again to go on"
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"


def supervise(
    arguments: Sequence[str], workdir: epath.Path, process: str | None, join: float
) -> int:
    """Runs the command in a child and returns the exit code that this process should have.

    Args:
        arguments: of the command line.
        workdir: shared by all processes; each leaves a sign there that it came up.
        process: I/N, None where the cluster's environment tells.
        join: seconds that the processes wait for each other.
    """
    sign = _sign(workdir, process)
    command = [sys.executable, "-m", "swe_prune", *arguments]
    env = os.environ | {SUPERVISED: str(os.getpid()), "GLOG_minloglevel": "3"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as child:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: child.send_signal(number))
        assert child.stderr is not None
        fatal = _pass_on(child.stderr)
        code = child.wait()
    if sign is not None:
        sign.unlink(missing_ok=True)
    if fatal:
        say(_absent(workdir, sign, process, join) if "RegisterTask" in fatal else FIRST_GONE)
        return 1
    if code < 0:
        name = signal.Signals(-code).name
        say(f"this process was ended by {name}; run the same command again to go on")
        return 128 - code
    return code


def _pass_on(stream: IO[str]) -> str:
    """Copies a stream to standard error and returns the runtime's last words, which it keeps."""
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


def _sign(workdir: epath.Path, process: str | None) -> epath.Path | None:
    """Leaves a file that says that this process came up; None where the workdir refuses."""
    name = f"{socket.gethostname()}-{os.getpid()}" if process is None else process.split("/")[0]
    try:
        storage.write(
            _signs(workdir) / name, json.dumps({"host": socket.gethostname(), "time": time.time()})
        )
    except Exception as error:
        if not isinstance(error, OSError) and not storage.failed(error):
            raise
        return None  # the child says so, and better
    return _signs(workdir) / name


def _absent(workdir: epath.Path, sign: epath.Path | None, process: str | None, join: float) -> str:
    """Returns who did not come up, as far as those who did left a sign."""
    mend = "start it, or correct N or HOST:PORT, and run the same command again"
    since = time.time() - 2 * join
    came = {}
    for file in _signs(workdir).glob("*"):
        left = json.loads(file.read_text())
        if left["time"] > since:
            came[file.name] = left["host"]
    if sign is not None:
        came[sign.name] = socket.gethostname()
    here = ", ".join(f"{name} on {host}" for name, host in sorted(came.items()))
    if process is None:
        return f"not all processes came up within {join:g} s; those that did: {here}; {mend}"
    count = int(process.split("/")[1])
    missing = [str(number) for number in range(count) if str(number) not in came]
    if not missing:
        return (
            f"the processes did not reach each other within {join:g} s, though all came up "
            f"({here}); see that HOST:PORT is process 0's and open to the others"
        )
    return (
        f"process {', '.join(missing)} of {count} did not come up within {join:g} s "
        f"(here: {here}); {mend}"
    )


def say(text: str) -> None:
    """Prints a sentence for the user on standard error."""
    print(f"swe_prune: {text}", file=sys.stderr, flush=True)
