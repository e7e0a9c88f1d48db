"""Whole numbers of weights: what a share of so many weights is, and how parts add up to it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
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


def scale_to_total(
    shares: Sequence[float], sizes: Sequence[int], total: int
) -> tuple[list[float], float]:
    """Returns min(1, factor · share) and the factor, such that these shares make a total.

    Args:
        shares: positive, in any unit.
        sizes: what the shares are of.
        total: at most the sum of the sizes.

    >>> scale_to_total([1, 1, 8], [10, 10, 10], 14)
    ([0.2, 0.2, 1.0], 0.2)
    """
    full: set[int] = set()
    factor = 0.0
    while whole := math.fsum(shares[i] * sizes[i] for i in range(len(sizes)) if i not in full):
        factor = (total - sum(sizes[i] for i in full)) / whole
        over = {i for i, share in enumerate(shares) if i not in full and factor * share > 1}
        if not over:
            break
        full |= over
    return [1.0 if i in full else factor * share for i, share in enumerate(shares)], factor


def shift_to_total(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """Returns the shares plus one number, within [0, 1], at which they make a total of the sizes.

    >>> [round(share, 6) for share in shift_to_total([0.0, 0.5], [10, 10], 12)]
    [0.35, 0.85]
    """

    def clipped(shift: float) -> list[float]:
        return [min(max(share + shift, 0.0), 1.0) for share in shares]

    low, high = -max(shares), 1 - min(shares)
    for _ in range(100):  # halves the bracket to the last bit
        middle = (low + high) / 2
        reached = math.fsum(s * size for s, size in zip(clipped(middle), sizes, strict=True))
        low, high = (middle, high) if reached < total else (low, middle)
    return clipped(high)


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


def round_to_total(
    targets: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> Allocation:
    """Returns the allocation next to the targets whose total is `removed_count(all, sparsity)`."""
    total = removed_count(sum(sizes.values()), sparsity)
    parts = apportion([targets[name] for name in sizes], [*sizes.values()], total)
    return Allocation(dict(zip(sizes, parts, strict=True)), dict(sizes))


def shift_groups_to_total(
    sparsities: Sequence[float],
    members: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    sparsity: float,
) -> Allocation:
    """Returns the allocation whose groups have these sparsities, shifted alike to meet the total.

    Args:
        sparsities: of each group, in the order of `members`.
        members: the names of the tensors of each group.
        sizes: of every tensor.
        sparsity: share to remove of all the weights.
    """
    whole = [sum(sizes[name] for name in names) for names in members.values()]
    met = shift_to_total(sparsities, whole, removed_count(sum(sizes.values()), sparsity))
    targets = dict.fromkeys(sizes, 0.0)
    for share, names in zip(met, members.values(), strict=True):
        targets.update({name: share * sizes[name] for name in names})
    return round_to_total(targets, sizes, sparsity)
