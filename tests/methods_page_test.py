"""docs/methods.md says what the docstrings say, of every registered name."""

import importlib.util
from pathlib import Path

import pytest

from swe_prune import allocation, importance, schedules

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator):
    said = (DOCS / "methods.md").read_text()
    assert said == generator.page(), "run python docs/generate_methods.py"


def test_every_name_is_on_it(generator):
    headings = generator.page().splitlines()
    for name in (*importance.names(), *allocation.names(), *schedules.names()):
        assert f"#### {name}" in headings, name


def test_a_criterion_without_its_when_is_refused(generator):
    with pytest.raises(SystemExit, match="lacks 'When'"):
        generator.labelled("|w|: a size.", "When")
