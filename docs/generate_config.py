"""Writes docs/config.md: every setting of an experiment, from the dataclasses of swe_prune.config.

python docs/generate_config.py            writes the file
python docs/generate_config.py --check    fails if the file says something else

The meaning of a field is the comment beside it, with the comment lines under it, or its entry in
the docstring's Attributes. A field with neither is an error.
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swe_prune.config import Config

PAGE = Path(__file__).with_name("config.md")

INTRODUCTION = """
A config file is Python: it defines `get_config()`, which returns an `ml_collections.ConfigDict` of
plain values, and it is executed. Run only configs that you trust. A setting that does not exist, or
a value of another type, is refused with a sentence. Any setting can be given on the command line as
`--config.GROUP.NAME=VALUE`, for example `--config.train.steps=2000`.

A duration or interval is a number of steps (`500`), a fraction of the phase (`"5%"`) or passes over
the training text (`"2 epochs"`).
"""


def page() -> str:
    """Returns the whole page."""
    parts = [
        "# Config\n",
        "Made by `python docs/generate_config.py` from the dataclasses of `swe_prune.config`.\n",
        INTRODUCTION,
    ]
    sections = list(groups())
    for cls, paths in sections:
        parts.append(section(cls, paths, {c.__name__: p for c, p in sections}))
    return "\n".join(parts)


def groups() -> Iterator[tuple[type, list[str]]]:
    """Yields each dataclass that a config reaches, with the paths at which it stands."""
    found: dict[type, list[str]] = {}

    def walk(cls: type, path: str) -> None:
        found.setdefault(cls, []).append(path)
        for name, hint in typing.get_type_hints(cls).items():
            inside = [hint, *typing.get_args(hint)]
            inside += [argument for one in inside for argument in typing.get_args(one)]
            for one in dict.fromkeys(inside):
                if dataclasses.is_dataclass(one):
                    many = any(typing.get_origin(of) is tuple for of in (hint, *inside))
                    listed = "[i]" if many else ""
                    walk(typing.cast(type, one), f"{path}.{name}{listed}".lstrip("."))

    walk(Config, "")
    yield from found.items()


def section(cls: type, paths: list[str], known: dict[str, list[str]]) -> str:
    """Returns the heading, the docstring and the table of one dataclass."""
    comments = {name: said for base in bases(cls) for name, said in meanings_of(base).items()}
    types = annotations(cls)
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        annotation = types[field.name]
        name = f"{cls.__name__}.{field.name}"
        meaning = sentence(comments.get(field.name, ""))
        if not meaning:
            raise SystemExit(f"{name} has no meaning; write a comment beside it")
        links = [
            f" See [{paths[0] or 'Config'}](#{anchor(paths[0])})."
            for other, paths in known.items()
            if other in annotation.replace("[", " ").replace(",", " ").split()
        ]
        cells = (f"`{field.name}`", f"`{annotation}`", default(field), meaning + "".join(links))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    shown = ", ".join(f"`{path}`" for path in paths) if paths[0] else "The whole config"
    heading = f"## {shown} {{ #{anchor(paths[0])} }}"
    table = "\n".join(rows)
    return f"{heading}\n\n`{cls.__name__}`: {inspect.getdoc(cls)}\n\n{table}\n"


def anchor(path: str) -> str:
    """Returns the name that a link to a section has."""
    return path.replace("[i]", "").replace(".", "-") or "config"


def annotations(cls: type) -> dict[str, str]:
    """Returns the types of the fields as the source has them, those of base classes too.

    A name of a Literal is replaced by the values that it stands for.
    """
    return {
        typing.cast(ast.Name, one.target).id: spelled(ast.unparse(one.annotation), base)
        for base in bases(cls)
        for one in typing.cast(ast.ClassDef, tree_of(base).body[0]).body
        if isinstance(one, ast.AnnAssign)
    }


def spelled(annotation: str, cls: type) -> str:
    """Returns an annotation with the values of a Literal in place of the name it has."""

    def values(name: re.Match[str]) -> str:
        known = getattr(sys.modules[cls.__module__], name[0], None)
        is_choice = typing.get_origin(known) is typing.Literal
        return " | ".join(map(repr, typing.get_args(known))) if is_choice else name[0]

    return re.sub(r"\w+", values, annotation)


def bases(cls: type) -> list[type]:
    """Returns the dataclasses that a class inherits from, the class last."""
    return [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]


def tree_of(cls: type) -> ast.Module:
    """Returns the parsed source of a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


def meanings_of(cls: type) -> dict[str, str]:
    """Returns the meanings of a class's own fields: Attributes of the docstring, then comments."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    comments = {name: said for name, said in comments_of(cls).items() if said}
    return {name: " ".join(said.split()) for name, said in entries} | comments


def comments_of(cls: type) -> dict[str, str]:
    """Returns the comments beside the fields, each with the comment lines below it."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for one in typing.cast(ast.ClassDef, tree_of(cls).body[0]).body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            end = one.end_lineno or one.lineno
            lines = [comments[n] for n in range(one.lineno, end + 1) if n in comments]
            below = end + 1
            while lines and below in comments and source.splitlines()[below - 1].strip()[0] == "#":
                lines.append(comments[below])
                below += 1
            found[one.target.id] = " ".join(lines)
    return found


def sentence(comment: str) -> str:
    """Returns a comment as a sentence."""
    text = comment.strip()
    return text and text[0].upper() + text[1:].rstrip(".") + "."


def default(field: "dataclasses.Field[Any]") -> str:
    """Returns the default as code; of a group, what differs from its own defaults."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if dataclasses.is_dataclass(value):
        plain = type(value)()
        other = [
            f"{one.name}={getattr(value, one.name)!r}"
            for one in dataclasses.fields(value)
            if getattr(value, one.name) != getattr(plain, one.name)
        ]
        return f"`{type(value).__name__}({', '.join(other)})`"
    return f"`{value!r}`"


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        raise SystemExit(
            f"{PAGE.name} is not what the dataclasses say; run {' '.join(sys.argv[:1])}"
        )
