"""Leases on names in a bucket, because an object store has no lock that dies with its process.

The holder writes an object with its host and process id and renews it periodically. Every write is
conditional on the object's generation, so it fails if another process has written since. A process
that finds the object watches it: if the object changes, its holder is alive; if it does not change
for `patience` seconds by the watcher's own clock, the holder is dead and the watcher takes the
lease over, again with a conditional write. Clocks of different machines are never compared. A
holder that could not renew for three quarters of that time, or finds that the lease was taken
over, ends its process, because two processes must not write to the same folder.
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

RENEWALS = 6  # per `patience` seconds
LAST = 0.75  # fraction of `patience` without a renewal after which the holder gives up
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}


def store(folder: epath.Path) -> ts.KvStore:
    """Returns a key-value store with conditional writes for the objects under a bucket folder."""
    bucket, _, inside = os.fspath(folder).removeprefix("gs://").partition("/")
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")  # the same choice as orbax
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket}
    if inside:
        spec["path"] = inside.rstrip("/") + "/"
    return ts.KvStore.open(spec, context=ts.Context({"gcs_request_retries": RETRIES})).result()


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    Attributes:
        owner: Random id of this hold.
        host: Host name of the machine.
        pid: Process id on that machine.
        patience: Seconds without a renewal after which the holder counts as dead.
        beats: Number of renewals so far.
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
    on_wait: Callable[[str], None] | None = None,
    on_watch: Callable[[str], None] = lambda _: None,
    on_lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Holds a lease on a name while the context is open.

    Args:
        objects: Store that the lease object is written to.
        name: Name of the lease object.
        what: Description of the locked resource, for messages.
        on_wait: Callback that receives one message when waiting for a live holder starts. If None,
            a live holder is an error.
        on_watch: Callback that receives one message when another holder is being watched and
            `on_wait` is None.
        on_lost: Callback that receives the reason when the lease is lost, called from another
            thread. If None, the reason is printed and the process ends.

    Raises:
        InputError: If a live process holds the lease and `on_wait` is None.
    """
    patience = Timeouts.of_environment().lost
    me = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), patience)
    lease = _Lease(objects, name, what, me, on_lost or _end)
    lease.take(on_wait, on_watch)
    thread = threading.Thread(target=lease.renew, name=f"lease {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.over.set()
        thread.join()
        lease.release()


def alive(objects: ts.KvStore, names: Sequence[str]) -> Holder | None:
    """Returns a live holder of one of the names as soon as one is seen, or None if there is none.

    Lease objects that dead holders left behind are removed.

    Args:
        objects: Store that the lease objects are in.
        names: Names of the lease objects.
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
    """Observations of one holder, timed with this process's own clock."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: bytes | None = None
        self._since = time.monotonic()

    def lives(self, holder: Holder, generation: bytes) -> bool:
        """Records an observation and returns whether the object changed since the previous one."""
        if self._seen == generation:
            return False
        first, self._seen, self._since = self._seen is None, generation, time.monotonic()
        self._patience = max(self._patience, holder.patience)
        return not first

    def gone(self) -> bool:
        """Returns whether the object has not changed for `patience`, so its holder must be dead."""
        return time.monotonic() - self._since > self._patience


class _Lease:
    def __init__(
        self, objects: ts.KvStore, name: str, what: str, me: Holder, on_lost: Callable[[str], None]
    ) -> None:
        self.over = threading.Event()
        self._objects, self._name, self._what, self._me = objects, name, what, me
        self._on_lost = on_lost
        self._generation = b""
        self._written = time.monotonic()

    def take(self, on_wait: Callable[[str], None] | None, on_watch: Callable[[str], None]) -> None:
        """Acquires the lease once it is free or its holder is dead."""
        watch, told = _Watch(self._me.patience), False
        while True:
            found = self._objects.read(self._name).result()
            holder = _holder(found)
            if holder is not None and holder.owner == self._me.owner:
                # Our own write succeeded but its response was lost.
                self._generation = found.stamp.generation
                return
            # A change since the last look proves that the holder is alive.
            lives = holder is not None and watch.lives(holder, found.stamp.generation)
            if lives and on_wait is None:
                raise InputError(in_use(self._what, holder))
            # Free or abandoned: the write below fails if another process was faster.
            if holder is None or watch.gone():
                self._written = time.monotonic()
                if self._put(found.stamp.generation):
                    return
                continue
            if not told:
                (on_wait or on_watch)(_waiting(self._what, holder, on_wait is not None))
                told = True
            time.sleep(_pause(self._me.patience))

    def renew(self) -> None:
        """Renews the lease periodically until it is released."""
        while not self.over.wait(self._period()):
            self._me = dataclasses.replace(self._me, beats=self._me.beats + 1)
            reason = "it could not be reached"
            try:
                if self._put(self._generation):
                    continue
                # The conditional write failed: either our last write went through unnoticed, or
                # another process owns the lease now.
                found = self._objects.read(self._name).result(timeout=self._period())
                other = _holder(found)
                if other is not None and other.owner == self._me.owner:
                    self._generation = found.stamp.generation
                    continue
                reason = f"process {other.pid} on {other.host} took it" if other else "it was freed"
            except (TimeoutError, OSError, ValueError, RuntimeError):
                if self._period() > 0:
                    continue
            self._on_lost(
                f"the hold on the {self._what} was lost ({reason}): this process had not renewed "
                f"it for {time.monotonic() - self._written:.0f} s; run the same command again"
            )
            return

    def _period(self) -> float:
        """Returns the seconds until the next renewal or the deadline, whichever comes first."""
        left = self._written + LAST * self._me.patience - time.monotonic()
        return max(0.0, min(self._me.patience / RENEWALS, left))

    def release(self) -> None:
        # A lease that cannot be removed expires.
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
        f"{what} is locked by process {holder.pid} on {holder.host}; watching for up to "
        f"{holder.patience:g} s to see whether that process is alive"
    )


def in_use(what: str, holder: Holder | None) -> str:
    """Returns the error message for a resource that another run has locked."""
    by = f" (process {holder.pid} on {holder.host})" if holder else ""
    return f"{what} is in use by another run{by}; wait for it or choose another"


def _write(
    objects: ts.KvStore, name: str, text: bytes | None, generation: bytes, timeout: float = 60.0
) -> bytes | None:
    """Writes or deletes if the generation matches; returns the new generation, or None."""
    now = objects.write(name, text, if_equal=generation).result(timeout=timeout).generation
    return now or None


def _holder(found: Any) -> Holder | None:
    """Returns the holder that a read object names, or None if it is absent or not a lease."""
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
