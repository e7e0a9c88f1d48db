"""What a message tells the user to give, call or set exists, whichever file the message is in."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import swe_prune
from swe_prune.cli import parsing
from swe_prune.config import Config, flat

PACKAGE = Path(swe_prune.__file__).parent
FOREIGN = {
    "--no-deps",
    "--file_format",
    "--data_dir",
    "--help",
    "--version",
    "--xla_force_host_platform_device_count",
    "--xla",
}
"""Options of other programs, and of the parser itself."""
ENDINGS = {"py", "json", "jsonl", "csv", "md", "html", "safetensors"}
ROOMS = sorted(path.stem for path in PACKAGE.iterdir() if not path.stem.startswith("_"))


def messages():
    """(file, line, text) of every string of the package that is not a docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {
            id(node.value) for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                docs |= {id(one) for one in node.values}
                yield path, node.lineno, "".join(map(str, parts))
            elif isinstance(getattr(node, "value", None), str) and id(node) not in docs:
                yield path, node.lineno, node.value


MESSAGES = list(messages())


def found(pattern):
    """{what the pattern captures: where} over all messages of more than one word."""
    return {
        match[1]: f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path, line, text in MESSAGES if " " in text
        for match in re.finditer(pattern, text)
    }  # fmt: skip


def options():
    return {
        parsing.flag(field)
        for command in parsing.COMMANDS for cls in parsing.uses_of(command)
        for field in dataclasses.fields(cls)
    }  # fmt: skip


def test_options_exist():
    said = found(r"(?<![\w-])(--[a-z][a-z_-]+)(?![.\w])")
    assert len(said) > 30
    wrong = {name: where for name, where in said.items() if name not in options() | FOREIGN}
    assert not wrong


def test_settings_exist():
    said = found(r"config\.([a-z_]+\.[a-z_]+)\b(?!\.py|\()")
    assert said
    known = flat(Config())
    groups = {name.rpartition(".")[0] for name in known}
    assert not {one: where for one, where in said.items() if one not in known and one not in groups}


def test_commands_exist():
    said = found(r"(?:python -m swe_prune|the command|run) '?([a-z]+)'")
    assert not {one: where for one, where in said.items() if one not in parsing.COMMANDS}


def test_names_of_calls_exist():
    rooms = "|".join(ROOMS)
    said = found(
        rf"(?<![\w./])(?:swe_prune\.)?((?:{rooms})(?:\.[A-Za-z_]\w+)+)(?=[\s(,;='\"]|$|\.\s)"
    )
    assert len(said) > 30
    known = flat(Config())
    wrong = {}
    for name, where in said.items():
        first, *rest = name.split(".")
        if rest[-1] in ENDINGS or name in known or first == "config":
            continue
        value = importlib.import_module(f"swe_prune.{first}")
        for part in rest:
            value = getattr(value, part, None)
        if value is None:
            wrong[name] = where
    assert not wrong
