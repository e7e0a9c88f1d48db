"""The tables as Markdown, to be pasted into a README."""

import html
from collections.abc import Sequence

from swe_prune.errors import visible
from swe_prune.report.formats import DASH
from swe_prune.report.tables import Bold, Table


def document(title: str, lead: str, tables: Sequence[Table]) -> str:
    """Returns a title, a sentence and the tables, each after its caption."""
    parts = [f"# {_plain(title)}", _plain(lead), *map(_table, tables)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rule = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    lines = [f"| {' | '.join(map(_entry, row))} |" for row in [table.head, rule, *table.rows]]
    return f"{_plain(table.caption)}\n\n" + "\n".join(lines)


def _entry(text: str) -> str:
    escaped = _plain(text).replace("|", "\\|") or DASH
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def _plain(text: str) -> str:
    """Returns a text without HTML, which Markdown takes as it is, and without line ends."""
    return html.escape(visible(text), quote=False)
