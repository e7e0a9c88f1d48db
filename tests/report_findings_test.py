"""The statistics, the claims and the contests, with both outcomes of each."""

import math

import pytest
from report_synthetic import row

from swe_prune.report import findings, stats
from swe_prune.report.records import Row

CONTROL = 2.0


def rows_of(costs, criterion="swe", rule="tensor", seeds=(0, 1, 2), scatter=0.001, **changes):
    """Rows whose fine-tuned loss is the control's plus a cost per sparsity, scattered by seed."""
    return [
        Row(**row(
            seed=seed, criterion=criterion, rule=rule, requested=sparsity,
            sparsity_prunable=sparsity, dense_loss=CONTROL + 0.03 + 0.1 * seed,
            control_loss=CONTROL + 0.1 * seed,
            pruned_loss=CONTROL + 0.1 * seed + 10 * abs(cost) + 0.5,
            finetuned_loss=CONTROL + 0.1 * seed + cost + scatter * (seed - 1),
            **changes,
        ))
        for seed in seeds
        for sparsity, cost in costs.items()
    ]  # fmt: skip


def test_spread_is_the_sample_standard_deviation():
    found = stats.spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.sd == pytest.approx(math.sqrt(7 / 3))  # of 1, 2, 4 by hand
    assert (found.n, found.diverged) == (3, 0)


def test_spread_of_one_value_has_no_sd_and_of_none_is_none():
    assert stats.spread([1.0]).sd is None
    assert stats.spread([None]) is None


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_averaged_away(lost):
    found = stats.spread([1.0, lost, 1.0])
    assert (found.mean, found.sd, found.n, found.diverged) == (math.inf, None, 3, 1)


@pytest.mark.parametrize(
    ("value", "base", "expected"),
    [
        (3.0, 1.0, 2.0),
        (math.nan, 1.0, math.inf),
        (-math.inf, 1.0, math.inf),
        (1.0, math.nan, None),
        (None, 1.0, None),
        (1.0, None, None),
    ],
)
def test_difference_to_a_destroyed_or_missing_loss(value, base, expected):
    assert stats.difference(value, base) == expected


def test_difference_is_paired_by_seed_so_seeds_of_different_level_do_not_widen_it():
    # The seeds' levels lie 0.1 apart; the cost is the same in all of them.
    (cell,) = stats.summarise(rows_of({0.6: 0.05}, scatter=0.0))
    assert cell.finetuned.sd == pytest.approx(0.1)
    assert cell.minus_control.mean == pytest.approx(0.05)
    assert cell.minus_control.sd == pytest.approx(0, abs=1e-12)


def test_seeds_without_a_finetuned_loss_are_left_out_of_the_pairs():
    rows = [*rows_of({0.6: 0.05}, seeds=(0,)), Row(**row(seed=9, rule="tensor", requested=0.6,
            finetuned_loss=None))]  # fmt: skip
    (cell,) = stats.summarise(rows)
    assert (cell.seeds, cell.finetuned.n, cell.minus_control.n) == ((0, 9), 1, 1)


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [
        (-0.05, 0.01, "lower"),
        (-0.05, 0.2, "undecided"),
        (0.0, 0.005, "equal"),
        (0.01, None, "equal"),  # the margin itself is within the margin
        (-0.005, None, "equal"),
        (0.05, 0.01, "higher"),
        (0.05, None, "higher"),
        (0.05, 0.06, "undecided"),
        (0.008, 0.005, "undecided"),
        (math.inf, None, "higher"),
    ],
)
def test_verdict(mean, sd, expected):
    assert stats.verdict(stats.Spread(mean, sd, 1 if sd is None else 3)) == expected


def test_claims_hold_where_the_curve_is_flat_and_then_rises():
    costs = {0.3: -0.02, 0.5: 0.0, 0.6: 0.004, 0.7: 0.03, 0.9: 0.5}
    found = findings.find(rows_of(costs, rule="std"))
    assert (found.main.rule, found.main.criterion) == ("std", "swe")
    assert found.main.moderate.requested == 0.6
    assert found.main.against_control == "equal"
    assert found.main.against_dense == "lower"  # the extra steps alone gained 0.03
    knee = found.main.knee
    assert (knee.free.requested, knee.costly.requested, knee.last.requested) == (0.6, 0.7, 0.9)
    assert knee.slope == pytest.approx((0.5 - 0.004) / 3)
    assert knee.dip is None


def test_claims_fail_where_every_level_costs():
    found = findings.find(rows_of({0.3: 0.02, 0.6: 0.08, 0.9: 0.5}))
    assert found.main.against_control == "higher"
    assert found.main.against_dense == "higher"
    assert found.main.knee.free is None
    assert found.main.knee.costly.requested == 0.3
    assert findings.best(found.cells, "tensor").sparsest_free is None


def test_yardsticks_can_disagree():
    found = findings.find(rows_of({0.6: 0.025}))
    assert (found.main.against_control, found.main.against_dense) == ("higher", "equal")


def test_no_knee_where_nothing_costs():
    knee = findings.find(rows_of({0.3: 0.0, 0.9: 0.001})).main.knee
    assert knee.free is knee.last
    assert knee.costly is None
    assert knee.slope is None  # nothing is sparser than the knee


def test_knee_tells_of_a_costly_level_below_it():
    knee = findings.find(rows_of({0.3: 0.0, 0.5: 0.04, 0.6: 0.0, 0.9: 0.2})).main.knee
    assert (knee.dip.requested, knee.free.requested, knee.costly.requested) == (0.5, 0.6, 0.9)


def test_scattered_seeds_decide_nothing():
    found = findings.find(rows_of({0.6: 0.02, 0.9: 0.03}, scatter=0.1))
    assert found.main.against_control == "undecided"
    assert found.main.knee.free is found.main.knee.costly is None


def test_a_diverged_level_is_costly_and_gives_no_slope():
    rows = [*rows_of({0.6: 0.0}), *rows_of({0.9: math.nan})]
    found = findings.find(rows)
    assert found.main.knee.costly.requested == 0.9
    assert found.main.knee.slope == math.inf
    assert found.bests[0].lowest.requested == 0.6


def test_no_moderate_level_far_from_sixty_per_cent():
    main = findings.find(rows_of({0.3: 0.0, 0.9: 0.4})).main
    assert (main.moderate, main.against_control) == (None, None)


def test_nothing_finetuned_leaves_the_claims_open():
    rows = [Row(**row(finetuned_loss=None, control_loss=None))]
    found = findings.find(rows)
    assert found.main.moderate is not None
    assert (found.main.against_control, found.main.knee) == (None, None)
    assert found.bests[0].lowest.finetuned is None


def test_claims_are_about_another_criterion_where_swe_is_missing():
    rows = [*rows_of({0.6: 0.0}, "votes", "global"), *rows_of({0.6: 0.0}, "mean_abs")]
    assert findings.protagonist(stats.summarise(rows)) == ("tensor", "mean_abs")


def duel(mine, rival, phase="finetuned", **changes):
    rows = [*rows_of(mine, **changes), *rows_of(rival, "magnitude", **changes)]
    return findings.contest(rows, "tensor", phase, "swe", "magnitude")


def test_contest_counts_wins_ties_and_losses():
    found = duel({0.3: 0.0, 0.6: -0.02, 0.9: 0.5}, {0.3: 0.0, 0.6: 0.0, 0.9: 0.4})
    assert [bout.outcome for bout in found.bouts] == ["tie", "win", "loss"]
    assert found.moderate.sparsity == 0.6
    assert found.moderate.change.mean == pytest.approx(-0.02)
    assert [found.count(outcome) for outcome in ("win", "tie", "loss")] == [1, 1, 1]


def test_contest_over_seeds_is_judged_by_their_scatter_not_by_the_margin():
    rows = [*rows_of({0.5: -0.005, 0.6: -0.05}, scatter=0.0), *rows_of({0.5: 0.0}, "magnitude"),
            *rows_of({0.6: 0.0}, "magnitude", scatter=0.1)]  # fmt: skip
    found = findings.contest(rows, "tensor", "finetuned", "swe", "magnitude")
    assert [bout.outcome for bout in found.bouts] == ["win", "tie"]


def test_contest_pairs_only_the_seeds_and_levels_both_have():
    rows = [*rows_of({0.3: 0.0, 0.6: 0.0}, seeds=(0, 1)),
            *rows_of({0.6: 0.1, 0.9: 0.2}, "magnitude", seeds=(1, 2))]  # fmt: skip
    found = findings.contest(rows, "tensor", "finetuned", "swe", "magnitude")
    assert [(bout.sparsity, bout.change.n) for bout in found.bouts] == [(0.6, 1)]


def test_contest_with_one_seed_needs_the_margin():
    found = duel({0.3: 0.005, 0.6: 0.02}, {0.3: 0.0, 0.6: 0.0}, seeds=(0,))
    assert [bout.outcome for bout in found.bouts] == ["tie", "loss"]
    assert found.bouts[0].change.sd is None


@pytest.mark.parametrize(
    ("mine", "rival", "outcome"),
    [
        (math.nan, 0.1, "loss"),
        (0.1, math.inf, "win"),
        (math.nan, math.inf, "tie"),
    ],
)
def test_contest_with_destroyed_models(mine, rival, outcome):
    (bout,) = duel({0.6: mine}, {0.6: rival}).bouts
    assert bout.outcome == outcome


def test_contest_needs_the_rival():
    assert findings.contest(rows_of({0.6: 0.0}), "tensor", "pruned", "swe", "magnitude") is None
    assert findings.contests(rows_of({0.6: 0.0})) == []


def test_the_papers_rule_is_no_contest_for_its_sparsities_differ():
    rows = [*rows_of({0.6: 0.0}, rule="std"), *rows_of({0.6: 0.0}, "magnitude", rule="std")]
    assert findings.contests(rows) == []


def test_best_of_a_tie_is_the_sparser():
    found = findings.best(stats.summarise(rows_of({0.3: 0.0, 0.6: 0.0})), "tensor")
    assert (found.lowest.requested, found.sparsest_free.requested) == (0.6, 0.6)
    assert findings.best([], "tensor") is None
