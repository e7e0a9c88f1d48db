"""The two sentences about prices say what the numbers say, and nothing from one seed."""

import pytest
from report_synthetic import cell

from swe_prune.report import claims, stats

CONTROL = (10.0, 11.0, 12.0)


def told(errors, seeds=3, blank=100.0):
    """Sentences where swe has these errors minus the control's by sparsity, one for each seed."""
    rows = [
        cell(
            seed=seed, sparsity=sparsity, sparsity_prunable=sparsity, dense_mae=CONTROL[seed],
            control_mae=CONTROL[seed], pruned_mae=50.0, finetuned_mae=CONTROL[seed] + more[seed],
        )
        for sparsity, more in errors.items()
        for seed in range(seeds)
    ]  # fmt: skip
    return claims.of_prices(stats.summarise(rows), blank)


def test_a_clear_gain_and_a_destroyed_model():
    first, second = told({0.3: (0, 0, 0), 0.5: (-1.0, -1.2, -0.8), 0.9: (100, 101, 99)})
    assert first == (
        "Does moderate pruning lower the error of prices? Yes: without 50\xa0% of the weights by "
        "swe it is 10.00\xa0±\xa01.11 after the recovery, \N{MINUS SIGN}1.00\xa0±\xa00.20 against "
        "the control (3 seeds)."
    )
    assert "destroy the model? Yes, the pictures might as well be blank: without 90\xa0%" in second
    assert second.endswith("with blank pictures the dense model's error is 100.00.")


def test_a_cost_is_no_destruction():
    first, second = told({0.6: (1.0, 1.2, 0.8), 0.8: (5.0, 6.0, 5.0)})
    assert "prices? No, it costs: without 60" in first
    assert "destroy the model? It costs: without 80" in second


@pytest.mark.parametrize(("seeds", "said"), [(3, "(3 seeds)"), (1, "one seed cannot tell")])
def test_what_the_seeds_do_not_tell_is_not_settled(seeds, said):
    (first,) = told({0.5: (-1.0, 1.2, 0.1)}, seeds)
    assert "prices? Not settled: " in first
    assert said in first


def test_a_diverged_model_is_destroyed():
    _, second = told({0.5: (0, 0, 0), 0.9: (float("inf"),) * 3})
    assert "blank: without 90" in second
    assert "diverged" in second


def test_no_prices_no_sentence():
    assert not claims.of_prices(stats.summarise([cell(), cell(seed=1)]), None)
