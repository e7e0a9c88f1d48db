"""Writes docs/methods.md from what the registries and docstrings say of themselves.

python docs/generate_methods.py            writes the file
python docs/generate_methods.py --check    fails if the file says something else
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swe_prune import allocation, importance, patterns, schedules
from swe_prune.importance import Criterion
from swe_prune.trajectory import BUFFERS

PAGE = Path(__file__).with_name("methods.md")
FAMILIES = {
    "magnitude": "Of the final weights alone",
    "from_trajectory": "Of what a weight did while it trained",
    "curvature": "Of the trajectory and the optimizer's curvature",
    "gradient": "Of gradients",
    "bezier": "Of the histogram of the weights",
    "activation": "Of the layer's inputs",
    "hessian": "Of the layer's outputs",
}
MEMORY = {
    "second_moment": "none beside the optimizer's own",
    "gradient": "4 bytes a weight",
    "gradient_square": "4 bytes a weight",
    "input_norm": "4 bytes an input",
    "hessian": "4 R² bytes for R inputs",
    "learned": "4 bytes a weight and its optimizer's moments",
}
COST = {
    "gradient": "a backward pass for every calibration batch",
    "gradient_square": "a backward pass for every calibration example",
    "input_norm": "a forward pass over the calibration batches",
    "hessian": "a forward pass over the calibration batches, a Cholesky factor for each kernel",
    "learned": "a fine-tuning run that learns the scores",
}


def page() -> str:
    """Returns the whole page."""
    parts = ["# Methods\n", "Made by `python docs/generate_methods.py` from the docstrings.\n"]
    parts += [
        "An ablation is a grid over four names: criterion, allocation, pattern and schedule.\n"
    ]
    parts += ["## Criteria\n", *criteria()]
    parts += ["## Allocations\n", "How much each tensor loses (`allocation.allocate`).\n"]
    parts += [entry(name, allocation.get(name).function) for name in allocation.names()]
    parts += ["## Patterns\n", first_paragraphs(inspect.getdoc(patterns) or "", skip=1)]
    parts += [f"Names: {', '.join(f'`{name}`' for name in patterns.NAMES)}.\n"]
    parts += ["## Schedules\n", "When weights go (`schedules.get`).\n"]
    parts += [entry(name, schedules.get(name)) for name in schedules.names()]
    return "\n".join(parts)


def criteria() -> Iterator[str]:
    """Yields the overview of the criteria, then each family's."""
    every = [importance.get(name) for name in importance.names()]
    yield "| name | needs | memory | cost |\n|---|---|---|---|"
    for one in every:
        yield f"| [`{one.name}`](#{one.name}) | {needs(one)} | {memory(one)} | {cost(one)} |"
    for module, title in FAMILIES.items():
        yield f"\n### {title}\n"
        for one in every:
            if one.function.__module__.rpartition(".")[2] == module:
                yield criterion(one)


def criterion(one: Criterion) -> str:
    """Returns one criterion: its formula, what it is, and when to use it."""
    text = inspect.getdoc(one.function) or ""
    body, _, _ = text.partition("\nArgs:")
    said = {key: labelled(body, key) for key in ("When", "Source")}
    body = re.split(r"^When: ", body, flags=re.MULTILINE)[0]
    lines = [f"#### {one.name}\n", first_paragraphs(body)]
    lines += [f"* When: {said['When']}", f"* Source: {said['Source']}", f"* Needs: {needs(one)}"]
    if one.options:
        parameters = inspect.signature(one.function).parameters
        shown = ", ".join(f"`{name}={parameters[name].default!r}`" for name in one.options)
        lines.append(f"* Options: {shown}")
    return "\n".join([*lines, f"* Memory: {memory(one)}", f"* Cost: {cost(one)}", ""])


def labelled(text: str, label: str) -> str:
    """Returns what follows "label: " in a docstring, on one line."""
    match = re.search(rf"^{label}: (.*(?:\n    .*)*)", text, flags=re.MULTILINE)
    if match is None:
        raise SystemExit(f"a docstring lacks {label!r}: {text[:60]!r}…; add it")
    return " ".join(match[1].split())


def needs(one: Criterion) -> str:
    """Returns the needs beside the weights, which every criterion is given."""
    named = [need for need in one.needs if need in one.measures or need in one.measured]
    return ", ".join(named) or "the weights alone"


def memory(one: Criterion) -> str:
    """Returns what must be held beside the weights until they are scored."""
    buffers = {buffer for measure in one.measures for buffer in BUFFERS[measure]}
    held = [f"{4 * len(buffers)} bytes a weight"] if buffers else []
    held += [MEMORY[need] for need in one.measured]
    return "; ".join(dict.fromkeys(held)) or "none"


def cost(one: Criterion) -> str:
    """Returns what a score costs beside one pass over the weights."""
    costs = [COST[need] for need in one.measured if need in COST]
    costs += ["a sort within each tensor"] if one.sorts else []
    return "; ".join(costs) or "one pass over the weights"


def entry(name: str, documented: Callable[..., Any] | type) -> str:
    """Returns an entry of another registry: its docstring up to the arguments."""
    text = re.split(r"\n(?:Args|Attributes|Raises|Returns):", inspect.getdoc(documented) or "")[0]
    text = re.split(r"^>>> ", text, flags=re.MULTILINE)[0]
    return f"#### {name}\n\n{first_paragraphs(text)}"


def first_paragraphs(text: str, skip: int = 0) -> str:
    """Returns the paragraphs with their lines joined, but for indented formulas."""
    out = []
    for paragraph in text.strip().split("\n\n")[skip:]:
        indented = paragraph.startswith("    ")
        out.append(paragraph if indented else " ".join(paragraph.split()))
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        raise SystemExit(
            f"{PAGE.name} is not what the docstrings say; run {' '.join(sys.argv[:1])}"
        )
