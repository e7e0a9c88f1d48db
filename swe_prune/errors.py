"""Exceptions with exit codes, one check for a choice among known names, and readers' errors.

Each exception carries one sentence: what is wrong, why, and how to fix it. The command line prints
that sentence alone and exits with `exit_code`; library users catch the built-in type it extends.
"""

import contextlib
import difflib
import errno
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

_LONGEST = 1200  # characters of a sentence, more than any list of known names makes it


class InputError(ValueError):
    """What the user gave cannot be used; found before work is wasted."""

    exit_code = 2

    def __str__(self) -> str:
        """Returns the sentence on one line, without its middle if a value in it is very long."""
        text = " ".join(super().__str__().split("\n"))
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} … {text[-297:]}"


class DamagedError(InputError):
    """A file from an earlier run differs from what was written."""

    @property
    def fault(self) -> str:
        """What is wrong, without the advice after it.

        >>> DamagedError("the file is empty; run it again").fault
        'the file is empty'
        """
        return str(self).partition("; ")[0]


class UndecidedWarning(UserWarning):
    """A mask that the scores do not decide: ties at the threshold, or a tensor that is emptied."""


class RunError(RuntimeError):
    """A run that was set up correctly failed; finished phases are on disk."""

    exit_code = 1


class UnwrittenError(RunError):
    """What a run writes cannot be written.

    Attributes:
        why: Reason, in a few words.
    """

    def __init__(self, sentence: str, why: str):
        """Stores the reason, for the message of the error that this one is part of."""
        super().__init__(sentence)
        self.why = why


class Preempted(RuntimeError):
    """The machine is taken away (SIGTERM); progress is saved, the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again, which schedulers can be told to do


def check_choice(value: object, known: Iterable[str | None], what: str) -> None:
    """Checks that a value is one of the known ones.

    Args:
        value: Value to check.
        known: Values allowed, in the order in which to list them.
        what: Name of the argument or setting, for the sentence.

    Raises:
        InputError: The value is not one of the known ones.

    >>> check_choice("rms", ["layer", "rms"], "norm")
    >>> check_choice("rm", ["layer", "rms"], "norm")
    Traceback (most recent call last):
    ...
    swe_prune.errors.InputError: norm must be one of layer, rms, got 'rm'; did you mean 'rms'?
    """
    known = tuple(known)
    if not ((value is None or isinstance(value, str)) and value in known):
        listed = ", ".join(str(one) for one in known)
        raise InputError(
            f"{what} must be one of {listed}, got {shown(value)}{suggestion(value, known)}"
        )


def check_texts(values: object, what: str) -> tuple[str, ...]:
    """Returns a sequence of strings, given as one or as a single string.

    Raises:
        InputError: The values are something else.

    >>> check_texts("late_mean", "measures"), check_texts(["a"], "rules")
    (('late_mean',), ('a',))
    """
    if isinstance(values, str):
        return (values,)
    if not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise InputError(f"{what} must be a string or a sequence of strings, got {shown(values)}")
    return tuple(values)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a clause that names the near candidates and all the known ones.

    >>> did_you_mean("magnitud", ["magnitude", "random"])
    "did you mean 'magnitude'? Known: magnitude, random"
    """
    names = sorted(known)
    guess = suggestion(name, names).removeprefix("; ")
    return f"{guess}{' ' if guess else ''}Known: {', '.join(names)}"


def listed(names: Iterable[str], most: int = 3, form: Callable[[str], object] = repr) -> str:
    """Returns the first names for a sentence, and how many more there are.

    >>> listed("abcde"), listed("ab", most=1, form=str)
    ("'a', 'b', 'c' and 2 more", 'a and 1 more')
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(form(name)) for name in names[:most]) + more


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns which settings differ between a run that was begun and this one, "" if none does.

    >>> differences({"seed": 0, "steps": 10}, {"seed": 1, "steps": 10})
    'seed (0 there, 1 now)'
    """
    missing = object()
    differing = [
        key for key in {**there, **now} if there.get(key, missing) != now.get(key, missing)
    ]
    return listed(
        differing, form=lambda key: f"{key} ({there.get(key)!r} there, {now.get(key)!r} now)"
    )


def suggestion(name: object, known: Iterable[str | None]) -> str:
    """Returns "; did you mean 'x'?", or nothing when no known name is near."""
    names = [one for one in known if isinstance(one, str)]
    near = difflib.get_close_matches(shown(name).strip("'\""), names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(one) for one in near)}?" if near else ""


def shown(value: object, most: int = 80) -> str:
    """Returns the repr of a value for a sentence: one line, cut, whatever the value is.

    >>> shown([1] * 100, 10)
    '[1, 1, 1,…'
    """
    try:
        text = repr(value)
    except Exception as error:  # a repr is anyone's code, and that of a long integer raises
        text = f"a {type(value).__name__} without a repr ({type(error).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most].rstrip()}…"


def visible(text: str, keep: str = "") -> str:
    r"""Returns a text for a terminal or a page, its control characters as escapes.

    Args:
        text: Text that may have names of strangers in it.
        keep: Characters to leave as they are, such as "\n".

    >>> visible("a\x1b[2J\u202eb\n")
    'a\\x1b[2J\\u202eb\\n'
    """
    if text.isprintable():
        return text

    def shows(one: str) -> bool:  # spaces of other widths are not "printable"
        return one.isprintable() or one in keep or unicodedata.category(one) == "Zs"

    return "".join(one if shows(one) else one.encode("unicode_escape").decode() for one in text)


def first_line(error: BaseException) -> str:
    r"""Returns the type and the first line of an error, to quote in a sentence.

    >>> first_line(ValueError("no such key\nTraceback"))
    'ValueError: no such key'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}"[:200] if lines else type(error).__name__


NO_SPACE = "no space is left on the disk, or it can hold no more files"
NO_QUOTA = "the quota of the disk is used up"


def why_unwritten(error: BaseException) -> str:
    """Returns why a file could not be written, in a few words where the disk is full.

    >>> why_unwritten(OSError(28, "No space left on device"))
    'no space is left on the disk, or it can hold no more files'
    """
    if isinstance(error, UnwrittenError):
        return error.why
    for why, codes in ((NO_QUOTA, (errno.EDQUOT,)), (NO_SPACE, (errno.ENOSPC, errno.EFBIG))):
        said = map(os.strerror, codes)  # of tensorstore, of Rust
        if getattr(error, "errno", None) in codes or any(one in str(error) for one in said):
            return why
    if "RESOURCE_EXHAUSTED" in str(error):
        return NO_SPACE
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


READER_ERRORS = (
    OSError,
    ValueError,  # of json and numpy; texts that are not UTF-8
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    EOFError,
    RuntimeError,  # NotImplementedError, and RecursionError of deep JSON, are among them
)
"""What packages raise that read a damaged file."""

RUST_ERRORS = ("Exception", "SafetensorError", "PanicException")
"""Names of what packages in Rust raise: no narrower class, or panics, which are BaseExceptions."""


@contextlib.contextmanager
def writing(what: object, advice: str) -> Iterator[None]:
    """Turns what a disk raises while something is written, also through Rust, into one sentence.

    Args:
        what: What is written and where, such as "the model /out".
        advice: Instruction at the end of the sentence.

    Raises:
        RunError: It cannot be written; says why.
    """
    try:
        yield
    except Exception as error:
        of_rust = type(error).__name__ in RUST_ERRORS and "os error" in str(error)
        if not (of_rust or isinstance(error, OSError | UnwrittenError)):
            raise
        why = why_unwritten(error)
        raise UnwrittenError(f"{what} cannot be written: {why}; {advice}", why) from None


@contextlib.contextmanager
def reading(what: object, advice: str = "get it again") -> Iterator[None]:
    """Turns what a package raises while it reads a file into one sentence.

    Only calls of packages, or of code that interprets a file, go inside.

    Args:
        what: Path or description of the file.
        advice: Instruction at the end of the sentence.

    Raises:
        InputError: The reader failed; names the file.
    """
    try:
        yield
    except InputError:
        raise
    except READER_ERRORS as error:
        raise InputError(f"{what} cannot be read ({first_line(error)}); {advice}") from None
    except BaseException as error:
        if type(error).__name__ not in RUST_ERRORS:
            raise
        raise InputError(f"{what} cannot be read ({first_line(error)}); {advice}") from None
