"""What the ledger adds to the train step of the demo, as a share of its time.

    python benchmarks/ledger_overhead.py [--seconds=30]

The ledger reads its meters and writes its file every ten seconds in a thread of its own, and once
at both ends of a phase. A reading with its writing is timed next to a phase's train steps, in a
ledger that already has as many entries as a study of a size. The share is of processor time, which
others on the machine disturb less: what a core gives the ledger in ten seconds, whatever a step
takes.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from swe_prune import config, ledger
from swe_prune.ledger import book
from swe_prune.study.experiment import setup

DEMO = Path(__file__).parents[1] / "configs" / "shakespeare_char.py"
ENTRIES = (1, 250, 10_000)
AIM = 1e-3


def main() -> None:
    """Times readings while the demo trains, and prints their shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each size")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        experiment = setup(config.load(DEMO), folder)
        batches, step = experiment.batches(0), experiment.dense_step()
        state = [experiment.fresh_state(0)]

        def train() -> float:
            begun = time.perf_counter()
            state[0], metrics = step(state[0], next(batches))
            jax.block_until_ready(metrics)
            return time.perf_counter() - begun

        train()
        table = Table(
            "entries", "processor, ms a reading", "train step, ms", f"share of {book.EVERY:g} s",
            title=f"{platform.machine()}, jax {jax.__version__}; aim: below {AIM:.1%}",
        )  # fmt: skip
        for entries in ENTRIES:
            table.add_row(*row(folder, entries, options.seconds, train))
    console.print(table)


def row(folder: str, entries: int, seconds: float, train: Callable[[], float]) -> list[str]:
    """Returns the row of a ledger with so many entries."""
    own = ledger.Ledger(Path(folder) / str(entries), every=1e9)
    own.entries += [book.Entry("prune", f"seed_0/cell_{n}", status=book.DONE)
                    for n in range(entries - 1)]  # fmt: skip
    readings, steps = [], []
    with own.measure("train"):
        own._write()  # the text of what has ended is made once
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(readings) < 5:
            steps.append(train())
            begun = time.thread_time()
            own._read()
            own._write()
            readings.append(time.thread_time() - begun)
    once = statistics.median(readings)
    return [
        f"{entries:,}",
        f"{1e3 * once:.2f}",
        f"{1e3 * statistics.median(steps):.1f}",
        f"{once / book.EVERY:.4%}",
    ]


if __name__ == "__main__":
    main()
