"""Every Python example of the README and of the hand-written pages runs as it is there.

The blocks of one `##` section share their names, and a section needs nothing from another.
"""

import re
from pathlib import Path

import pytest

from swe_prune import importance

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/steps.md",
    "docs/criterion.md",
    "docs/saving.md",
    "docs/layout.md",
    "docs/sustainability.md",
    "docs/structured.md",
)


def sections(page):
    """Yields (heading, Python blocks) of each section of a page that has some."""
    for text in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if blocks:
            yield text.splitlines()[0], blocks


QUICK = PAGES[:2]

EXAMPLES = [
    pytest.param(
        page,
        blocks,
        id=f"{page}: {heading}",
        marks=[pytest.mark.slow] * (page not in QUICK),
    )
    for page in PAGES
    for heading, blocks in sections(page)
]


@pytest.fixture
def registry(monkeypatch):
    """Forgets the criteria that an example registers."""
    monkeypatch.setattr(importance.registry, "_CRITERIA", dict(importance.registry._CRITERIA))


@pytest.mark.parametrize(("page", "blocks"), EXAMPLES)
def test_the_example_runs(page, blocks, registry):
    space = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, page, "exec"), space)


def test_every_page_has_an_example():
    assert {example.values[0] for example in EXAMPLES} == set(PAGES)
    assert len([example for example in EXAMPLES if "quickstart" in example.values[0]]) == 3


def test_the_example_of_the_readme_prunes_what_it_says(capsys):
    ((_, blocks),) = sections("README.md")
    space = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "prunable weights (60.1 %) by 'forecast_curvature'" in printed
    assert space["pruned"].summary.pruned == round(0.6 * (8 * 64 + 64))
    for name, mask in space["pruned"].masks.items():
        assert not space["params"][name][~mask].any()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line
    links = re.findall(r"\]\((?!http|#)([^)#]+)|src=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        assert (ROOT / link).exists(), link
