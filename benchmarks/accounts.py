"""What a benchmark itself costs: a ledger in runs/benchmarks, and one line at the end.

`python benchmarks/ledger_sum.py runs/benchmarks/*` adds them up, failed and killed runs included.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from swe_prune import ledger
from swe_prune.errors import InputError, RunError

FOLDER = Path("runs/benchmarks")
TOLD = 5.0
"""Seconds below which a run, such as a look at --help, is not worth a line."""


def accounted(main: Callable[[], object]) -> None:
    """Runs a benchmark's main function, and writes down what it took.

    Args:
        main: Function of a process that computes by itself. One that only starts others is idle
            meanwhile; they have accounts of their own.

    Raises:
        SystemExit: With its sentence, if the function raises InputError or RunError.
    """
    name = Path(sys.argv[0]).stem
    book = ledger.Ledger(FOLDER / name)
    try:
        with ledger.opened(book), ledger.measure(name):
            main()
    except (InputError, RunError) as error:
        sys.exit(f"{name}: {error}")
    finally:
        if book.entries[0].seconds > TOLD:
            print(ledger.summary(book.entries, ledger.of_country(ledger.WORLD)), file=sys.stderr)
