"""Locks on folders: an operating-system lock on disk, a lease in a bucket."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator

from etils import epath

from swe_prune.errors import RunError, first_line
from swe_prune.runtime import lease, processes, storage


@contextlib.contextmanager
def lock_for_run(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Locks a folder for all processes of this run, waiting while another run has it locked.

    Process 0 holds the lock for all of them.

    Args:
        folder: Folder to lock; created if it does not exist.
        what: Description of the work done in the folder, for the message.
        say: Callback that receives one message when waiting starts.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(lock(folder, what, say)))
        yield


@contextlib.contextmanager
def lock(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Locks a folder for this process, waiting while another process has it locked.

    The operating system releases the lock when the process ends, however it ends. In a bucket the
    lock is a lease.

    Args:
        folder: Folder to lock; created if it does not exist.
        what: Description of the work done in the folder, for the message.
        say: Callback that receives one message when waiting starts.

    Raises:
        RunError: If the folder is in a bucket that cannot be reached.
    """
    folder = epath.Path(folder)
    if storage.in_bucket(folder):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lease.acquire(lease.store(folder), ".lock", what, on_wait=say))
            except (OSError, ValueError, RuntimeError) as error:
                raise RunError(
                    f"{str(folder)!r} cannot be locked ({first_line(error)}); check that "
                    "this machine can reach the bucket and run the same command again; finished "
                    "work is kept"
                ) from error
            yield
        return
    storage.check_held()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is at the {what}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
