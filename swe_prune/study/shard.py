"""Several processes share one study: which cells each of them takes."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from swe_prune.errors import InputError
from swe_prune.runtime import processes

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several processes that share a study.

    Attributes:
        index: Number of this process, from 0.
        count: Number of processes.
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
        InputError: It says none.

    >>> parse("0/4")
    Shard(index=0, count=4)
    """
    if (which := processes.numbered(text)) is None:
        raise InputError(
            f"--shard={text} is not a share of the work; give i/n with i from 0 to n - 1, as in 0/2"
        )
    return Shard(*which)
