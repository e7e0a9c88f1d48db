"""What the user sees while it runs: a bar per phase with loss, tokens per second and time left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Advance = Callable[[int, dict[str, float]], None]


class Progress:
    """Bars on a terminal, one line per finished phase elsewhere."""

    def __init__(self, console: Console | None = None):
        """Shows on a console, by default standard error, so that output can be piped."""
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Advance]:
        """Yields a function to call with the step reached and what is known of it."""
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bars:
            task = bars.add_task(name, total=steps, shown="")

            def advance(step: int, known: dict[str, float]) -> None:
                bars.update(task, completed=step, shown=_shown(known))

            yield advance


def _shown(known: dict[str, float]) -> str:
    parts = []
    if "loss" in known:
        parts.append(f"loss {known['loss']:.3f}")
    if "validation" in known:
        parts.append(f"validation {known['validation']:.3f}")
    if "tokens/s" in known:
        parts.append(f"{known['tokens/s']:,.0f} tokens/s")
    return ", ".join(parts)
