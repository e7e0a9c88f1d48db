"""Coordination of the processes of one run: identity, shared decisions, and failures.

Every process runs the same program. Process 0 alone accesses files and talks to the user, and
broadcasts what it finds to the others, so that all of them take the same branches:

    if processes.first(path.exists): ...            # process 0 looks, all learn it
    processes.first(lambda: write_json(path, x))    # process 0 writes, or all raise its error

Values are broadcast through the key-value store of JAX's coordination service. A process that
fails writes its error there before it ends. One that dies or hangs stops sending heartbeats, and
the others then end themselves, since they wait inside a collective operation that never returns.
"""

import dataclasses
import functools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from swe_prune.early_signals import SUPERVISED
from swe_prune.errors import InputError, Preempted, RunError, first_line
from swe_prune.runtime.supervisor import FIRST_GONE, say

Value = TypeVar("Value")

ERRORS = {kind.__name__: kind for kind in (InputError, RunError, Preempted)}
FOREVER_MS = 7 * 24 * 3600 * 1000  # the monitor ends a wait for a lost process much sooner


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds; environment variables set them, since machines differ.

    Attributes:
        join: Time for all processes to come up (SWE_PRUNE_JOIN_TIMEOUT).
        lost: Time without a heartbeat after which a process counts as lost
            (SWE_PRUNE_LOST_TIMEOUT).
        hang: Time without progress of any process, compilation included
            (SWE_PRUNE_HANG_TIMEOUT).
    """

    join: float = 300.0
    lost: float = 60.0
    hang: float = 1800.0

    @classmethod
    def of_environment(cls) -> "Timeouts":
        """Returns the timeouts from the environment variables, or the defaults.

        Raises:
            InputError: If a variable is not a number above 0.
        """
        given = {}
        for field in dataclasses.fields(cls):
            name = f"SWE_PRUNE_{field.name.upper()}_TIMEOUT"
            text = os.environ.get(name)
            if text is not None:
                if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or float(text) <= 0:
                    raise InputError(f"{name} must be a number of seconds above 0, got {text!r}")
                given[field.name] = float(text)
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class ProcessAddress:
    """Index of this process, number of processes, and address of the coordinator.

    Attributes:
        coordinator: Address HOST:PORT of process 0, or None to detect it from the cluster.
        index: Index of this process, from 0, or None to detect it from the cluster.
        count: Number of processes, or None to detect it from the cluster.
    """

    coordinator: str | None = None
    index: int | None = None
    count: int | None = None


def process_address(coordinator: str | None, process: str | None) -> ProcessAddress:
    """Returns the process address given on the command line.

    Args:
        coordinator: Value of --coordinator, or None.
        process: Value of --process, or None.

    Raises:
        InputError: If one is given without the other, or one is malformed.

    >>> process_address("10.0.0.1:8476", "1/4")
    ProcessAddress(coordinator='10.0.0.1:8476', index=1, count=4)
    """
    if coordinator is None and process is None:
        return ProcessAddress()
    if coordinator is None or process is None:
        raise InputError(
            "--coordinator=HOST:PORT and --process=I/N belong together; give both, or --distributed"
        )
    port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
    if not port or not 1 <= int(port[1]) <= 65535:
        raise InputError(
            "--coordinator must be HOST:PORT of process 0, with a port up to 65535, got "
            f"{coordinator!r}"
        )
    if (which := numbered(process)) is None:
        raise InputError(f"--process must be I/N with I from 0 to N - 1, got {process!r}")
    return ProcessAddress(coordinator, *which)


def numbered(text: str) -> tuple[int, int] | None:
    """Returns (I, N) of `I/N` with 0 <= I < N, or None for any other text.

    >>> numbered("1/4"), numbered("4/4")
    ((1, 4), None)
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*/\s*([0-9]+)\s*", text)
    which = (int(match[1]), int(match[2])) if match else (0, 0)
    return which if which[0] < which[1] else None


def start(where: ProcessAddress, timeouts: Timeouts) -> None:
    """Joins the other processes and starts monitoring them; call before using any device.

    Args:
        where: Address of this process in the run.
        timeouts: Timeouts for joining and for heartbeats.

    Raises:
        InputError: If no cluster is detected and no address is given.
    """
    try:
        jax.distributed.initialize(
            where.coordinator,
            where.count,
            where.index,
            cluster_detection_method=None if where.coordinator is None else "deactivate",
            initialization_timeout=max(1, int(timeouts.join)),
            # Our own monitor acts first, with an error message; JAX's aborts the process.
            heartbeat_timeout_seconds=max(100, int(3 * timeouts.lost)),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed detected no cluster ({first_line(error)}); on a cluster that "
            "JAX does not detect, give --coordinator=HOST:PORT and --process=I/N"
        ) from error
    _watch().begin(timeouts)


def index() -> int:
    """Returns the index of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """Returns the number of processes in the run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def first(compute: Callable[[], Value]) -> Value:
    """Runs a function on process 0 and returns its result, or raises its error, on every process.

    All processes must call it, in the same order.

    Args:
        compute: Function that only process 0 calls; its result must be JSON-serializable.
    """
    if count() == 1:
        return compute()
    watch = _watch()
    assert not watch.telling, "first within first: process 0 alone would wait for the others"
    # Values are numbered, which is why all processes must call in the same order.
    watch.told += 1
    key = f"swe_prune/told/{watch.told}"
    # The other processes wait for the value or the error of process 0.
    if index() > 0:
        told = json.loads(_client().blocking_key_value_get(key, FOREVER_MS))
        if "error" in told:
            raise ERRORS[told["error"]](told["says"])
        return told["value"]
    # Process 0 broadcasts the value, or an error that all processes then raise.
    watch.telling = True
    try:
        value = compute()
    except (InputError, RunError, Preempted) as error:
        kind = next(name for name, one in ERRORS.items() if isinstance(error, one))
        _client().key_value_set(key, json.dumps({"error": kind, "says": str(error)}))
        raise
    except OSError as error:
        reason = error.strerror or error
        failed = RunError(f"writing or reading {error.filename!r} failed ({reason})")
        _client().key_value_set(key, json.dumps({"error": "RunError", "says": str(failed)}))
        raise failed from error
    finally:
        watch.telling = False
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def gather(value: Value) -> list[Value]:
    """Returns the values of all processes, ordered by process index.

    All processes must call it, in the same order.

    Args:
        value: JSON-serializable value of this process.
    """
    if count() == 1:
        return [value]
    watch = _watch()
    watch.gathered += 1
    key = f"swe_prune/gathered/{watch.gathered}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    texts = [_client().blocking_key_value_get(f"{key}/{i}", FOREVER_MS) for i in range(count())]
    return [json.loads(text) for text in texts]


def check_same(settings: dict[str, Any]) -> None:
    """Checks that all processes were started with the same settings.

    Args:
        settings: Settings by name, compared by their repr.

    Raises:
        InputError: On every process, if a setting differs; the error names it and the process.
    """
    every = gather({key: repr(value) for key, value in settings.items()})
    for number, theirs in enumerate(every):
        for key in {**every[0], **theirs}:
            here, there = every[0].get(key, "not set"), theirs.get(key, "not set")
            if here != there:
                raise InputError(
                    f"process {number} has {key} = {there} and process 0 {here}; start all with "
                    "the same command and code"
                )


def progress() -> None:
    """Records progress of this process, such as a dispatched step or a finished cell."""
    _watch().steps += 1


def fail(error: BaseException, code: int) -> None:
    """Reports an error to the other processes and ends this one; returns if it is the only one.

    Process 0 prints the message, whichever process failed.

    Args:
        error: Error that ends this process.
        code: Exit code.
    """
    if count() == 1:
        return
    watch = _watch()
    watch.stop(str(error), code, culprit=index())


def await_verdict(error: Exception) -> None:
    """Waits for the monitor if an error may be due to another process's death.

    A collective operation fails as soon as a peer dies, seconds before the monitor can tell that
    the peer is silent. If a peer did die, the monitor ends this process with a message that names
    it, and this function does not return.

    Args:
        error: Error that was raised in this process.
    """
    if count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        _watch().await_verdict()


class _Watch:
    """Threads that send heartbeats and end this process when another one is lost."""

    def __init__(self) -> None:
        self.told = 0  # number of values broadcast by process 0
        self.gathered = 0  # number of calls to `gather`
        self.telling = False
        self.steps = 0
        self._ending = threading.RLock()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._period = min(1.0, timeouts.lost / 5)
        self._round = time.monotonic()
        for target in [self._run] if index() == 0 else [self._run, self._watch_first]:
            self._threads.append(threading.Thread(target=target, name="swe_prune", daemon=True))
            self._threads[-1].start()

    def _watch_first(self) -> None:
        """Ends this process when the key-value store, which process 0 hosts, stops answering."""
        patience = self._timeouts.lost + 10 * self._period
        while time.monotonic() - self._round < patience:
            if self._over.wait(self._period):
                return
        say(f"process 0 has not answered for {patience:g} s; run the same command again to go on")
        os._exit(RunError.exit_code)

    def _run(self) -> None:
        beats = 0
        # By process index: the last heartbeat and when it changed, and the last step count and when
        # that changed. All processes have joined, so one that dies before its first heartbeat
        # counts as lost too.
        silent = {"n": 0, "steps": 0, "host": None}
        seen = {number: (silent, time.monotonic()) for number in range(count())}
        moved: dict[int, tuple[int, float]] = {}
        parent = os.environ.get(SUPERVISED)
        while not self._over.is_set():
            if parent is not None and os.getppid() != int(parent):
                os._exit(RunError.exit_code)  # the parent was killed, so nobody reads the output
            # Send our heartbeat and read those of the others.
            beats += 1
            self._round = now = time.monotonic()
            self._publish("beat", {"n": beats, "steps": self.steps, "host": socket.gethostname()})
            for number, said in self._read("beat").items():
                if seen[number][0]["n"] != said["n"]:
                    seen[number] = (said, now)
                if number not in moved or moved[number][0] != said["steps"]:
                    moved[number] = (said["steps"], now)
            # A failure that another process reported ends this one too.
            for number, failure in self._read("failed").items():
                if number != index():
                    self.stop(failure["says"], failure["code"], culprit=number)
            # A process that is silent without having finished is lost.
            ended = self._read("ended")
            for number, (said, when) in seen.items():
                if number not in ended and now - when > self._timeouts.lost:
                    self._stop_without(number, said["host"])
            # Heartbeats continue while a collective operation hangs; step counts do not.
            still = now - max(when for _, when in moved.values()) if moved else 0.0
            if not ended and still > self._timeouts.hang:
                least = min(steps for steps, _ in moved.values())
                slow = [number for number, (steps, _) in moved.items() if steps == least]
                self._stop_hanging(
                    ", ".join(f"{number} on {seen[number][0]['host']}" for number in slow)
                )
            self._over.wait(self._period)

    def _stop_without(self, number: int, host: str | None) -> None:
        where = f" on {host}" if host else ""
        self.stop(
            f"process {number}{where} has given no sign of life for {self._timeouts.lost:g} s: it "
            "or its machine died; run the same command again to continue from the last checkpoint",
            RunError.exit_code,
            culprit=None,
        )

    def _stop_hanging(self, furthest_behind: str) -> None:
        self.stop(
            f"no process has made progress for {self._timeouts.hang:g} s, furthest behind: process "
            f"{furthest_behind}; find out what it waits for, or raise SWE_PRUNE_HANG_TIMEOUT, and "
            "run the same command again",
            RunError.exit_code,
            culprit=None,
        )

    def _publish(self, kind: str, value: Any) -> None:
        text = json.dumps(value)
        try:
            _client().key_value_set(f"swe_prune/{kind}/{index()}", text, allow_overwrite=True)
        except Exception:  # a jaxlib error: process 0 hosts the store, so it is gone
            self._without_first()

    def _read(self, kind: str) -> dict[int, Any]:
        try:
            found = _client().key_value_dir_get(f"swe_prune/{kind}/")
        except Exception:  # as in _publish
            self._without_first()
            return {}
        return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}

    def _without_first(self) -> None:
        with self._ending:
            say(FIRST_GONE)
            os._exit(RunError.exit_code)

    def stop(self, says: str, code: int, culprit: int | None) -> None:
        with self._ending:
            # Publish the failure before ending, so that the other processes can report it.
            self._publish("failed", {"says": says, "code": code})
            deadline = time.monotonic() + 5 * self._period + 1
            if index() == 0:
                say(says if culprit in (0, None) else f"process {culprit}: {says}")
                # The store ends with process 0, so the others must read the error first.
                while time.monotonic() < deadline and len(self._read("failed")) < count():
                    time.sleep(self._period / 5)
                time.sleep(self._period)
            else:  # give process 0 time to read the error, if it is still alive
                while time.monotonic() < deadline and 0 not in self._read("failed"):
                    time.sleep(self._period / 5)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def await_verdict(self) -> None:
        time.sleep(self._timeouts.lost + 5 * self._period)

    def end(self) -> None:
        """Reports that this process has finished, and waits until all have.

        Then joins the monitor threads: the interpreter must not shut down while one of them is
        inside the store's C++ code, which would abort the process.
        """
        self._publish("ended", True)
        while len(self._read("ended")) < count():
            time.sleep(self._period / 5)
        self._over.set()
        for thread in self._threads:
            thread.join()


def end() -> None:
    """Leaves the run once all processes have finished."""
    if count() > 1:
        _watch().end()


@functools.cache
def _watch() -> _Watch:
    return _Watch()


def _client() -> Any:
    # The only private JAX name used here. Orbax and others use it too, since the store has no
    # public API.
    from jax._src import distributed

    return distributed.global_state.client
