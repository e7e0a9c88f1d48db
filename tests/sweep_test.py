"""Sweeps are plain lists of cells in a stated order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swe_prune import config, sweep
from swe_prune.errors import InputError


def test_a_product_has_every_combination_and_its_last_setting_varies_fastest():
    made = sweep.product({"criterion": ["swe", "random"], "sparsity": [0.5, 0.6, 0.7]})
    assert [(c["criterion"], c["sparsity"]) for c in made] == list(
        itertools.product(["swe", "random"], [0.5, 0.6, 0.7])
    )


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=4), min_size=4, max_size=4))
def test_a_product_is_as_long_as_its_choices_multiply_to(choices):
    names = ("criterion", "scope", "sparsity", "recovery")
    made = sweep.product(dict(zip(names, choices, strict=True)))
    assert [tuple(c.values()) for c in made] == list(itertools.product(*choices))


def test_products_of_sweeps_nest():
    inner = sweep.zipped({"pattern": ["2:4", "1:4"], "sparsity": [0.5, 0.75]})
    made = sweep.product(inner, {"recovery": ["none", "rewind"]})
    assert made == [
        {"pattern": "2:4", "sparsity": 0.5, "recovery": "none"},
        {"pattern": "2:4", "sparsity": 0.5, "recovery": "rewind"},
        {"pattern": "1:4", "sparsity": 0.75, "recovery": "none"},
        {"pattern": "1:4", "sparsity": 0.75, "recovery": "rewind"},
    ]


def test_a_chain_keeps_the_first_of_what_comes_twice_whatever_the_order_of_its_settings():
    made = sweep.chain(
        [{"criterion": "swe", "sparsity": 0.5, "options": {"power": 1}}],
        [{"criterion": "random", "sparsity": 0.5}],
        [{"options": {"power": 1}, "sparsity": 0.5, "criterion": "swe"}],
        [{"criterion": "swe", "sparsity": 0.5, "options": {"power": 2}}],
    )
    assert [c["criterion"] for c in made] == ["swe", "random", "swe"]
    assert [c.get("options") for c in made] == [{"power": 1}, None, {"power": 2}]


def test_the_settings_of_a_cell_are_those_of_the_config():
    made = config.from_dict({"study": {"cells": sweep.product({"scope": ["row"]})}})
    assert made.study.cells == (config.CellConfig(scope="row"),)


def test_what_is_given_stays_as_it_was():
    choices = {"sparsity": [0.5, 0.6]}
    cell = {"criterion": "swe"}
    sweep.product(choices, [cell])[0]["sparsity"] = 0.9
    assert choices == {"sparsity": [0.5, 0.6]}
    assert cell == {"criterion": "swe"}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sweep.product({"critrion": ["swe"]}), "did you mean 'criterion'"),
        (lambda: sweep.chain([{"sparsitty": 0.5}]), "did you mean 'sparsity'"),
        (lambda: sweep.zipped({"patern": ["2:4"]}), "did you mean 'pattern'"),
        (
            lambda: sweep.product({"criterion": "swe"}),
            r"must be a list of choices, got 'swe'; write \['swe'\]",
        ),
        (lambda: sweep.product({"sparsity": 0.5}), "sparsity must be a list of choices, got 0.5"),
        (lambda: sweep.product({"sparsity": [0.5]}, [{"sparsity": 0.6}]), "set 'sparsity'"),
        (lambda: sweep.chain(["swe"]), "a cell must be a dict of settings, got 'swe'"),
        (
            lambda: sweep.zipped({"scope": ["row"], "sparsity": [1, 2]}),
            "scope has 1, sparsity has 2; make them",
        ),
    ],
)
def test_what_makes_no_sweep_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
