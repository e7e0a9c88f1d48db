"""Imports point only upward in the list of the house (DESIGN), and every module is on it."""

import ast
from pathlib import Path

import pytest

import swe_prune

PACKAGE = Path(swe_prune.__file__).parent
HOUSE = [
    "version", "errors", "runtime", "tree", "counting", "config", "sweep", "trajectory", "select",
    "schedules", "importance", "allocation", "patterns", "masks", "sparse_training", "calibration",
    "blockwise", "recipe", "pruning", "models", "data", "training", "parallel", "checkpoint",
    "evaluation", "interop", "pretrained", "study", "report", "cli", "__main__",
]  # fmt: skip


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path, package=PACKAGE):
    """The name on the list that a file belongs to: its own, or its folder's."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source, path, package=PACKAGE):
    """The names on the list that a file imports, wherever in the file it does."""
    inside = ["swe_prune", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (target[1] for target in targets if target[0] == "swe_prune" and target[1:])


def faults(source, path):
    """What a file imports from below itself or from outside the list."""
    own = room(path)
    if own not in HOUSE:
        return [f"{own} is not on the list"]
    return [
        f"{own} imports {other}"
        for other in imported_rooms(source, path)
        if other not in HOUSE or HOUSE.index(other) > HOUSE.index(own)
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upward(path):
    assert faults(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("select.py", "from swe_prune import masks", "select imports masks"),
        ("select.py", "import swe_prune.masks as m", "select imports masks"),
        ("tree.py", "def f():\n    from swe_prune.config import Config", "tree imports config"),
        ("models/gpt.py", "from ..training import step", "models imports training"),
        ("models/gpt.py", "from swe_prune.models import gpt\nfrom . import x", None),
        ("masks.py", "from swe_prune.select import top_k_mask", None),
        ("masks.py", "from swe_prune import unheard_of", "masks imports unheard_of"),
        ("unheard_of.py", "", "unheard_of is not on the list"),
    ],
)
def test_the_check_sees_every_way_to_import(file, source, fault):
    assert faults(source, PACKAGE / file) == ([fault] if fault else [])


def test_orbax_is_imported_by_one_file():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any("orbax" in line for line in path.read_text().splitlines() if "import" in line)
    }
    assert importers <= {"checkpoint.py"}
