"""Exact integer numbers of weights: rounding, and distributing a total over tensors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swe_prune.arguments import checked
from swe_prune.errors import InputError, shown


def check_sparsity(sparsity: Any) -> None:
    """Raises InputError if the sparsity is not a number in [0, 1)."""
    number = isinstance(sparsity, int | float | np.number)
    if not number or not 0 <= sparsity < 1:
        raise InputError(
            "sparsity must be a number in [0, 1), the fraction of weights to remove, "
            f"got {shown(sparsity)}"
        )


@checked
def removed_count(size: int, sparsity: float) -> int:
    """Returns the number of elements that a sparsity removes, to the nearest integer, halves up.

    Wanda and SparseGPT round down, which differs only if size · sparsity is not an integer.

    Args:
        size: Number of elements.
        sparsity: Fraction to remove, in [0, 1).

    >>> removed_count(10, 0.25), removed_count(100, 0.29)
    (3, 29)
    """
    return int(size * sparsity + 0.5)


@checked
def least_kept(size: int, max_sparsity: float) -> int:
    """Returns how many elements stay at least when no more than a share may go.

    Raises:
        InputError: The share is not a number in (0, 1].

    >>> least_kept(10, 0.75), least_kept(10, 1.0)
    (2, 0)
    """
    if not isinstance(max_sparsity, int | float | np.number) or not 0 < max_sparsity <= 1:
        raise InputError(
            "max_sparsity must be a number in (0, 1], the largest fraction of a tensor to remove, "
            f"got {max_sparsity!r}"
        )
    # Rounded up, so that all tensors together can lose that share.
    return size - math.ceil(size * max_sparsity * (1 - 1e-12))


def check_room(size: int, keep: Any, least: int, max_sparsity: float) -> None:
    """Raises InputError if fewer elements are to stay than the largest sparsity leaves.

    Args:
        size: Number of elements of all tensors.
        keep: Number of them to retain; one that is traced is not checked.
        least: Number that stays if every tensor loses as much as it may.
        max_sparsity: Largest fraction of a tensor to remove.
    """
    if isinstance(keep, int) and keep < least:
        raise InputError(
            f"max_sparsity = {max_sparsity:g} allows to remove {size - least:,} of {size:,} "
            f"weights, and the sparsity asks for {size - keep:,}; raise max_sparsity or lower the "
            "sparsity"
        )


@checked
def apportion(targets: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Rounds targets to integers that add up to a total, by the largest remainder method.

    Every target is rounded down, and the remaining units go to the largest fractional parts, the
    first of equal ones first (Hamilton's apportionment). As with any such method, a part may lose
    one unit when the total grows.

    Args:
        targets: Targets of the parts, within [0, size] and adding up to the total, both up to
            float64 rounding, which is corrected.
        sizes: Upper bounds of the parts.
        total: Sum of the result, at most the sum of the sizes.

    >>> apportion([1.5, 0.25, 1.25], [2, 2, 2], 3)
    [2, 0, 1]
    """
    if len(targets) != len(sizes) or not 0 <= total <= sum(sizes):
        raise InputError(
            f"targets and sizes must be of the same parts and total at most their sum, got "
            f"{len(targets)}, {len(sizes)} and {total}"
        )
    # Round down, then distribute the remaining units by the fractional parts.
    parts = [min(max(math.floor(t), 0), size) for t, size in zip(targets, sizes, strict=True)]
    remainders = [t - part for t, part in zip(targets, parts, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: -remainders[i])
    left = total - sum(parts)
    while left > 0:
        for i in by_remainder:
            more = min(left, 1, sizes[i] - parts[i])
            parts[i], left = parts[i] + more, left - more
    while left < 0:  # float rounding put the sum of the targets above the total
        for i in reversed(by_remainder):
            less = min(-left, 1, parts[i])
            parts[i], left = parts[i] - less, left + less
    return parts


def scale_to_total(
    shares: Sequence[float], sizes: Sequence[int], total: int
) -> tuple[list[float], float]:
    """Scales shares by one factor, clipped to 1, such that they add up to a total.

    Args:
        shares: Positive numbers in any unit.
        sizes: Number of elements that each share applies to.
        total: Sum of share · size over the result, at most the sum of the sizes.

    Returns:
        The shares min(1, factor · share), and the factor.

    >>> scale_to_total([1, 1, 8], [10, 10, 10], 14)
    ([0.2, 0.2, 1.0], 0.2)
    """
    # Shares above 1 are clipped, and the factor is computed again for the rest.
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
    """Shifts shares by one number, clipped to [0, 1], such that they add up to a total.

    Args:
        shares: Numbers in [0, 1].
        sizes: Number of elements that each share applies to.
        total: Sum of share · size over the result.

    >>> [round(share, 6) for share in shift_to_total([0.0, 0.5], [10, 10], 12)]
    [0.35, 0.85]
    """

    def clipped(shift: float) -> list[float]:
        return [min(max(share + shift, 0.0), 1.0) for share in shares]

    # The total grows with the shift, so bisect it.
    low, high = -max(shares), 1 - min(shares)
    for _ in range(100):  # halves the bracket to the last bit
        middle = (low + high) / 2
        reached = math.fsum(s * size for s, size in zip(clipped(middle), sizes, strict=True))
        low, high = (middle, high) if reached < total else (low, middle)
    return clipped(high)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Number of weights to remove from each tensor; `print` shows it as a table.

    Attributes:
        removed: Number of weights to remove, by tensor name.
        sizes: Number of weights, by tensor name.

    Raises:
        InputError: If the two name different tensors, or a number is out of range.

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
                f"{odd[0]!r} is in only one of removed and sizes; give both for every tensor"
            )
        for name, size in self.sizes.items():
            if not 0 <= self.removed[name] <= size:
                raise InputError(
                    f"removed must be from 0 to the {size} weights of {name!r}, got "
                    f"{self.removed[name]}"
                )

    @property
    def removed_total(self) -> int:
        """Total number of weights to remove."""
        return sum(self.removed.values())

    @property
    def size_total(self) -> int:
        """Total number of weights."""
        return sum(self.sizes.values())

    @property
    def sparsity(self) -> float:
        """Fraction of all the weights to remove."""
        return self.removed_total / max(self.size_total, 1)

    @property
    def sparsities(self) -> dict[str, float]:
        """Fraction of weights to remove, by tensor name."""
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
    """Rounds targets to the allocation whose total is `removed_count(all, sparsity)`.

    Args:
        targets: Real number of weights to remove, by tensor name.
        sizes: Number of weights, by tensor name.
        sparsity: Fraction of all the weights to remove.
    """
    total = removed_count(sum(sizes.values()), sparsity)
    parts = apportion([targets[name] for name in sizes], [*sizes.values()], total)
    return Allocation(dict(zip(sizes, parts, strict=True)), dict(sizes))


def shift_groups_to_total(
    sparsities: Sequence[float],
    members: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    sparsity: float,
) -> Allocation:
    """Returns the allocation with the given group sparsities, shifted equally to meet the total.

    Args:
        sparsities: Sparsities of the groups, in the order of `members`.
        members: Names of the tensors in each group.
        sizes: Number of weights, by tensor name.
        sparsity: Fraction of all the weights to remove.
    """
    whole = [sum(sizes[name] for name in names) for names in members.values()]
    # Shift the sparsities of the groups, then round all tensors to the total.
    met = shift_to_total(sparsities, whole, removed_count(sum(sizes.values()), sparsity))
    targets = dict.fromkeys(sizes, 0.0)
    for share, names in zip(met, members.values(), strict=True):
        targets.update({name: share * sizes[name] for name in names})
    return round_to_total(targets, sizes, sparsity)
