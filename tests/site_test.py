"""The documentation site has every page and every public name, and the metadata agree."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

import swe_prune

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def nav_pages(entries):
    """Yields the pages of a navigation, nested ones too."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list):
            yield from nav_pages(entry)
        else:
            for value in entry.values():
                yield from nav_pages(value if isinstance(value, list) else [value])


def test_the_navigation_has_every_page_once():
    pages = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(set(pages)) == len(pages)
    assert set(pages) == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^::: swe_prune\.(\w+)$", pages, re.MULTILINE))
    assert described == set(swe_prune.__all__) - {"__version__"}


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_the_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), link


def test_nothing_is_loaded_from_elsewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(config)


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == swe_prune.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("name", "command"), [("ci", "bash .ci/run"), ("all_tests", "make test-all")]
)
def test_the_workflows_run_what_ci_and_a_maintainer_run(name, command):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == [command]
    assert (ROOT / ".ci" / "run").exists()
    assert "\ntest-all:" in (ROOT / "Makefile").read_text()


def test_doctests_and_lists_of_docstrings_become_code(monkeypatch):
    # griffe comes with the extra docs alone; the function needs nothing of it.
    stand_in = types.SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", stand_in)
    spec = importlib.util.spec_from_file_location("fences", DOCS / "doctest_fences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fenced("Adds.\n\n>>> 1 + 2\n3\n\nMore.") == (
        "Adds.\n\n```pycon\n>>> 1 + 2\n3\n```\n\nMore."
    )
    assert module.fenced("a   one\nbb  two").startswith("```text\n")
    assert module.fenced("One line.\nAnother.") == "One line.\nAnother."
