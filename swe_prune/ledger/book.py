"""What every phase of a run took: seconds, processor seconds, joules, tokens.

An attempt of a run keeps its entries in a file of its own, rewritten every few seconds. So a run
that is killed leaves what it spent, and several processes never write to one file.
"""

import contextlib
import contextvars
import dataclasses
import json
import math
import operator
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from swe_prune.arguments import checked
from swe_prune.bounds import NOT_NEGATIVE
from swe_prune.errors import InputError, RunError, check_choice, why_unwritten
from swe_prune.ledger.interval import ZERO, Interval
from swe_prune.ledger.meters import Meter, of_this_machine, processor_seconds
from swe_prune.runtime import storage

EVERY = 10.0
"""Seconds between two readings of the meters, each of which is written down."""

TOGETHER = 60.0
"""Seconds within which the processes of one attempt begin."""

DONE, FAILED, OPEN, KILLED = "done", "failed", "open", "killed"


@checked
@dataclasses.dataclass
class Entry:
    """What one phase took in one attempt.

    Attributes:
        phase: Name of the phase; a phase within another one is "outer/inner", and is part of it.
        cell: What the phase worked on, such as a cell of a study.
        attempt: Number of the attempt, from 1.
        process: Index of the process.
        tokens: Tokens that the phase has worked through; to be set before it ends.
        status: "done", "failed", "killed", or "open" while it runs.
        seconds: Wall time.
        processor_seconds: Time of all threads of the process and of its ended children.
        joules: Energy of the meters.
        source: Meters, such as "nvml+modelled".
        parts: Parts of the machine that were taken: {"accelerator": n} or {"thread": n}.
    """

    phase: str
    cell: str = ""
    attempt: int = 1
    process: int = 0
    tokens: int = 0
    status: str = OPEN
    seconds: float = 0.0
    processor_seconds: float = 0.0
    joules: Interval = ZERO
    source: str = ""
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def top(self) -> bool:
        """Whether it is not part of another entry."""
        return "/" not in self.phase


@checked
class Ledger:
    """Entries of one attempt, and the meters that they are read from.

    Attributes:
        entries: Entries in the order in which their phases began.
    """

    def __init__(
        self,
        folder: epath.PathLike | None = None,
        *,
        meters: Sequence[Meter] | None = None,
        process: int = 0,
        every: float = EVERY,
    ):
        """Opens a ledger.

        Args:
            folder: Folder for the attempt's file, local or in a bucket. None: memory alone.
            meters: Meters to read. None: those of this machine's accelerators and processor.
            process: Index of this process among those of the run.
            every: Seconds between two readings while a phase runs.
        """
        kinds = _accelerators()
        self.meters = list(of_this_machine(kinds) if meters is None else meters)
        threads = len(os.sched_getaffinity(0))
        self._parts = {"accelerator": len(kinds)} if kinds else {"thread": threads}
        self.entries: list[Entry] = []
        self.source = "+".join(dict.fromkeys(meter.source for meter in self.meters))
        self._process, self._every = process, every
        self._running: list[tuple[Entry, float, float, list[Interval]]] = []
        self._written: dict[int, str] = {}  # JSON of the entries that have ended, by their number
        self._lock = threading.RLock()
        self._file, self._began = None, time.time()
        self._unwritten: str | None = None
        self._told = False
        if folder is not None:
            name = f"{self._began:.6f}-{platform.node()}-{os.getpid()}.json"
            self._file = storage.parse_path(folder, "ledger") / name

    @contextlib.contextmanager
    def measure(self, phase: str, *, cell: str = "", tokens: int = 0) -> Iterator[Entry]:
        """Measures what runs inside the `with`; see `ledger.measure`."""
        if not phase or "/" in phase:
            raise InputError(f"a phase must have a name without '/', got {phase!r}")
        with self._lock:
            outer = self._running[-1][0].phase + "/" if self._running else ""
            entry = Entry(outer + phase, cell, 1, self._process, tokens)
            entry.source, entry.parts = self.source, self._parts
            start = [meter.poll() for meter in self.meters]
            self._running.append((entry, time.monotonic(), processor_seconds(), start))
            self.entries.append(entry)
        stop = threading.Event()
        if not outer:
            watch = threading.Thread(target=self._watch, args=(stop,), daemon=True)
            watch.start()
        try:
            yield entry
            entry.status = DONE
        except BaseException:
            entry.status = FAILED
            raise
        finally:
            stop.set()
            with self._lock:
                self._read()
                self._running.pop()
            if not outer:
                watch.join()
                self._write(quiet=entry.status == FAILED)
                if _CURRENT.get() is not self:
                    self.warn()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self._every):
            with self._lock:
                self._read()
            self._write(quiet=True)  # the phase's own end says it

    def _read(self) -> None:
        """Brings every running entry up to date."""
        totals = [meter.poll() for meter in self.meters]
        for entry, begun, busy, start in self._running:
            entry.seconds = time.monotonic() - begun
            entry.processor_seconds = max(0.0, processor_seconds() - busy)
            spent = (a.map(operator.sub, b) for a, b in zip(totals, start, strict=True))
            entry.joules = sum(spent, ZERO)

    def _write(self, quiet: bool = False) -> None:
        if self._file is None:
            return
        with self._lock:
            entries = ", ".join(map(self._text, range(len(self.entries))))
        try:
            text = f'{{"began": {self._began!r}, "entries": [{entries}]'
            storage.write(
                self._file, f'{text}, "{storage.CHECKSUM}": {storage.checksum(text + "}")}}}'
            )
        except RunError:  # the folder of the run is gone
            if not quiet:
                raise
        except OSError as error:  # a full disk, which does not stop what is watched
            if not quiet:
                self._unwritten = why_unwritten(error)
        else:
            self._unwritten = None

    def warn(self) -> None:
        """Warns once if the ledger could not be written to the end."""
        if self._unwritten and not self._told:
            self._told = True
            warnings.warn(
                f"the ledger cannot write {self._file} ({self._unwritten}); make room, or what "
                "this attempt takes is not counted",
                stacklevel=3,
            )

    def _text(self, number: int) -> str:
        # A study has thousands of entries; only those that run are made into text again.
        if number in self._written:
            return self._written[number]
        entry = self.entries[number]
        text = json.dumps(dataclasses.asdict(entry))
        if entry.status != OPEN:
            self._written[number] = text
        return text


@checked
def read(folder: epath.PathLike) -> list[Entry]:
    """Returns the entries of all attempts and processes, oldest attempt first.

    Attempts are numbered by when they began; processes that began within a minute belong to one. A
    phase that was running when its attempt ended is "killed" and has what it took until its last
    reading.

    Args:
        folder: Folder of a `Ledger`; without files there are no entries.

    Raises:
        InputError: If a file is damaged.
    """
    folder = epath.Path(folder)
    files = (
        [name for name in storage.files(folder) if name.endswith(".json")]
        if folder.exists()
        else []
    )
    contents = [_parsed(folder / name) for name in files]
    found: list[Entry] = []
    attempt, last = 0, -math.inf
    processes: set[int] = set()
    for content in sorted(contents, key=lambda content: content["began"]):
        own = {entry.process for entry in content["entries"]}
        if content["began"] - last > TOGETHER or own & processes:
            attempt, processes = attempt + 1, set()
        last, processes = content["began"], processes | own
        for entry in content["entries"]:
            entry.attempt = attempt
            entry.status = KILLED if entry.status == OPEN else entry.status
            found.append(entry)
    return found


def _parsed(path: epath.Path) -> dict[str, Any]:
    try:
        content = storage.read_json(path)
        NOT_NEGATIVE.check(content["began"], "began")
        entries = []
        for one in content["entries"]:
            entries.append(Entry(**one | {"joules": Interval(**one["joules"]), "attempt": 1}))
            check_choice(entries[-1].status, (DONE, FAILED, OPEN, KILLED), "status")
            for name in ("seconds", "processor_seconds", "tokens"):
                NOT_NEGATIVE.check(one.get(name, 0), name)
            for part, count in entries[-1].parts.items():
                NOT_NEGATIVE.check(count, part)
        return {"began": float(content["began"]), "entries": entries}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is damaged ({error}); move it away, and what its attempt took is not counted"
        ) from error


def _accelerators() -> list[str]:
    """Returns the kinds of this process's accelerators; does not start jax where it has not."""
    import sys

    bridge = sys.modules.get("jax")
    if bridge is None:
        return []
    devices = bridge.local_devices()
    return [device.device_kind for device in devices if device.platform != "cpu"]


_CURRENT: contextvars.ContextVar[Ledger | None] = contextvars.ContextVar("ledger", default=None)


@checked
@contextlib.contextmanager
def opened(book: Ledger) -> Iterator[Ledger]:
    """Makes a ledger the one that `measure` writes to."""
    within = _CURRENT.get() is book
    token = _CURRENT.set(book)
    try:
        yield book
    finally:
        _CURRENT.reset(token)
    if not within:  # where something has failed, that is what is said
        book.warn()


@checked
@contextlib.contextmanager
def measure(phase: str, *, cell: str = "", tokens: int = 0) -> Iterator[Entry]:
    """Measures what runs inside the `with`: time, processor time, energy.

    Phases may be nested; an inner one is named "outer/inner" and is part of the outer one. Device
    work that is still running counts where it is waited for, so end with `block_until_ready`.

    Args:
        phase: Name of the phase, without "/".
        cell: What it works on.
        tokens: Tokens that it works through; may also be set on the entry.

    Yields:
        The entry, whose numbers are there after the `with`.

    Raises:
        InputError: If the name is empty or has a "/".

    >>> with measure("prune", tokens=1000) as entry:
    ...     total = sum(range(1000))
    >>> entry.status, entry.seconds > 0, entry.joules.low <= entry.joules.high
    ('done', True, True)
    """
    book = _CURRENT.get()
    if book is None:
        book = Ledger()
    with opened(book), book.measure(phase, cell=cell, tokens=tokens) as entry:
        yield entry
