"""Locks on folders: the operating system's on disk, a lease in a bucket."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator

from etils import epath

from swe_prune.errors import RunError
from swe_prune.runtime import lease, processes, storage


@contextlib.contextmanager
def lock_for_run(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder against other runs, first waiting for the one that has it.

    The processes of one run hold it together, by the first of them. Arguments as in `lock`.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(lock(folder, what, say)))
        yield


@contextlib.contextmanager
def lock(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder for this process, first waiting for the one that has it.

    The lock is the operating system's: it is gone with the process, however that ends. In a bucket
    it is a lease.

    Args:
        folder: made when there is none.
        what: what the other process is doing there, for the message.
        say: told once that there is something to wait for.

    Raises:
        RunError: it is in a bucket that cannot be reached.
    """
    folder = epath.Path(folder)
    if storage.in_bucket(folder):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lease.acquire(lease.store(folder), ".lock", what, on_wait=say))
            except (OSError, ValueError, RuntimeError) as error:
                raise RunError(
                    f"{str(folder)!r} cannot be held ({str(error).splitlines()[0]}); see that this "
                    "machine reaches the bucket, and run the same command again, what was finished "
                    "is kept"
                ) from error
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is at the {what}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
