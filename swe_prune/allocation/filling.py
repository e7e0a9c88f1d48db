"""ECoFLaP's water-filling: weights are kept in proportion to importance, up to what there is."""

import heapq
import math
from collections.abc import Mapping, Sequence

from swe_prune.allocation import rounding
from swe_prune.allocation.rounding import Allocation
from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
def water_fill(
    scores: Sequence[float],
    sizes: Sequence[int],
    sparsity: float,
    max_sparsity: float | None = None,
) -> list[int]:
    """Returns how many weights each group keeps, in proportion to its importance.

    Every group starts with what `max_sparsity` leaves it. What is left of the total goes round by
    round to the groups in proportion to their scores, rounded up; a full group drops out. What the
    rounding put above the total is taken back, one by one, from the group that keeps the largest
    share of itself (where the reference adds it once more). When only scores of 0 are left, the
    rest goes to the groups in proportion to their room.

    ECoFLaP (Sung, Yoon and Bansal, ICLR 2024), its coarse step.

    Args:
        scores: Importance of each group, not negative.
        sizes: Number of weights of each group.
        sparsity: Share to remove of all the weights, in [0, 1); met exactly.
        max_sparsity: Largest share that a group may lose, in [sparsity, 1]; None: sparsity + 0.1,
            at most 1.

    Raises:
        InputError: A sparsity outside its range or out of reach of the groups, or scores that are
            negative or not finite.

    >>> water_fill([1, 1, 8], [1000] * 3, 0.5, 0.6)
    [430, 430, 640]
    """
    rounding.check_sparsity(sparsity)
    if len(scores) != len(sizes) or not sizes:
        raise InputError(
            f"scores and sizes must be of the same groups, one or more, got {len(scores)} and "
            f"{len(sizes)}"
        )
    most = min(sparsity + 0.1, 1.0) if max_sparsity is None else max_sparsity
    if not sparsity <= most <= 1:
        raise InputError(
            f"max_sparsity = {most} is not between the sparsity {sparsity} and 1; correct it"
        )
    for score in scores:
        if not 0 <= score < math.inf:
            raise InputError(
                f"the importance {score} of a group is negative or not finite; find out where the "
                "loss diverged"
            )
    total = sum(sizes) - rounding.removed_count(sum(sizes), sparsity)
    # The epsilon compensates for rounding: 0.7 · 10 may fall below 7.
    least = [size - math.floor(most * size + 1e-9) for size in sizes]
    if sum(least) > total:
        raise InputError(
            f"sparsity {sparsity} is out of reach: groups that may lose {most:.2%} each lose at "
            f"most {sum(sizes) - sum(least)} of {sum(sizes)} weights; raise max_sparsity"
        )
    return _without_excess(_filled(scores, sizes, least, total), sizes, least, total)


def _filled(
    scores: Sequence[float], sizes: Sequence[int], least: Sequence[int], total: int
) -> list[int]:
    """Returns what the groups keep when at least the total is reached."""
    keep = list(least)
    live = [float(s) if k < n else 0.0 for s, k, n in zip(scores, keep, sizes, strict=True)]
    while (rest := total - sum(keep)) > 0:
        if not any(live):
            live = [float(n - k) for n, k in zip(sizes, keep, strict=True)]
        whole = math.fsum(live)
        for i, score in enumerate(live):
            keep[i] += math.ceil(score * rest / whole)
            if keep[i] >= sizes[i]:
                keep[i], live[i] = sizes[i], 0.0
    return keep


def _without_excess(
    keep: list[int], sizes: Sequence[int], least: Sequence[int], total: int
) -> list[int]:
    # The last of equal ones gives first, as everywhere the first of equal ones keeps.
    fullest = [(-k / n, -i) for i, (k, n) in enumerate(zip(keep, sizes, strict=True)) if n]
    heapq.heapify(fullest)
    excess = sum(keep) - total
    while excess:
        i = -heapq.heappop(fullest)[1]
        if keep[i] > least[i]:
            keep[i], excess = keep[i] - 1, excess - 1
            heapq.heappush(fullest, (-keep[i] / sizes[i], -i))
    return keep


def within_groups(
    keep: Sequence[int], members: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> Allocation:
    """Returns the allocation in which every tensor of a group loses the group's share."""
    removed = dict.fromkeys(sizes, 0)
    for kept, names in zip(keep, members.values(), strict=True):
        inside = [sizes[name] for name in names]
        gone = sum(inside) - kept
        targets = [size * gone / max(sum(inside), 1) for size in inside]
        removed.update(zip(names, rounding.apportion(targets, inside, gone), strict=True))
    return Allocation(removed, dict(sizes))
