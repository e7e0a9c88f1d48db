"""The question of arXiv 2310.04573: which pruning, how much, with which recovery, and is it better.

Every combination is held against its control, the dense model trained for the same extra steps at
the same learning rates, seed by seed. The best of many combinations is the best partly by luck;
so it is also chosen on all seeds but one and measured on that one, each seed in turn.
"""

import dataclasses
import math
from collections.abc import Sequence

from swe_prune.report import words
from swe_prune.report.formats import DASH, count, mean_sd, number, percent, percent_sd
from swe_prune.report.records import Row
from swe_prune.report.stats import MARGIN, Spread, difference, spread
from swe_prune.report.tables import TITLES, Table

Name = tuple[str, str, float, str, str]
"""(criterion, rule, requested, schedule, recovery) of one combination."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """All seeds of one combination; spreads are over seeds, None where nothing was measured."""

    name: Name
    seeds: tuple[int, ...]
    sparsity: Spread | None
    nonzero: Spread | None
    before: Spread | None  # validation loss as pruned, minus the dense model's
    after: Spread | None  # validation loss after the recovery, minus the control's
    by_seed: dict[int, float]  # of `after`
    gap: Spread | None
    control_gap: Spread | None
    seconds: Spread | None

    @property
    def phrase(self) -> str:
        """How a sentence calls it."""
        criterion, rule, _, schedule, recovery = self.name
        return f"{criterion}, {words.rule_phrase(rule)}, {schedule}, {self.level}, {recovery}"

    @property
    def level(self) -> str:
        """What was requested."""
        return f"rate {self.name[2]:g}" if self.name[1] == "std" else percent(self.name[2])


def combinations(rows: Sequence[Row]) -> list[Combination]:
    """Returns every combination by recovery, the lowest loss against its control first."""
    groups: dict[Name, list[Row]] = {}
    for row in rows:
        name = (row.criterion, row.rule, row.requested, row.schedule, row.recovery)
        groups.setdefault(name, []).append(row)
    found = [_combination(name, group) for name, group in groups.items()]
    recoveries = list(dict.fromkeys(one.name[-1] for one in found))
    return sorted(
        found, key=lambda one: (recoveries.index(one.name[-1]), _mean(one.after), _mean(one.before))
    )


def _combination(name: Name, rows: list[Row]) -> Combination:
    changes = {row.seed: difference(row.finetuned_loss, row.control_loss) for row in rows}
    return Combination(
        name,
        tuple(sorted(row.seed for row in rows)),
        sparsity=spread(row.sparsity_prunable for row in rows),
        nonzero=spread(row.nonzero_params for row in rows),
        before=spread(difference(row.pruned_loss, row.dense_loss) for row in rows),
        after=spread(changes.values()),
        by_seed={seed: change for seed, change in changes.items() if change is not None},
        gap=spread(row.generalisation_gap for row in rows),
        control_gap=spread(row.control_gap for row in rows),
        seconds=spread(row.seconds for row in rows),
    )


def _mean(value: Spread | None) -> float:
    return math.inf if value is None else value.mean


def held_out(found: Sequence[Combination]) -> Spread | None:
    """Returns what the best combination is worth on a seed that had no part in choosing it.

    For every seed: of all combinations the one with the lowest mean difference to its control over
    the other seeds, and its difference on this seed. None with fewer than two seeds.
    """
    judged = _judged(found)
    seeds = sorted(judged[0].by_seed) if judged else []
    if len(seeds) < 2:
        return None

    def chosen(left_out: int) -> Combination:
        return min(judged, key=lambda one: sum(one.by_seed[s] for s in seeds if s != left_out))

    return spread(chosen(seed).by_seed[seed] for seed in seeds)


def _judged(found: Sequence[Combination]) -> list[Combination]:
    """Returns the combinations that were recovered and controlled on every seed there is."""
    most = max((len(one.by_seed) for one in found), default=0)
    seeds = {seed for one in found for seed in one.by_seed if len(one.by_seed) == most}
    return [one for one in found if one.by_seed and set(one.by_seed) == seeds]


def answer(found: Sequence[Combination]) -> str:
    """Returns one sentence: does some pruned model, recovered, generalise better than its control?

    Yes takes both the best combination and the choice by the other seeds to lie below the control
    by more than their standard deviation over seeds.
    """
    judged = _judged(found)
    if not judged:
        return (
            "Whether some pruned and fine-tuned model generalises better than the dense one cannot "
            "be said: no combination was recovered and held against its control on every seed."
        )
    best = min(judged, key=lambda one: _mean(one.after))
    assert best.after is not None  # what was judged has differences
    n = len(best.by_seed)
    many = f"of {len(judged)} combinations over {n} seed{'s' if n > 1 else ''} the best"
    told = (
        f"{many} ({best.phrase}) ends {words.change(best.after)} the dense model trained for the "
        "same extra steps"
    )
    others = held_out(found)
    if others is None:
        return (
            "Whether some pruned and fine-tuned model generalises better than its control cannot "
            f"be said from one seed: {told}."
        )
    told += " (mean ± standard deviation of the paired differences)"
    elsewhere = (
        f"chosen on the other seeds and measured on the one left out, the best is "
        f"{words.change(others)} it"
    )
    if best.after.mean >= 0:
        return f"No pruned and fine-tuned model generalises better than its control: {told}."
    if best.after.high >= 0 or others.high >= 0:
        return (
            "It is not shown that a pruned and fine-tuned model generalises better than its "
            f"control: {told}, and {elsewhere}, so that seeds or the choice may explain it."
        )
    small = (
        f", which is less than the {MARGIN:g} that this report calls nothing"
        if others.mean > -MARGIN
        else ""
    )
    return (
        f"Some pruned and fine-tuned model does generalise better than its control: {told}, "
        f"and {elsewhere}{small}."
    )


def table(found: Sequence[Combination]) -> Table:
    """Returns every combination with its losses, its gap, its size and its time."""
    head = (
        "Recovery,Criterion,Scope,Schedule,Requested,Achieved,Before minus dense,"
        "After minus control,Generalisation gap,Control's gap,Non-zero parameters,Seconds,Seeds"
    )
    return Table(
        "Every combination of the study, the best of each recovery first. Before: validation loss "
        "as pruned, minus the dense model's; of gradual pruning, under its final masks. After: "
        "after the recovery, minus its own control, which had the same steps and learning rates. "
        "Gap: validation minus training loss on as many fixed windows. Nats per token, mean ± "
        "standard deviation over seeds, paired by seed.",
        head.split(","),
        [_row(one) for one in found],
        words=4,
    )


def _row(one: Combination) -> list[str]:
    criterion, rule, _, schedule, recovery = one.name
    return [
        recovery,
        criterion,
        TITLES[rule],
        schedule,
        one.level,
        DASH if one.sparsity is None else percent_sd(one.sparsity),
        mean_sd(one.before, sign=True),
        mean_sd(one.after, sign=True),
        mean_sd(one.gap, sign=True),
        mean_sd(one.control_gap, sign=True),
        DASH if one.nonzero is None else count(one.nonzero.mean),
        DASH if one.seconds is None else number(one.seconds.mean, 1),
        str(len(one.seeds)),
    ]
