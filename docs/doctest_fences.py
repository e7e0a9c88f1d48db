"""Shows the doctests of docstrings as code: an extension of griffe, which mkdocstrings reads with.

Our doctests stand at the end of a docstring without a heading, where Markdown would take `>>>` for
a quotation.
"""

import re
from typing import Any

import griffe

LIST = re.compile(r"(\S+)? {2,}\S")
"""A line of a list in two columns, the second of which may go on in the next line."""


def fenced(docstring: str) -> str:
    r"""Returns a docstring with its doctests, and its lists in two columns, in fences.

    >>> fenced("Adds.\n\n>>> add(1, 2)\n3\n\nMore.")
    'Adds.\n\n```pycon\n>>> add(1, 2)\n3\n```\n\nMore.'
    """

    def one(paragraph: str) -> str:
        lines = paragraph.splitlines()
        if paragraph.startswith(">>> "):
            return f"```pycon\n{paragraph}\n```"
        if len(lines) > 1 and not paragraph.startswith(" ") and all(map(LIST.match, lines)):
            return f"```text\n{paragraph}\n```"
        return paragraph

    return "\n\n".join(map(one, re.split(r"\n{2,}", docstring)))


class DoctestFences(griffe.Extension):
    """Puts the doctests of every docstring that is read into fences."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of an object once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
