"""Signals while the program imports, and after its work: one line, and the exit code.

`swe_prune/__init__.py` imports this first, since `python -m swe_prune` imports the package before
it runs anything. A process that only uses the library keeps its handlers.
"""

import _thread
import atexit
import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOPPED = "stopped; run the same command again to go on"
PREEMPTED = "preempted (SIGTERM); run the same command again to continue, finished work is saved"
HUNG_UP = PREEMPTED.replace("preempted (SIGTERM)", "the terminal was closed (SIGHUP)")
TEXTS = {signal.SIGINT: STOPPED, signal.SIGTERM: PREEMPTED}
SUPERVISED = "SWE_PRUNE_SUPERVISED"
"""Environment variable of a supervised child, which holds its parent's process id."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGHUP"):  # not on Windows, where the library alone is imported
    TEXTS[signal.SIGHUP], CODES[signal.SIGHUP] = HUNG_UP, 75


def _as_program() -> bool:
    """Returns whether this process is `python -m swe_prune` or `swe-prune`."""
    module = sys.argv[:1] == ["-m"] and ["-m", "swe_prune"] in [
        sys.orig_argv[at : at + 2] for at in range(len(sys.orig_argv))
    ]
    return module or Path(sys.argv[0] if sys.argv else "").name == "swe-prune"


PROGRAM = _as_program()
"""Whether the handlers are this module's to set."""


def exit_on_signals(code: int | None = None) -> None:
    """Makes the process end at once when a signal comes.

    Args:
        code: Exit code of the work that is done, which is not lost by a signal. None: the signal's
            own, after one line.
    """

    def end(number: int, _: Any) -> None:
        if code is None:
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, f"swe_prune: {TEXTS[signal.Signals(number)]}\n".encode())
        os._exit(CODES[signal.Signals(number)] if code is None else code)

    if PROGRAM:
        for number in CODES:
            if not ignored(number):
                signal.signal(number, end)


def ignored(number: int) -> bool:
    """Returns whether the user has a closed terminal ignored, as `nohup` does."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def leave_terminal() -> None:
    """Sends what is printed from now on nowhere, where the terminal that it went to is gone."""
    for file in (1, 2):
        with contextlib.suppress(OSError):
            # A closed terminal is not a tty any more, but still a character device.
            if stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file):
                os.dup2(os.open(os.devnull, os.O_WRONLY), file)


INTERRUPTED: list[int] = []
"""Signal number of a Ctrl-C; a package that it interrupts may raise another error."""


def interrupt_once() -> None:
    """Makes the first Ctrl-C raise KeyboardInterrupt, and a further one end the process at once."""
    fresh = [True]

    def interrupt(number: int, frame: Any) -> None:
        exit_on_signals(None)
        if fresh:
            fresh.clear()
            INTERRUPTED.append(number)
            signal.signal(signal.SIGINT, interrupt)
            signal.default_int_handler(number, frame)
        signal.raise_signal(number)

    if PROGRAM:
        signal.signal(signal.SIGINT, interrupt)
        again_if_lost(KeyboardInterrupt, signal.SIGINT, lambda: fresh.append(True))


def again_if_lost(kind: type[BaseException], number: int, prepare: Callable[[], None]) -> None:
    """Sends a signal again whose exception was raised in a finalizer, where Python drops it.

    Args:
        kind: Type of the exception.
        number: Signal that raises it.
        prepare: Function to call before, so that the signal raises once more.
    """
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if found.exc_type is not kind:
            before(found)
            return
        _thread.start_new_thread(again, ())

    def again() -> None:
        time.sleep(0.01)  # until the finalizer is over, in which it would be dropped again
        prepare()
        os.kill(os.getpid(), number)

    if kind not in _AGAIN:
        _AGAIN.add(kind)
        sys.unraisablehook = hook


_AGAIN: set[type[BaseException]] = set()


def _ignore_signals() -> None:
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)


if PROGRAM:
    exit_on_signals()
    # Registered first, so called last: Python takes back its own handlers while it ends, after
    # which a signal would end the process with another exit code.
    atexit.register(_ignore_signals)
