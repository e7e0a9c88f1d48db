"""Every example in a docstring of the package runs and says the truth."""

import doctest
import importlib
import pkgutil

import pytest

import swe_prune

NAMES = ["swe_prune"] + [
    module.name
    for module in pkgutil.walk_packages(swe_prune.__path__, "swe_prune.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_the_core_has_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("tree", "select", "masks", "allocation", "patterns", "importance", "config"):
        parts = [part for part in NAMES if f"{part}.".startswith(f"swe_prune.{name}.")]
        found = [finder.find(importlib.import_module(part)) for part in parts]
        assert any(test.examples for tests in found for test in tests), name
