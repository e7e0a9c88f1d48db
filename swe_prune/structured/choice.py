"""The choice of units: a sparsity or a budget, uniform or by score, rounded to a multiple."""

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree

from swe_prune.allocation.rounding import check_sparsity, removed_count
from swe_prune.arguments import checked
from swe_prune.bounds import COUNT
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.masks.counts import Summary, Tally
from swe_prune.structured.budget import Budget
from swe_prune.structured.group import Group, Groups, check, check_keep

Keep = dict[str, np.ndarray]
Counts = dict[str, int]


@checked
def choose(
    groups: Groups,
    units: Mapping[str, Any],
    *,
    sparsity: float | None = None,
    budget: Budget | None = None,
    uniform: bool = True,
    multiple: int | None = None,
    params: PyTree | None = None,
    config: ModelConfig | None = None,
) -> Keep:
    """Returns the indices of the units to keep by group, ascending: (kept,) or (copies, kept).

    If uniform, each group keeps the same share of its best units, so that the layers of a model
    stay alike. Otherwise the units of all groups are ranked together, and layers get widths of
    their own: our models compute them, but stock transformers cannot load them. Ties go to the
    lower index.

    A group keeps a number of units that is a multiple, the nearest to what the sparsity leaves, or
    all of them if nothing is to be removed. Under a budget as many stay as it admits.

    Args:
        groups: Groups by name.
        units: Scores of the units by group, as `unit_scores` returns them; the largest stay.
        sparsity: Share of the units to remove, in [0, 1).
        budget: Limit of what the cut model costs, in place of a sparsity.
        uniform: Whether every group keeps the same share.
        multiple: Number that the count of kept units is a multiple of, such as 128 on a TPU. None:
            that of each group.
        params: Parameters before the cut, which may be abstract, for a budget.
        config: Config before the cut, for a budget of FLOPs or latency.

    Raises:
        InputError: Neither or both of sparsity and budget, scores that do not fit the groups, a
            budget that cannot be met, or nothing left of a group.

    >>> from swe_prune.structured import Group
    >>> groups = {"mlp": Group(4, {"up$": -1})}
    >>> choose(groups, {"mlp": np.array([3.0, 1.0, 2.0, 0.0])}, sparsity=0.5)["mlp"].tolist()
    [0, 2]
    """
    check(groups)
    scores = {name: _scores(name, group, units) for name, group in groups.items()}
    if (sparsity is None) == (budget is None):
        given = "neither was given" if sparsity is None else "both were given"
        raise InputError(f"choose must have a sparsity or a budget, {given}; give one of them")
    if multiple is not None:
        COUNT.check(multiple, "multiple")
    multiples = {name: multiple or group.multiple for name, group in groups.items()}
    for name, group in groups.items():
        if multiples[name] > group.units:
            raise InputError(
                f"group {name!r} has {group.units} units, which multiple = {multiples[name]} "
                "rounds to nothing; give a smaller multiple"
            )
    if budget is not None:
        steps = (_uniform_steps if uniform else _ranked_steps)(groups, scores, multiples)
        cost = budget.cost(groups, params, config)
        counts = _within(budget, steps, lambda counts: cost(_best(scores, counts)))
    else:
        check_sparsity(sparsity)
        assert sparsity is not None
        if uniform:
            counts = {
                name: _nearest(name, group.units, multiples[name], sparsity)
                for name, group in groups.items()
            }
        else:
            counts = _ranked(groups, scores, multiples, sparsity)
    return _best(scores, counts)


@checked
def summary(groups: Groups, keep: Mapping[str, Any]) -> Summary:
    """Returns how many units stay, in all and by group (as `tensors`); of each copy.

    >>> from swe_prune.structured import Group
    >>> summary({"mlp": Group(4, {"up$": -1})}, {"mlp": [0, 2]}).sparsity
    0.5
    """
    kept = check_keep(groups, keep)
    return Summary.of(
        {
            name: Tally(kept[name].shape[-1] if name in kept else group.units, group.units)
            for name, group in groups.items()
        }
    )


def _scores(name: str, group: Group, units: Mapping[str, Any]) -> np.ndarray:
    if name not in units:
        raise InputError(f"group {name!r} has no scores; give those of all groups, as unit_scores")
    scores = np.asarray(units[name], np.float32)
    if scores.shape != group.shape:
        raise InputError(
            f"the scores of group {name!r} must have shape {group.shape}, got {scores.shape}"
        )
    if np.isnan(scores).any():
        raise InputError(f"the scores of group {name!r} have NaN; check what they are made of")
    return scores


def _best(scores: Mapping[str, np.ndarray], counts: Counts) -> Keep:
    order = {name: np.argsort(-some, axis=-1, kind="stable") for name, some in scores.items()}
    return {name: np.sort(some[..., : counts[name]], axis=-1) for name, some in order.items()}


def _nearest(name: str, units: int, multiple: int, sparsity: float) -> int:
    """Returns the multiple of kept units nearest to what the sparsity leaves."""
    left = units - removed_count(units, sparsity)
    if left == units:
        return units
    count = min(int(left / multiple + 0.5) * multiple, units // multiple * multiple)
    if count == 0:
        rounded = f", which multiple = {multiple} rounds to nothing" if left else ""
        raise InputError(
            f"sparsity = {sparsity:g} leaves {left} of the {units} units of group {name!r}"
            f"{rounded}; give a smaller sparsity{' or multiple' if rounded else ''}"
        )
    return count


def _ranked(
    groups: Groups,
    scores: Mapping[str, np.ndarray],
    multiples: Mapping[str, int],
    sparsity: float,
) -> Counts:
    """Returns the counts nearest to the sparsity of all units together."""
    total = sum(group.units for group in groups.values())
    left = total - removed_count(total, sparsity)
    steps = _ranked_steps(groups, scores, multiples)
    kept = [sum(counts.values()) for counts in steps]
    if left < kept[0]:
        raise InputError(
            f"sparsity = {sparsity:g} leaves {left} of {total} units, but the {len(groups)} groups "
            f"keep at least {kept[0]}; give a smaller sparsity or multiple"
        )
    at = bisect.bisect_left(kept, left)
    if at > 0 and left - kept[at - 1] < kept[at] - left:
        at -= 1
    return steps[at]


def _uniform_steps(
    groups: Groups, scores: Mapping[str, np.ndarray], multiples: Mapping[str, int]
) -> list[Counts]:
    """Returns all counts with equal shares, from the fewest units to all."""
    allowed = {
        name: [*range(multiples[name], group.units, multiples[name]), group.units]
        for name, group in groups.items()
    }
    shares = sorted({n / groups[name].units for name, some in allowed.items() for n in some})
    steps = [
        {
            name: some[max(0, bisect.bisect(some, share * groups[name].units + 1e-6) - 1)]
            for name, some in allowed.items()
        }
        for share in shares
    ]
    return [one for at, one in enumerate(steps) if at == 0 or one != steps[at - 1]]


def _ranked_steps(
    groups: Groups, scores: Mapping[str, np.ndarray], multiples: Mapping[str, int]
) -> list[Counts]:
    """Returns all counts by rank over all groups, from the fewest units to all."""
    counts = {name: multiples[name] for name in groups}
    rest = []
    for name, some in scores.items():
        falling = -np.sort(-some, axis=-1)
        falling = falling if falling.ndim == 1 else falling.mean(axis=0)
        for start in range(multiples[name], len(falling), multiples[name]):
            part = falling[start : start + multiples[name]]
            rest.append((-float(part.mean()), len(rest), name, len(part)))
    steps = [dict(counts)]
    for _, _, name, size in sorted(rest):
        counts[name] += size
        steps.append(dict(counts))
    return steps


def _within(budget: Budget, steps: list[Counts], cost: Callable[[Counts], float]) -> Counts:
    """Returns the counts of most units whose cost is within the budget, by bisection."""
    name, limit = budget.limit
    least = cost(steps[0])
    if not least <= limit:
        raise InputError(
            f"the budget {name} = {limit:g} cannot be met: with the fewest units that may stay the "
            f"model has {least:g}; raise the budget or cut other units as well"
        )
    low, high = 0, len(steps)  # steps[low] is within the budget, steps[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(steps[middle]) <= limit else (low, middle)
    return steps[low]
