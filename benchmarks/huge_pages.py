"""What a train step costs without huge pages: time, processor time in the kernel, and page faults.

    python benchmarks/huge_pages.py [--turns=11] [--steps=100]
    python benchmarks/huge_pages.py --config=configs/shakespeare_char_paper.py --turns=9 --steps=2 \
        --config.model.dtype=float32 --config.data.batch=8

The first is the demo's model, the second the one of 10.7 M parameters. Two processes train the same
model, one with and one without glibc's huge pages, and take turns of so many steps each. Linux with
glibc, where the kernel gives huge pages on request.
"""

import argparse
import dataclasses
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
from accounts import accounted
from rich.console import Console
from rich.table import Table
from subjects import configured

from swe_prune import config
from swe_prune.runtime.huge_pages import HUGE_PAGES, TUNABLES
from swe_prune.study.experiment import setup

SERVE = "--serve"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a turn took, per step.

    Attributes:
        wall: Seconds.
        cpu: Seconds of processor time, over all threads.
        kernel: Seconds of it in the kernel.
        faults: Page faults that needed no disk.
    """

    wall: float
    cpu: float
    kernel: float
    faults: float


class Trainer:
    """A process that takes steps when it is told to."""

    def __init__(self, flags: list[str], huge: int):
        environment = {**os.environ, TUNABLES: f"{HUGE_PAGES}={huge}"}
        command = [sys.executable, __file__, SERVE, *flags]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def take(self, steps: int) -> Turn:
        """Takes the steps and returns what they took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        return Turn(*(float(word) / steps for word in self.process.stdout.readline().split()))


def serve(settings: config.Config) -> None:
    """Takes as many train steps as each line of the standard input says."""
    experiment = setup(settings, Path())
    state, step, batches = experiment.fresh_state(0), experiment.train_step, experiment.batches(0)
    for line in sys.stdin:
        before = measured()
        for _ in range(int(line)):
            state, _ = jax.block_until_ready(step(state, next(batches)))
        print(*(late - early for late, early in zip(measured(), before, strict=True)), flush=True)


def measured() -> tuple[float, float, float, int]:
    """Returns what a `Turn` holds, since the process began."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter(), cpu, usage.ru_stime, usage.ru_minflt


def main() -> None:
    """Prints the table, or takes the steps of one of the two processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=11, help="of each process, at least 2")
    parser.add_argument("--steps", type=int, default=100, help="of a turn")
    parser.add_argument(SERVE, action="store_true", help=argparse.SUPPRESS)
    flags, settings = configured(parser)
    if flags.serve:
        serve(settings)
    else:
        compare(flags, settings)


def compare(flags: argparse.Namespace, settings: config.Config) -> None:
    """Lets the two processes take turns, and prints the table."""
    without, with_them = (Trainer(sys.argv[1:], huge) for huge in (0, 1))
    for trainer in (without, with_them):  # compile
        trainer.take(2)
    turns = [(without.take(flags.steps), with_them.take(flags.steps)) for _ in range(flags.turns)]
    table = Table(title=f"{settings.name}: a step, medians of {flags.turns} turns")
    for heading in ("", "4 KiB pages", "huge pages", "huge / 4 KiB (quartiles)"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"ms": "wall", "ms of processor time": "cpu", "ms of it in the kernel": "kernel"}
    for name, field in (rows | {"page faults": "faults"}).items():
        unit = 1 if field == "faults" else 1e3
        small, huge = ([getattr(pair[i], field) * unit for pair in turns] for i in (0, 1))
        ratio = ""
        if field in ("wall", "cpu"):
            ratios = [b / a for a, b in zip(small, huge, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(
            name, f"{statistics.median(small):,.1f}", f"{statistics.median(huge):,.1f}", ratio
        )
    console = Console(width=100)
    console.print(
        f"jax {jax.__version__}, {platform.libc_ver()[1]} glibc, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    console.print(table)
    for trainer in (without, with_them):
        trainer.process.communicate()


if __name__ == "__main__":
    accounted(main)
