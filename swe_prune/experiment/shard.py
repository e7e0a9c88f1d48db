"""Several processes on one working directory: who does what, and who waits for whom."""

import contextlib
import dataclasses
import fcntl
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from etils import epath

from swe_prune import processes, storage
from swe_prune.errors import InputError, RunError
from swe_prune.experiment import lease

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several processes that share a study.

    Attributes:
        index: which one, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items whose number leaves `index` when divided by `count`.

        >>> Shard(1, 3).part(["a", "b", "c", "d", "e"])
        ['b', 'e']
        """
        return list(items[self.index :: self.count])


def parse(text: str) -> Shard:
    """Returns the shard that `i/n` says.

    Raises:
        InputError: it says none.

    >>> parse("0/4")
    Shard(index=0, count=4)
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*/\s*([0-9]+)\s*", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(
            f"--shard={text} is no share of the work; give i/n with i from 0 to n - 1, such as 0/2"
        )
    return Shard(int(match[1]), int(match[2]))


@contextlib.contextmanager
def held(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder against other runs, first waiting for the one that has it.

    The processes of one run hold it together, by the first of them. Arguments as in `locked`.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(locked(folder, what, say)))
        yield


@contextlib.contextmanager
def locked(folder: epath.PathLike, what: str, say: Callable[[str], None]) -> Iterator[None]:
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
                stack.enter_context(lease.held(lease.store(folder), ".lock", what, wait=say))
            except (OSError, ValueError, RuntimeError) as error:
                raise RunError(
                    f"{str(folder)!r} cannot be held ({str(error).splitlines()[0]}); see that this "
                    "machine reaches the bucket, and run the same command again, what was finished "
                    "is kept"
                ) from error
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is at the {what}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
