"""Means, spreads and paired differences over seeds, against plain arithmetic."""

import math

import pytest
from report_synthetic import cell, rows_of

from swe_prune.report import formats, stats


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
    # The seeds' losses lie 0.1 apart; the cost is the same in all of them.
    (found,) = stats.summarise(rows_of({0.6: 0.05}, scatter=0.0))
    assert found.of("finetuned_loss").sd == pytest.approx(0.1)
    assert found.change(recovered=True).mean == pytest.approx(0.05)
    assert found.change(recovered=True).sd == pytest.approx(0, abs=1e-12)


def test_seeds_without_a_finetuned_loss_are_left_out_of_the_pairs():
    rows = [*rows_of({0.6: 0.05}, seeds=(0,)), cell(seed=9, sparsity=0.6, finetuned_loss=None)]
    (found,) = stats.summarise(rows)
    assert [row.seed for row in found.rows] == [0, 9]
    assert (found.of("finetuned_loss").n, found.change(recovered=True).n) == (1, 1)


def test_cells_are_told_apart_by_every_setting_but_the_seed():
    settings = [{}, {"options": "a=1"}, {"allocation": "erk"}, {"pattern": "2:4"},
                {"schedule": "cubic"}, {"recovery": "rewind-200"}, {"scope": "global"},
                {"criterion": "", "method": "swe"}, {"rate": 0.5, "sparsity": ""}]  # fmt: skip
    rows = [cell(seed=seed, **{"sparsity": 0.5, **changes})
            for changes in settings for seed in (0, 1)]  # fmt: skip
    found = stats.summarise(rows)
    assert len(found) == len(settings)
    assert len({(one.group, one.name, one.level) for one in found}) == len(settings)
    assert all(len(one.rows) == 2 for one in found)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "swe"),
        ({"options": "power=1", "allocation": "erk", "pattern": "2:4"}, "swe power=1 erk 2:4"),
        ({"schedule": "cubic", "recovery": "rewind-7"}, "swe cubic rewind-7"),
        ({"recovery": "none"}, "swe no recovery"),
        ({"criterion": "", "method": "sparsegpt"}, "blockwise sparsegpt"),
    ],
)
def test_a_cell_is_called_by_what_is_not_usual(changes, name):
    (found,) = stats.summarise([cell(**changes)])
    assert found.name == name


def test_the_papers_criteria_come_first_and_random_last():
    names = ["votes", "random", "magnitude", "swe_spread", "swe", "mean_abs"]
    cells = stats.summarise([cell(criterion=name) for name in names])
    expected = ["swe", "swe_spread", "magnitude", "mean_abs", "votes", "random"]
    assert stats.order(cells) == expected
    assert [one.name for one in cells] == expected


def test_figures_show_what_was_pruned_in_one_shot_and_fine_tuned():
    rows = [cell(seed=0), cell(recovery="rewind"), cell(schedule="cubic")]
    assert [one.name for one in stats.usual(stats.summarise(rows))] == ["swe"]
    assert len(stats.usual(stats.summarise(rows[1:]))) == 2  # without any, all


def test_the_moderate_cell_is_the_nearest_to_sixty_per_cent_that_was_achieved():
    rows = [cell(rate=rate, sparsity_prunable=at) for rate, at in ((1, 0.5), (2, 0.63), (3, 0.9))]
    (found,) = stats.moderate(stats.summarise(rows))
    assert found.level == 2


def test_the_references_of_a_seed_are_those_of_plain_fine_tuning():
    rows = [cell(recovery="rewind", control_loss=1.0), cell(control_loss=2.0), cell(seed=1)]
    assert stats.per_seed(rows, "control_loss") == {0: 2.0, 1: 1.95}
    assert stats.per_seed([cell(control_loss=None)], "control_loss") == {}


def test_numbers_are_written_with_a_true_minus_and_no_negative_zero():
    assert formats.signed(-0.5, 2) == "\N{MINUS SIGN}0.50"
    assert formats.signed(-0.00001) == "0.0000"
    assert formats.signed(0.5, 2) == "+0.50"
    assert formats.number(math.nan) == "diverged"
    assert formats.percent(0.6) == "60\N{NO-BREAK SPACE}%"
    assert formats.percent(0.6125) == "61.3\N{NO-BREAK SPACE}%"
