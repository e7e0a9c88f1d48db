"""What the user sees during a run: a bar per phase on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from swe_prune import tree
from swe_prune.errors import visible

Advance = Callable[[int, dict[str, float]], None]

EVERY = 30
"""Seconds between the lines of a phase where there is no terminal."""


class Progress:
    """A bar per phase on a terminal; elsewhere one plain line every 30 s."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        """Prepares a console.

        Args:
            console: Console to print on; None: standard error, so that output can be piped.
            clock: Function that returns the time in seconds.
        """
        self.console = console or Console(stderr=True)
        self.clock = clock

    def say(self, text: str) -> None:
        """Prints one or more lines."""
        for line in text.split("\n"):
            print_line(self.console, line)

    @contextlib.contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Advance]:
        """Yields a function to call with the step reached and its metrics."""
        if not self.console.is_terminal:
            yield self._lines(name, steps)
            return
        bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with bars:
            task = bars.add_task(name, total=steps, shown="")

            def advance(step: int, known: dict[str, float]) -> None:
                bars.update(task, completed=step, shown=_shown(known))

            yield advance

    def _lines(self, name: str, steps: int) -> Advance:
        begun = last = self.clock()

        def advance(step: int, known: dict[str, float]) -> None:
            nonlocal last
            now = self.clock()
            if now - last >= EVERY:
                last = now
                parts = [f"{step} of {steps}", _shown(known), duration(now - begun)]
                self.say(f"{name}: {', '.join(filter(None, parts))}")

        return advance


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is: without colors or wrapping, its brackets not read as markup."""
    console.print(visible(text), highlight=False, soft_wrap=True, markup=False)


def tensor_table(title: str, rows: Iterable[tuple[str, Any, str]]) -> Table:
    """Returns a table of tensors, whose names and rules may look like rich's markup.

    Args:
        title: Title of the table.
        rows: Name, leaf, which may be abstract, and why it stays dense, "" where it is prunable.
    """
    table = Table(title=escape(visible(title)))
    for heading in ("tensor", "shape", "weights", "prunable?"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading == "weights" else "left"
        )
    for name, leaf, reason in rows:
        verdict = f"dense: {reason}" if reason else "prunable"
        table.add_row(*map(escape, (name, str(leaf.shape), f"{tree.size(leaf):,}", verdict)))
    return table


def duration(seconds: float) -> str:
    """Returns a time in its two largest units.

    >>> duration(48.3), duration(340), duration(7385)
    ('48 s', '5 min 40 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _shown(known: dict[str, float]) -> str:
    parts = []
    if "loss" in known:
        parts.append(f"loss {known['loss']:.3f}")
    if "validation" in known:
        parts.append(f"validation {known['validation']:.3f}")
    if "tokens/s" in known:
        parts.append(f"{known['tokens/s']:,.0f} tokens/s")
    return ", ".join(parts)
