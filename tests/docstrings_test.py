"""Entries of docstring sections are noun phrases that stand alone, as in optax's documentation."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "swe_prune"
CHECKED = ("Args", "Attributes", "Raises")
SECTIONS = (*CHECKED, "Returns", "Yields", "Example", "Examples", "Note", "Notes")
LEANING = re.compile(r"[a-z]|(Of|As|That|Like) ")
"""An entry that starts in lower case or leans on the line above."""


def entries(docstring: str) -> Iterator[tuple[str, str, str]]:
    """Yields (section, name, explanation) of each entry of Args, Attributes and Raises."""
    section, indent = None, 0
    for line in docstring.splitlines():
        header = re.fullmatch(r"( *)(\w+):", line)
        if header and header[2] in SECTIONS:
            section, indent = header[2], len(header[1]) + 4
            continue
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            section = None
        entry = re.match(r"( *)([*\w.`,/ ]+?)(?: \([^)]*\))?: +(.*)", line)
        if section in CHECKED and entry and len(entry[1]) == indent:
            yield section, entry[2], entry[3]


def leaning(source: str) -> Iterator[str]:
    """Yields the entries of a module's docstrings that do not stand alone."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for section, name, explanation in entries(ast.get_docstring(node) or ""):
            if LEANING.match(explanation):
                yield f"{getattr(node, 'name', 'module')}, {section}: {name}: {explanation}"


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("Args:\n    x: Weights, (R, C).", 0),
        ("Args:\n    x: `None` for all weights.", 0),
        ("Args:\n    x: 0 to 1.", 0),
        ("Args:\n    x: Weights:\n        like this: one.", 0),
        ("Args:\n    x: weights, (R, C).", 1),
        ("Args:\n    x, y: Of the model.", 1),
        ("Attributes:\n    x: As in `train_step`.\n    y: Number.\n\n    z: told.", 2),
        ("Raises:\n    InputError: If x is negative.", 0),
        ("Raises:\n    InputError: of `prune`.", 1),
        ("Raises:\n    InputError: that x is negative.", 1),
    ],
)
def test_what_is_found(entry, found):
    text = f"Does.\n\n{entry}\n".replace("\n", "\n    ")
    assert len(list(leaning(f'def f():\n    """{text}"""\n'))) == found


def test_entries_stand_alone():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}: {entry}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for entry in leaning(path.read_text())
    ]
    assert not wrong, f"{len(wrong)} entries are not noun phrases:\n" + "\n".join(wrong)
