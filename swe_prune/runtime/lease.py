"""Holding a name in a bucket: a lease, since an object store has no lock that dies with a process.

The holder writes an object with its host and process number, and again and again, each time on the
condition that nobody else has written since (the store's own generations). Whoever finds the object
watches it: one that changes has a living holder; one that does not change for `patience` seconds by
the watcher's own clock is of one that died, and is taken over, again on the condition that nobody
else was faster. No two clocks are ever compared. A holder that could not write for three quarters
of that time, or finds itself taken over, ends its process: it must not write beside another.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import tensorstore as ts
from etils import epath

from swe_prune.errors import InputError, RunError
from swe_prune.runtime.processes import Timeouts
from swe_prune.runtime.supervisor import say as tell

RENEWALS = 6  # in the time after which the holder is taken for dead
LAST = 0.75  # of that time: without a renewal for so long, the holder gives up
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}


def store(folder: epath.Path) -> ts.KvStore:
    """Returns the objects below an address in a bucket, as a store that can write on condition."""
    bucket, _, inside = os.fspath(folder).removeprefix("gs://").partition("/")
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")  # as orbax chooses
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket}
    if inside:
        spec["path"] = inside.rstrip("/") + "/"
    return ts.KvStore.open(spec, context=ts.Context({"gcs_request_retries": RETRIES})).result()


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a name.

    Attributes:
        owner: a random name of this hold.
        host: the machine.
        pid: the process there.
        patience: seconds without a sign after which it may be taken for dead.
        beats: how many signs it has given.
    """

    owner: str
    host: str
    pid: int
    patience: float
    beats: int = 0


@contextlib.contextmanager
def acquire(
    objects: ts.KvStore,
    name: str,
    what: str,
    *,
    wait: Callable[[str], None] | None = None,
    look: Callable[[str], None] = lambda _: None,
    end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Holds a name against other processes.

    Args:
        objects: where.
        name: of the object.
        what: it stands for, in messages.
        wait: waits for a living holder, and is told once that it does; None: that is an error.
        look: where there is a holder and no waiting for it: told that it is watched.
        end: told why the hold was lost, from another thread; None: says so and ends the process.

    Raises:
        InputError: a living process has it.
    """
    patience = Timeouts.of_environment().lost
    me = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), patience)
    lease = _Lease(objects, name, what, me, end or _end)
    lease.take(wait, look)
    thread = threading.Thread(target=lease.renew, name=f"lease {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.over.set()
        thread.join()
        lease.release()


def alive(objects: ts.KvStore, names: Sequence[str]) -> Holder | None:
    """Returns a living holder of one of some names, once it is seen to live; None if there is none.

    What a dead one left is removed.
    """
    watches = {name: _Watch(Timeouts.of_environment().lost) for name in names}
    while watches:
        for name, watch in list(watches.items()):
            found = objects.read(name).result()
            holder = _holder(found)
            if holder is not None and watch.lives(holder, found.stamp.generation):
                return holder
            if holder is None or watch.gone():
                if found.state == "value":
                    _write(objects, name, None, found.stamp.generation)
                del watches[name]
        time.sleep(_pause(Timeouts.of_environment().lost) if watches else 0)
    return None


class _Watch:
    """What is seen of one holder, by this process's own clock."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: bytes | None = None
        self._since = time.monotonic()

    def lives(self, holder: Holder, generation: bytes) -> bool:
        """Takes a look; returns whether the object has changed since the last one."""
        if self._seen == generation:
            return False
        first, self._seen, self._since = self._seen is None, generation, time.monotonic()
        self._patience = max(self._patience, holder.patience)
        return not first

    def gone(self) -> bool:
        """Returns whether it has not changed for so long that its holder must be dead."""
        return time.monotonic() - self._since > self._patience


class _Lease:
    def __init__(
        self, objects: ts.KvStore, name: str, what: str, me: Holder, end: Callable[[str], None]
    ) -> None:
        self.over = threading.Event()
        self._objects, self._name, self._what, self._me, self._end = objects, name, what, me, end
        self._generation = b""
        self._written = time.monotonic()

    def take(self, wait: Callable[[str], None] | None, look: Callable[[str], None]) -> None:
        """Takes the name when it is free, or its holder is dead."""
        watch, told = _Watch(self._me.patience), False
        while True:
            found = self._objects.read(self._name).result()
            holder = _holder(found)
            if holder is not None and holder.owner == self._me.owner:
                # Our own write, whose answer was lost.
                self._generation = found.stamp.generation
                return
            lives = holder is not None and watch.lives(holder, found.stamp.generation)
            if lives and wait is None:
                raise InputError(in_use(self._what, holder))
            if holder is None or watch.gone():
                self._written = time.monotonic()
                if self._put(found.stamp.generation):
                    return
                continue
            if not told:
                (wait or look)(_waiting(self._what, holder, wait is not None))
                told = True
            time.sleep(_pause(self._me.patience))

    def renew(self) -> None:
        """Writes a new sign again and again until the hold is over."""
        while not self.over.wait(self._period()):
            self._me = dataclasses.replace(self._me, beats=self._me.beats + 1)
            reason = "it could not be reached"
            try:
                if self._put(self._generation):
                    continue
                found = self._objects.read(self._name).result(timeout=self._period())
                other = _holder(found)
                if other is not None and other.owner == self._me.owner:
                    self._generation = found.stamp.generation
                    continue
                reason = f"process {other.pid} on {other.host} took it" if other else "it was freed"
            except (TimeoutError, OSError, ValueError, RuntimeError):
                if self._period() > 0:
                    continue
            self._end(
                f"the hold on the {self._what} was lost ({reason}): this process had not renewed "
                f"it for {time.monotonic() - self._written:.0f} s; run the same command again"
            )
            return

    def _period(self) -> float:
        """Returns seconds until the next sign, or until it is too late for one, 0 from then on."""
        left = self._written + LAST * self._me.patience - time.monotonic()
        return max(0.0, min(self._me.patience / RENEWALS, left))

    def release(self) -> None:
        # One that cannot be removed ends by itself.
        with contextlib.suppress(TimeoutError, OSError, ValueError, RuntimeError):
            _write(self._objects, self._name, None, self._generation)

    def _put(self, generation: bytes) -> bool:
        began = time.monotonic()
        text = json.dumps(dataclasses.asdict(self._me)).encode()
        now = _write(self._objects, self._name, text, generation, self._period())
        if now is None:
            return False
        self._generation, self._written = now, began
        return True


def _waiting(what: str, holder: Holder, patiently: bool) -> str:
    if patiently:
        return f"another process is at the {what}; waiting for it"
    return (
        f"{what} is held by process {holder.pid} on {holder.host}; watching for up to "
        f"{holder.patience:g} s whether that lives"
    )


def in_use(what: str, holder: Holder | None) -> str:
    """Returns the sentence that says that something is another's."""
    by = f" (process {holder.pid} on {holder.host})" if holder else ""
    return f"{what} is in use by another run{by}; wait for it or choose another"


def _write(
    objects: ts.KvStore, name: str, text: bytes | None, generation: bytes, timeout: float = 60.0
) -> bytes | None:
    """Writes, or deletes, on the condition of a generation; returns the new one, or None."""
    now = objects.write(name, text, if_equal=generation).result(timeout=timeout).generation
    return now or None


def _holder(found: Any) -> Holder | None:
    """Returns who a read object names; None where there is none or it is not ours to read."""
    if found.state != "value":
        return None
    try:
        return Holder(**json.loads(found.value))
    except (ValueError, TypeError):
        return None


def _pause(patience: float) -> float:
    return min(1.0, patience / 20)


def _end(says: str) -> NoReturn:
    tell(says)
    os._exit(RunError.exit_code)
