"""What runs have cost by their ledgers: one line for each working directory, and the sum.

python benchmarks/ledger_sum.py runs/demo runs/ledger [--country=FRA]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from swe_prune import ledger
from swe_prune.ledger import Entry, Factors


def line(name: str, entries: list[Entry], place: Factors) -> list[str]:
    """Returns the name, attempts, hours, energy, carbon and water as text."""
    spent = ledger.total(entries)
    paid = ledger.footprint(spent, place)
    return [
        name,
        str(len({entry.attempt for entry in entries})),
        f"{spent.seconds / 3600:.2f}",
        ledger.text(paid.kwh * 1e3, "Wh"),
        ledger.text(paid.carbon * 1e3, "g CO2e"),
        ledger.text(paid.water, "L"),
        ledger.sources(entries),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--country", default=ledger.WORLD)
    options = parser.parse_args()
    place = ledger.of_country(options.country)
    table = Table("working directory", "attempts", "hours", "energy", "carbon", "water", "meters")
    every: list[Entry] = []
    for workdir in options.workdirs:
        entries = ledger.read(workdir / "ledger")
        table.add_row(*line(workdir.name, entries, place))
        every += entries
    table.add_section()
    table.add_row(*line("in all", every, place))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
