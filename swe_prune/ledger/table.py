"""The ledger of a run as rows, as ledger.csv, and as one line a phase."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from swe_prune.arguments import checked
from swe_prune.ledger.book import KILLED, Entry
from swe_prune.ledger.factors import Factors, footprint, pictured
from swe_prune.ledger.interval import ENDS, ZERO, text
from swe_prune.runtime import storage

MEASURED = ("phase", "cell", "attempt", "process", "status", "seconds", "processor_seconds")
INTERVALS = ("joules", "kwh", "kg_co2e", "litres")
_SUFFIXES = dict(zip(ENDS, ("_low", "", "_high"), strict=True))
COLUMNS = (
    *MEASURED,
    *(f"{name}{suffix}" for name in INTERVALS for suffix in _SUFFIXES.values()),
    "source",
    "tokens",
)
"""Columns of ledger.csv; a phase within another one, "outer/inner", is part of the outer one."""


def row(entry: Entry, factors: Factors) -> dict[str, Any]:
    """Returns the row of one entry."""
    paid = footprint(entry, factors)
    amounts = dict(zip(INTERVALS, (entry.joules, paid.kwh, paid.carbon, paid.water), strict=True))
    return {
        **{name: getattr(entry, name) for name in (*MEASURED, "source", "tokens")},
        **{
            f"{name}{suffix}": f"{getattr(amount, end):.6g}"
            for name, amount in amounts.items()
            for end, suffix in _SUFFIXES.items()
        },
    }


@checked
def write(path: epath.PathLike, entries: Iterable[Entry], factors: Factors) -> None:
    """Writes the rows of entries as CSV, atomically."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(row(entry, factors) for entry in entries)
    storage.write(path, out.getvalue())


@checked
def total(entries: Iterable[Entry], phase: str = "in all") -> Entry:
    """Returns one entry for all that are not part of another one: seconds, joules, tokens.

    Failed and killed attempts count: they were paid for.
    """
    top = [entry for entry in entries if entry.top]
    seconds = sum(entry.seconds for entry in top)
    parts = {part for entry in top for part in entry.parts}
    return Entry(
        phase,
        tokens=sum(entry.tokens for entry in top),
        seconds=seconds,
        processor_seconds=sum(entry.processor_seconds for entry in top),
        joules=sum((entry.joules for entry in top), ZERO),
        source=sources(top),
        # As many of each part, in the mean, as made up the part-seconds.
        parts={
            part: sum(entry.parts.get(part, 0) * entry.seconds for entry in top) / (seconds or 1.0)
            for part in sorted(parts)
        },
    )


def by_phase(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Returns the entries that are not part of another one, by phase, in their order."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.top:
            found.setdefault(entry.phase, []).append(entry)
    return found


@checked
def sources(entries: Iterable[Entry]) -> str:
    """Returns the meters of the entries, such as "nvml+modelled"."""
    found = (source for entry in entries for source in entry.source.split("+"))
    return "+".join(dict.fromkeys(found))


@checked
def lines(entries: Sequence[Entry], factors: Factors) -> list[tuple[str, ...]]:
    """Returns (phase, seconds, energy, carbon, water) of each phase and of the whole, as text."""
    phases = by_phase(entries)
    shown = []
    for spent in [*(total(some, name) for name, some in phases.items()), total(entries)]:
        paid = footprint(spent, factors)
        shown.append(
            (
                spent.phase,
                f"{spent.seconds:,.1f}",
                text(paid.kwh * 1e3, "Wh"),
                text(paid.carbon * 1e3, "g CO2e"),
                text(paid.water, "L"),
            )
        )
    return shown


@checked
def summary(entries: Sequence[Entry], factors: Factors) -> str:
    """Returns the whole in one or two sentences.

    Args:
        entries: Entries of all attempts.
        factors: Factors of the place.
    """
    paid = footprint(total(entries), factors)
    failed = [entry for entry in entries if entry.top and entry.status == KILLED]
    lost = (
        f", {text(total(failed).joules, 'J')} of it in attempts that were killed" if failed else ""
    )
    return (
        f"Energy at the meter: {text(paid.kwh * 1e3, 'Wh')} ({sources(entries)}), "
        f"{text(paid.carbon * 1e3, 'g')} CO2e, {text(paid.water, 'L')} of water{lost}: "
        f"{pictured(paid.kwh)}."
    )
