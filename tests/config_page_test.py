"""docs/config.md says what the dataclasses of swe_prune.config say, for every setting."""

import dataclasses
import importlib.util
import typing
from pathlib import Path

import pytest

from swe_prune import config

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def generator():
    spec = importlib.util.spec_from_file_location("generate_config", DOCS / "generate_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator):
    said = (DOCS / "config.md").read_text()
    assert said == generator.page(), "run python docs/generate_config.py"


def test_every_setting_is_on_it_with_a_meaning(generator):
    lines = generator.page().splitlines()
    for cls, _ in generator.groups():
        for field in dataclasses.fields(cls):
            (line,) = [
                line
                for line in section_of(lines, f"`{cls.__name__}`: ")
                if line.startswith(f"| `{field.name}` |")
            ]
            meaning = line.rstrip(" |").rpartition("| ")[2]
            assert meaning.endswith("."), line


def test_every_choice_is_on_it_with_the_values_it_may_have(generator):
    lines = generator.page().splitlines()
    found = 0
    for cls, _ in generator.groups():
        rows = section_of(lines, f"`{cls.__name__}`: ")
        for name, hint in typing.get_type_hints(cls).items():
            (row,) = [line for line in rows if line.startswith(f"| `{name}` |")]
            for literal in literals(hint):
                values = typing.get_args(literal)
                assert " \\| ".join(map(repr, values)) in row, row
                found += 1
    assert found >= 15
    assert "'quick_gelu'" in generator.page().partition("## `model`")[2].partition("## ")[0]


def literals(hint):
    """The Literals of a type, wherever in it they are."""
    if typing.get_origin(hint) is typing.Literal:
        return [hint]
    return [one for inside in typing.get_args(hint) for one in literals(inside)]


def section_of(lines, start):
    """The lines from the one that starts so to the next heading."""
    (begin,) = [number for number, line in enumerate(lines) if line.startswith(start)]
    rest = lines[begin + 1 :]
    end = next((n for n, line in enumerate(rest) if line.startswith("## ")), len(rest))
    return rest[:end]


def test_every_setting_of_a_flat_config_is_reached(generator):
    grouped = {path for _, paths in generator.groups() for path in paths}
    for setting in config.flat(config.Config()):
        assert setting.rpartition(".")[0] in grouped, setting


def test_a_comment_becomes_a_sentence_and_none_is_an_error(generator, monkeypatch):
    assert generator.sentence("of the choice of windows") == "Of the choice of windows."
    monkeypatch.setattr(generator, "meanings_of", lambda cls: {})
    with pytest.raises(SystemExit, match="has no meaning; write a comment beside it"):
        generator.page()


def test_fields_of_a_recipe_take_their_meaning_from_its_docstring(generator):
    said = generator.meanings_of(config.CellConfig.__mro__[1])
    assert said["rate"].startswith("Multiple of the standard deviation, for the rule of arXiv")
    assert said["seed"] == "Seed of random draws."
