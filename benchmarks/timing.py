"""Side-by-side timing: the runs of the two alternate, so a busy machine slows both; and memory."""

import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What alternating runs of `a` and `b` took.

    Attributes:
        seconds_a: of each repetition of `a`, per call.
        seconds_b: of each repetition of `b`, per call.
        other_load: share of all processor time that other processes took meanwhile, for each
            repetition; nan where the system does not tell.
    """

    seconds_a: Sequence[float]
    seconds_b: Sequence[float]
    other_load: Sequence[float]

    @property
    def speedups(self) -> list[float]:
        """How many times as fast `a` was as the `b` beside it, sorted, one for each repetition."""
        return sorted(b / a for a, b in zip(self.seconds_a, self.seconds_b, strict=True))

    @property
    def speedup(self) -> float:
        """The median of `speedups`; above 1, `a` is the faster."""
        return statistics.median(self.speedups)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.speedups, n=4, method="inclusive")
        return (
            f"{self.speedup:.3f} (quartiles {low:.3f} to {high:.3f}, "
            f"range {self.speedups[0]:.3f} to {self.speedups[-1]:.3f}, "
            f"{len(self.speedups)} repetitions, "
            f"others used {statistics.median(self.other_load):.0%} of the machine)"
        )


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    repetitions: int = 9,
    calls: int = 1,
    warmup: int = 2,
    pause: float = 0.0,
    quiet: float = 1.0,
    patience: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Times `a` and `b` in turns and returns the seconds per call of every repetition.

    Args:
        a: does its work before it returns (call `jax.block_until_ready` inside).
        b: likewise.
        repetitions: pairs of measurements, two or more; which of the pair goes first alternates.
        calls: calls in one measurement.
        warmup: calls of each before the first measurement, for compilation and caches.
        pause: seconds of sleep before each measurement. Worker threads of the other one may go on
            spinning after their last task; a pause longer than they spin keeps them out.
        quiet: a pair during which other processes used a larger share of the machine is measured
            again. The share is not a result, so this chooses moments and not results.
        patience: how many pairs may be measured again in all; then pairs are taken as they come.
        clock: `time.process_time` counts the processor seconds of all threads instead, spinning
            included; a busy machine hardly disturbs it, so with one thread it is the better judge.
    """
    for run in (a, b):
        for _ in range(warmup):
            run()
    pairs: list[tuple[float, float, float]] = []
    while len(pairs) < repetitions:
        seconds = {}
        wall, busy = time.perf_counter(), _busy_others()
        for run in (a, b) if len(pairs) % 2 == 0 else (b, a):
            time.sleep(pause)
            start = clock()
            for _ in range(calls):
                run()
            seconds[run] = (clock() - start) / calls
        elapsed = (time.perf_counter() - wall) * (os.cpu_count() or 1)
        load = max(0.0, _busy_others() - busy) / elapsed
        if load > quiet and patience > 0:
            patience -= 1
            continue
        pairs.append((seconds[a], seconds[b], load))
    return Comparison(*zip(*pairs, strict=True))


def _busy_others() -> float:
    """Returns the processor seconds that all other processes have used, on Linux; else nan."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return float("nan")
    idle = ticks[3] + ticks[4]  # waiting for work and for disks
    own = sum(os.times()[:2])
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - own


def peak_rss_mib() -> float:
    """Returns the most memory that this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def restart_peak() -> None:
    """Has Linux forget the most memory that this process has held before now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mib() -> tuple[float, float]:
    """Returns the memory that this process holds, and the most since `restart_peak`; Linux, MiB.

    Of a process that another one started, `getrusage` would also count the parent.
    """
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM"))
    return now, peak
