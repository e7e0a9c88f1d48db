"""Imports point only upward in the list of the house (DESIGN), and every module is on it."""

import ast
import re
from pathlib import Path

import pytest

import swe_prune

PACKAGE = Path(swe_prune.__file__).parent
HOUSE = [
    "version", "early_signals", "errors", "bounds", "choices", "annotations", "arguments",
    "runtime", "ledger",
    "tree", "counting", "trajectory", "layout", "radix", "select", "schedules", "importance",
    "allocation", "patterns", "masks", "sparse_training", "calibration", "blockwise", "recipe",
    "pruning",
    "config", "sweep", "structured", "models", "data", "training", "parallel", "checkpoint",
    "resumable", "evaluation", "interop", "pretrained", "related", "study", "report", "cli",
    "__main__",
]  # fmt: skip


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path, package=PACKAGE):
    """The name on the list that a file belongs to: its own, or its folder's."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imported(source, path, package):
    """The dotted names that a file imports, split at their dots, wherever in the file it does."""
    inside = ["swe_prune", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ([*base, alias.name] for alias in node.names)


def imported_rooms(source, path, package=PACKAGE):
    """The names on the list that a file imports, wherever in the file it does."""
    targets = imported(source, path, package)
    yield from (target[1] for target in targets if target[0] == "swe_prune" and target[1:])


def imported_files(source, path, package=PACKAGE):
    """The files of the package that a file imports, as paths relative to it."""
    for target in imported(source, path, package):
        if target[0] != "swe_prune":
            continue
        # The longest part of the dotted name that is a file; the rest are names in it.
        for end in range(len(target), 1, -1):
            stem = package.joinpath(*target[1:end])
            found = [stem.with_suffix(".py"), stem / "__init__.py"]
            if exists := [file for file in found if file.is_file()]:
                yield exists[0].relative_to(package)
                break


def circles(graph):
    """The files on an import circle: what is left after removing all that import nothing left."""
    graph = {file: set(targets) - {file} for file, targets in graph.items()}
    while free := [file for file, targets in graph.items() if not targets & graph.keys()]:
        for file in free:
            graph.pop(file)
    return sorted(map(str, graph))


def test_no_file_imports_itself_through_others():
    files = {file.relative_to(PACKAGE): file for file in modules()}
    graph = {name: set(imported_files(file.read_text(), file)) for name, file in files.items()}
    assert sum(map(len, graph.values())) > 300  # the walk sees imports at all
    assert circles(graph) == []


def test_a_circle_is_seen_and_a_chain_is_not():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from swe_prune.masks import rules"
    )
    found = list(imported_files(source, PACKAGE / "select.py"))
    assert found == [Path("masks/rules.py")]


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


def test_an_error_without_a_message_has_a_first_line_too():
    """What `errors.first_line` and `DamagedError.fault` read is read by nothing else."""
    own = re.compile(r"str\(error\)[^\n]*(splitlines|partition)")
    found = [str(path.relative_to(PACKAGE)) for path in modules() if own.search(path.read_text())]
    assert found == ["errors.py"]
