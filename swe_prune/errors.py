"""The ways to end before the end: the input was wrong, the run failed, or it was preempted.

Each carries one sentence that names the thing, the reason and the mend. The command line prints
that sentence alone and exits with `exit_code`; a library user catches the built-in type it extends.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used; found before work is wasted."""

    exit_code = 2


class DamagedError(InputError):
    """What an earlier run wrote is not as it was written."""


class RunError(RuntimeError):
    """A run that was set up correctly failed; what was finished before is kept."""

    exit_code = 1


class Preempted(RuntimeError):
    """The machine is taken away (SIGTERM); what was done is saved, the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again, which schedulers can be told to do


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a clause that names the near candidates and all the known ones.

    >>> did_you_mean("magnitud", ["magnitude", "random"])
    "did you mean 'magnitude'? Known: magnitude, random"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{guess}Known: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    r"""Returns the type and the first line of an error, to quote in a sentence.

    >>> first_line(ValueError("no such key\nTraceback"))
    'ValueError: no such key'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}"[:200] if lines else type(error).__name__
