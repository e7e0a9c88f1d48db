"""Whole numbers of weights: what a share of so many weights is, and how parts add up to it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from swe_prune.errors import InputError


def check_sparsity(sparsity: Any) -> None:
    """Raises InputError for a sparsity outside [0, 1)."""
    number = isinstance(sparsity, int | float | np.number)
    if not number or not 0 <= sparsity < 1:
        raise InputError(
            f"sparsity = {sparsity!r} is no share in [0, 1); give the share of weights to remove"
        )


def removed_count(size: int, sparsity: float) -> int:
    """Returns how many of `size` elements a sparsity removes: the nearest integer, halves up.

    (Wanda and SparseGPT round down, which differs only where size · sparsity is no integer.)

    >>> removed_count(10, 0.25), removed_count(100, 0.29)
    (3, 29)
    """
    return int(size * sparsity + 0.5)


def apportion(targets: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Returns integers next to the targets that add up to a total: the largest remainder method.

    Every target is rounded down, and the units that are left go to the largest fractions, the
    first of equal ones first (Hamilton's apportionment). As in any such rounding, a part may lose
    one unit when the total grows.

    Args:
        targets: what each part should have, within [0, its size] and adding up to the total, both
            up to float64 rounding; what rounding spoils is made good.
        sizes: the most that each part can have.
        total: at most the sum of the sizes.

    >>> apportion([1.5, 0.25, 1.25], [2, 2, 2], 3)
    [2, 0, 1]
    """
    parts = [min(max(math.floor(t), 0), size) for t, size in zip(targets, sizes, strict=True)]
    remainders = [t - part for t, part in zip(targets, parts, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: -remainders[i])
    left = total - sum(parts)
    while left > 0:
        for i in by_remainder:
            more = min(left, 1, sizes[i] - parts[i])
            parts[i], left = parts[i] + more, left - more
    while left < 0:  # a sum of targets that floats put above the total
        for i in reversed(by_remainder):
            less = min(-left, 1, parts[i])
            parts[i], left = parts[i] - less, left + less
    return parts


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How many weights go of each tensor; `print` shows it as a table.

    Attributes:
        removed: by the name of the tensor, how many of its weights go.
        sizes: by the same names, how many weights it has.

    Raises:
        InputError: the two name different tensors, or a tensor would lose more than it has.

    >>> print(Allocation({"up": 30, "down": 5}, {"up": 40, "down": 10}))
    tensor  removed  of  sparsity
    up           30  40    75.00%
    down          5  10    50.00%
    total        35  50    70.00%
    """

    removed: dict[str, int]
    sizes: dict[str, int]

    def __post_init__(self):
        if self.removed.keys() != self.sizes.keys():
            odd = sorted(self.removed.keys() ^ self.sizes.keys())
            raise InputError(
                f"{odd[0]!r} has only one of removed and size; give both for every tensor"
            )
        for name, size in self.sizes.items():
            if not 0 <= self.removed[name] <= size:
                raise InputError(
                    f"{self.removed[name]} of the {size} weights of {name!r} cannot go; give "
                    f"0 ≤ removed ≤ {size}"
                )

    @property
    def removed_total(self) -> int:
        """How many weights go in all."""
        return sum(self.removed.values())

    @property
    def size_total(self) -> int:
        """How many weights there are in all."""
        return sum(self.sizes.values())

    @property
    def sparsity(self) -> float:
        """The share of all the weights that goes."""
        return self.removed_total / max(self.size_total, 1)

    @property
    def sparsities(self) -> dict[str, float]:
        """The share of each tensor's weights that goes."""
        return {name: self.removed[name] / max(size, 1) for name, size in self.sizes.items()}

    def __str__(self) -> str:
        shares = self.sparsities
        rows = [(name, self.removed[name], size, shares[name]) for name, size in self.sizes.items()]
        rows.append(("total", self.removed_total, self.size_total, self.sparsity))
        cells = [("tensor", "removed", "of", "sparsity")]
        cells += [(name, f"{gone:,}", f"{size:,}", f"{s:.2%}") for name, gone, size, s in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in cells
        )
