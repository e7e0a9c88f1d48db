"""Several processes that do one run together: who they are, what they agree on, how they end.

Every process runs the same program. What touches files or the user is done by the first alone, and
what it finds is told to the others, so that all of them take the same branches:

    if processes.first(path.exists): ...            # process 0 looks, all know
    processes.first(lambda: write_json(path, x))    # process 0 writes, or all raise its error

The telling goes through the key-value store of JAX's own coordination service. A process that
fails says so there before it ends; one that dies or hangs stops writing there, and the others end
themselves, since nothing else could: they wait inside a collective operation that never returns.
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

from swe_prune.errors import InputError, Preempted, RunError
from swe_prune.runtime.supervisor import FIRST_GONE, SUPERVISED, say

Value = TypeVar("Value")

ERRORS = {kind.__name__: kind for kind in (InputError, RunError, Preempted)}
FOREVER_MS = 7 * 24 * 3600 * 1000  # the watch ends a wait for one that is gone much sooner


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """How long, in seconds, others are waited for; of the environment, as machines differ in it.

    Attributes:
        join: for all processes to come up: SWE_PRUNE_JOIN_TIMEOUT.
        lost: for a sign of life of another: SWE_PRUNE_LOST_TIMEOUT.
        hang: for progress of any kind, compilation included: SWE_PRUNE_HANG_TIMEOUT.
    """

    join: float = 300.0
    lost: float = 60.0
    hang: float = 1800.0

    @classmethod
    def of_environment(cls) -> "Timeouts":
        """Returns those that the environment gives, else the defaults.

        Raises:
            InputError: one is no number above 0.
        """
        given = {}
        for field in dataclasses.fields(cls):
            name = f"SWE_PRUNE_{field.name.upper()}_TIMEOUT"
            text = os.environ.get(name)
            if text is not None:
                if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or float(text) <= 0:
                    raise InputError(f"{name}={text} is no number of seconds above 0; correct it")
                given[field.name] = float(text)
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class ProcessAddress:
    """Which process this is, of how many, and where the first one listens.

    Attributes:
        coordinator: HOST:PORT, None: as the cluster's environment says.
        index: from 0; None likewise.
        count: of all; None likewise.
    """

    coordinator: str | None = None
    index: int | None = None
    count: int | None = None


def process_address(coordinator: str | None, process: str | None) -> ProcessAddress:
    """Returns the place that the command line says, each given or neither.

    Raises:
        InputError: one without the other, or one that is malformed.

    >>> process_address("10.0.0.1:8476", "1/4")
    ProcessAddress(coordinator='10.0.0.1:8476', index=1, count=4)
    """
    if coordinator is None and process is None:
        return ProcessAddress()
    if coordinator is None or process is None:
        raise InputError(
            "--coordinator=HOST:PORT and --process=I/N belong together; give both, or --distributed"
        )
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
        raise InputError(f"--coordinator={coordinator} is no HOST:PORT; give one of process 0")
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", process)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--process={process} is none; give I/N with I from 0 to N - 1")
    return ProcessAddress(coordinator, int(match[1]), int(match[2]))


def start(where: ProcessAddress, timeouts: Timeouts) -> None:
    """Joins the other processes and begins to watch them; before anything else uses a device.

    Raises:
        InputError: the environment does not say who the others are.
    """
    try:
        jax.distributed.initialize(
            where.coordinator,
            where.count,
            where.index,
            cluster_detection_method=None if where.coordinator is None else "deactivate",
            initialization_timeout=max(1, int(timeouts.join)),
            # Ours comes first, with a sentence; this one aborts the process.
            heartbeat_timeout_seconds=max(100, int(3 * timeouts.lost)),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed finds no cluster it knows ({str(error).splitlines()[0]}); on one that "
            "JAX does not detect give --coordinator=HOST:PORT and --process=I/N"
        ) from error
    _watch().begin(timeouts)


def index() -> int:
    """Returns which process this is, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """Returns how many processes do the run together."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def first(compute: Callable[[], Value]) -> Value:
    """Returns on every process what process 0 computes, or raises there what it raises.

    All processes must call it, in the same order.

    Args:
        compute: run by process 0 alone; gives something that JSON can hold.
    """
    if count() == 1:
        return compute()
    watch = _watch()
    assert not watch.telling, "first within first: process 0 alone would wait for the others"
    watch.told += 1
    key = f"swe_prune/told/{watch.told}"
    if index() > 0:
        told = json.loads(_client().blocking_key_value_get(key, FOREVER_MS))
        if "error" in told:
            raise ERRORS[told["error"]](told["says"])
        return told["value"]
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
    """Returns the values of all processes, in their order; all must call it, in the same order.

    Args:
        value: of this process; something that JSON can hold.
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
    """Checks that all processes were given the same settings.

    Args:
        settings: by name, as text can show them.

    Raises:
        InputError: on every process, naming one that differs and in what.
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
    """Says that this process goes on: a step was dispatched, a cell was done."""
    _watch().steps += 1


def fail(error: BaseException, code: int) -> None:
    """Tells the others why this process ends, and ends it; in a run of one process, returns.

    Process 0 prints the sentence, its own or that of the process that failed.
    """
    if count() == 1:
        return
    watch = _watch()
    watch.stop(str(error), code, culprit=index())


def await_verdict(error: Exception) -> None:
    """Where an error may come of another process's end, waits until the watch would have noticed.

    A collective operation breaks off at once when a process at its other end dies, seconds before
    that process's silence is long enough to be called so. The watch then ends this process with
    the sentence that names the other, and this does not return.
    """
    if count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        _watch().await_verdict()


class _Watch:
    """The thread that tells the others of this process and ends it when one of them is gone."""

    def __init__(self) -> None:
        self.told = 0  # values that process 0 has told
        self.gathered = 0  # times that the processes told each other
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
        """Ends this process when the store, which process 0 keeps, answers no more at all."""
        patience = self._timeouts.lost + 10 * self._period
        while time.monotonic() - self._round < patience:
            if self._over.wait(self._period):
                return
        say(f"process 0 has not answered for {patience:g} s; run the same command again to go on")
        os._exit(RunError.exit_code)

    def _run(self) -> None:
        beats = 0
        # By number, the last that a process said and when that, or its step, was new. All have
        # joined; one that dies before its first beat must be missed as well.
        silent = {"n": 0, "steps": 0, "host": None}
        seen = {number: (silent, time.monotonic()) for number in range(count())}
        moved: dict[int, tuple[int, float]] = {}
        parent = os.environ.get(SUPERVISED)
        while not self._over.is_set():
            if parent is not None and os.getppid() != int(parent):
                os._exit(RunError.exit_code)  # the parent was killed, and nobody listens
            beats += 1
            self._round = now = time.monotonic()
            self._publish("beat", {"n": beats, "steps": self.steps, "host": socket.gethostname()})
            for number, said in self._read("beat").items():
                if seen[number][0]["n"] != said["n"]:
                    seen[number] = (said, now)
                if number not in moved or moved[number][0] != said["steps"]:
                    moved[number] = (said["steps"], now)
            for number, failure in self._read("failed").items():
                if number != index():
                    self.stop(failure["says"], failure["code"], culprit=number)
            ended = self._read("ended")
            for number, (said, when) in seen.items():
                if number not in ended and now - when > self._timeouts.lost:
                    self._stop_without(number, said["host"])
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
            "died or its machine did; run the same command again to go on from the last checkpoint",
            RunError.exit_code,
            culprit=None,
        )

    def _stop_hanging(self, furthest_behind: str) -> None:
        self.stop(
            f"no process has gone on for {self._timeouts.hang:g} s, furthest behind: process "
            f"{furthest_behind}; look at what it waits for, or raise SWE_PRUNE_HANG_TIMEOUT, and "
            "run the same command again",
            RunError.exit_code,
            culprit=None,
        )

    def _publish(self, kind: str, value: Any) -> None:
        text = json.dumps(value)
        try:
            _client().key_value_set(f"swe_prune/{kind}/{index()}", text, allow_overwrite=True)
        except Exception:  # jaxlib's own error; process 0 keeps the store, so process 0 is gone
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
            self._publish("failed", {"says": says, "code": code})
            deadline = time.monotonic() + 5 * self._period + 1
            if index() == 0:
                say(says if culprit in (0, None) else f"process {culprit}: {says}")
                # The store is gone with process 0: the others must have read it before.
                while time.monotonic() < deadline and len(self._read("failed")) < count():
                    time.sleep(self._period / 5)
                time.sleep(self._period)
            else:  # for process 0 to read it, if it is still there
                while time.monotonic() < deadline and 0 not in self._read("failed"):
                    time.sleep(self._period / 5)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def await_verdict(self) -> None:
        time.sleep(self._timeouts.lost + 5 * self._period)

    def end(self) -> None:
        """Says that this process has done its part, and watches until all have.

        Its threads end then: the interpreter must not shut down while one is inside the store's
        C++, which would abort the process.
        """
        self._publish("ended", True)
        while len(self._read("ended")) < count():
            time.sleep(self._period / 5)
        self._over.set()
        for thread in self._threads:
            thread.join()


def end() -> None:
    """Leaves the run when it is done, together with the others."""
    if count() > 1:
        _watch().end()


@functools.cache
def _watch() -> _Watch:
    return _Watch()


def _client() -> Any:
    # The one private name of JAX that is used here: orbax and others use it too, since the store
    # has no public one.
    from jax._src import distributed

    return distributed.global_state.client
