"""The sentences say what the numbers say, whichever way they fall out."""

import math
import re

import pytest
from report_findings_test import rows_of
from report_synthetic import row

from swe_prune.report import findings, formats, words
from swe_prune.report.records import Row


def said(rows):
    found = findings.find(rows)
    lines = [words.headline(found)]
    lines += [f"{one.lead} {one.body}" for one in words.statements(found)]
    return "\n".join([*lines, words.yardstick(found)]).replace(formats.NBSP, " ")


FLAT = {0.3: -0.003, 0.6: 0.004, 0.9: 0.5}
STEEP = {0.3: 0.02, 0.6: 0.08, 0.9: 0.5}


def test_claims_that_hold():
    text = said(rows_of(FLAT, rule="std"))
    assert "Moderate pruning costs nothing here: at 60 % sparsity (swe under the paper's" in text
    assert "Claim 1, moderate pruning costs nothing: holds." in text
    assert "0.0040 ± 0.0010 nats per token above the control's (mean of 3 seeds" in text
    assert "0.0260 ± 0.0010 nats per token below that of the dense model before" in text
    assert "The control is the fairer yardstick" in text
    assert "Claim 2, more pruning harms the model: holds. The knee" in text
    assert "0.500 nats per token above the control's (+65 % perplexity)" in text  # e^0.5 = 1.65


def test_claims_that_do_not_hold():
    text = said(rows_of(STEEP))
    assert "Moderate pruning is not free here" in text
    assert "Claim 1, moderate pruning costs nothing: does not hold." in text
    assert "No level tested is free" in text


def test_a_lower_loss_is_called_lower():
    assert "holds; the loss is even lower." in said(rows_of({0.6: -0.05}))


def test_no_harm_seen():
    text = said(rows_of({0.6: 0.0, 0.9: 0.0}))
    assert "Claim 2, more pruning harms the model: not seen. Even the largest sparsity" in text


def test_scatter_is_undecided():
    text = said(rows_of({0.6: 0.02, 0.9: 0.03}, scatter=0.1))
    assert "cannot be called free or costly" in text
    assert "undecided, for the seeds scatter" in text


def test_one_seed_has_no_spread():
    text = said(rows_of(FLAT, seeds=(0,)))
    assert "one seed, so no spread can be given" in text
    assert "the control's (one seed, so no spread). The knee" in text
    assert "Every cell has one seed" in text
    assert "±" not in text


def test_nothing_finetuned():
    text = said([Row(**row(finetuned_loss=None))])
    assert "Claim 1, moderate pruning costs nothing: not judged." in text
    assert "1.000 nats per token above the dense model's" in text
    assert "Claim 2, more pruning harms the model: not judged." in text


def test_no_control():
    text = said([Row(**row(control_loss=None))])
    assert "the control was not run yet" in text


def test_missing_rivals_are_named():
    text = said(rows_of(FLAT))
    assert "swe against magnitude. They were not both measured at equal sparsity." in text
    assert "swe against random. They were not both measured at equal sparsity." in text


def test_winning_and_losing_to_magnitude():
    rows = [*rows_of({0.3: 0.0, 0.6: -0.05}), *rows_of({0.3: 0.02, 0.6: 0.02}, "magnitude"),
            *rows_of({0.3: 0.2, 0.6: 0.3}, "votes")]  # fmt: skip
    text = said(rows)
    assert "after fine-tuning it beats magnitude (2 won of 2 levels; \N{MINUS SIGN}0.0700" in text
    assert "votes loses to magnitude." in text
    assert "swe loses to magnitude." not in text
    assert "swe beats magnitude. With equal sparsity per tensor" in text
    assert "votes beats magnitude." not in text


def test_swe_losing_to_magnitude_is_said_plainly():
    text = said([*rows_of(STEEP), *rows_of(FLAT, "magnitude")])
    assert "after fine-tuning it loses to magnitude" in text
    assert "swe loses to magnitude. With equal sparsity per tensor" in text


def test_losing_most_levels_is_losing():
    rows = [*rows_of({0.3: -0.05, 0.5: 0.05, 0.6: 0.05}),
            *rows_of({0.3: 0.0, 0.5: 0.0, 0.6: 0.0}, "magnitude")]  # fmt: skip
    text = said(rows)
    assert "after fine-tuning it is mixed against magnitude (1 won, 2 lost of 3 levels" in text
    assert "equal sparsity per tensor after fine-tuning (2 of 3 levels lost, 1 won)" in text


def test_magnitude_alone_is_not_compared_with_itself():
    text = said(rows_of(FLAT, "magnitude"))
    assert "magnitude against magnitude" not in text


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_diverged_losses_print_no_nan(lost):
    rows = [*rows_of({0.3: 0.0, 0.6: lost, 0.9: lost}), *rows_of(STEEP, "magnitude")]
    text = said(rows)
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    assert "diverged" in text


def test_numbers_are_written_with_a_true_minus_and_no_negative_zero():
    assert formats.signed(-0.5, 2) == "\N{MINUS SIGN}0.50"
    assert formats.signed(-0.00001) == "0.0000"
    assert formats.signed(0.5, 2) == "+0.50"
    assert formats.number(math.nan) == "diverged"
    assert formats.percent(0.6) == "60\N{NO-BREAK SPACE}%"
    assert formats.percent(0.6125) == "61.3\N{NO-BREAK SPACE}%"
