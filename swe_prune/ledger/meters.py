"""Meters of energy: NVML's and RAPL's counters, and a model of the processor where there is none.

A meter adds up what was spent since it was opened. It is polled every few seconds, because a
counter wraps and another process may reset it; what was lost then widens the interval.
"""

import glob
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from swe_prune.ledger.interval import ZERO, Interval


class Meter(Protocol):
    """Energy spent since the meter was opened.

    Attributes:
        source: Name for tables: "nvml", "rapl" or "modelled".
    """

    source: str

    def poll(self) -> Interval:
        """Returns the joules in all, which never become less."""
        ...


class CounterMeter:
    """Meter over a counter that the hardware keeps.

    Attributes:
        source: Name for tables.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[], float],
        *,
        error: float,
        rated: float,
        wraps_at: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the meter.

        Args:
            source: Name for tables.
            read: Function that returns the counter in joules.
            error: Half-width of the counter's own error, as a share.
            rated: Watts that the part cannot exceed, for the time in which a reading was lost.
            wraps_at: Joules at which the counter begins again. None: it does not.
            clock: Seconds that never go back.
        """
        self.source = source
        self._read, self._clock = read, clock
        self._error, self._rated, self._wraps_at = error, rated, wraps_at
        self._last: float | None = read()
        self._at, self._total = clock(), ZERO

    def poll(self) -> Interval:
        """Returns the joules in all; where the counter cannot be read, a wider interval."""
        at = self._clock()
        passed = max(0.0, at - self._at)
        most = self._rated * passed
        try:
            now = self._read()
        except Exception:  # of any driver; the run that is watched goes on
            now = None
        if now is None or self._last is None:
            # Until the next reading anything up to the rated power may have been spent.
            self._total += Interval(0.0, most / 2, most)
            self._last, self._at = now, at
            return self._total
        spent = now - self._last
        if spent < 0 and self._wraps_at is not None and spent + self._wraps_at <= most:
            spent += self._wraps_at
        if spent > 1 and not passed:
            added = Interval(
                0.0, spent, spent
            )  # the clock stood or went back, so nothing checks it
        elif spent < 0 or spent > 2 * most + 1:
            # Reset, or gone astray: anything up to the rated power may have been spent.
            added = Interval(0.0, most / 2, most)
        else:
            added = Interval(spent * (1 - self._error), spent, spent * (1 + self._error))
        self._total += added
        self._last, self._at = now, at
        return self._total


class ProcessorMeter:
    """Model of the processor: watts of idle and of busy hardware threads, times their time.

    A thread takes 0.74 W idle and 3.5 W busy, means of cloud servers by SPECpower (Cloud Carbon
    Footprint, methodology, 2024: AWS). The low end counts the busy time of this process alone; the
    high end doubles the model, since a desktop's threads take more and memory is not in it.
    """

    IDLE_WATTS, BUSY_WATTS, MOST = 0.74, 3.5, 2.0
    source = "modelled"

    def __init__(
        self,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] | None = None,
    ):
        """Opens the meter.

        Args:
            threads: Number of hardware threads. None: those that this process may use.
            clock: Seconds that never go back.
            busy: Function that returns the processor seconds of this process and its children.
        """
        self.threads = threads or len(os.sched_getaffinity(0))
        self._clock, self._busy = clock, busy or processor_seconds
        self._at, self._before = self._clock(), self._busy()
        self._wall = self._worked = 0.0

    def poll(self) -> Interval:
        """Returns the joules in all."""
        at, now = self._clock(), self._busy()
        # Summed up, so that a clock that goes back takes nothing away.
        self._wall += max(0.0, at - self._at)
        self._worked += max(0.0, now - self._before)
        self._at, self._before = at, now
        busy = min(self._worked, self._wall * self.threads)
        dynamic = busy * (self.BUSY_WATTS - self.IDLE_WATTS)
        value = self._wall * self.threads * self.IDLE_WATTS + dynamic
        return Interval(dynamic, value, self.MOST * value)


RATED_WATTS = {
    "H200": 700.0, "H100": 700.0, "A100": 400.0, "V100": 300.0, "B200": 1000.0, "A10": 150.0,
    "L40": 300.0, "L4": 72.0, "T4": 70.0, "TPU v4": 192.0,
}  # fmt: skip
"""Rated power of accelerators: NVIDIA's data sheets (SXM); TPU v4: Jouppi et al., 2304.01433."""


class RatedMeter:
    """Model of accelerators without a counter: time times a share of their rated power.

    Nothing is known of the load, so the interval reaches from a tenth of the rated power to all.
    """

    source = "modelled"

    def __init__(self, kinds: list[str], clock: Callable[[], float] = time.monotonic):
        """Opens the meter.

        Args:
            kinds: Name of each device, as `jax.Device.device_kind`.
            clock: Seconds that never go back.
        """
        known = [
            next((w for name, w in RATED_WATTS.items() if name in kind), None) for kind in kinds
        ]
        self.unknown = [kind for kind, watts in zip(kinds, known, strict=True) if watts is None]
        # A part that is not in the table may take anything that accelerators take.
        self._low = sum(0.1 * (watts or min(RATED_WATTS.values())) for watts in known)
        self._high = sum(watts or max(RATED_WATTS.values()) for watts in known)
        self._clock, self._at, self._wall = clock, clock(), 0.0

    def poll(self) -> Interval:
        """Returns the joules in all."""
        at = self._clock()
        self._wall += max(0.0, at - self._at)
        self._at, wall = at, self._wall
        return Interval(wall * self._low, wall * (self._low + self._high) / 2, wall * self._high)


def processor_seconds() -> float:
    """Returns the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


RAPL = "/sys/class/powercap/intel-rapl:*"
MOST_WATTS_OF_A_SOCKET = 1000.0


def rapl(pattern: str = RAPL) -> list[Meter]:
    """Returns a meter per socket that may be read, which needs root on Linux since 2020."""
    found: list[Meter] = []
    for folder in map(Path, sorted(glob.glob(pattern))):
        name, counter = folder / "name", folder / "energy_uj"
        if not os.access(counter, os.R_OK) or not name.read_text().startswith("package"):
            continue
        found.append(
            CounterMeter(
                "rapl",
                lambda counter=counter: int(counter.read_text()) * 1e-6,
                error=0.05,
                rated=MOST_WATTS_OF_A_SOCKET,
                wraps_at=int((folder / "max_energy_range_uj").read_text()) * 1e-6,
            )
        )
    return found


def nvml(library: Any | None = None) -> list[Meter]:
    """Returns a meter per NVIDIA GPU that this process may use, from Volta on.

    The counter is refreshed some ten times a second, and nvidia-smi's own samples cover a part of
    the time on A100 and H100 (2312.02741), so windows should last 5 s or more.

    Args:
        library: Module like pynvml. None: pynvml, and no meter where it is not installed.
    """
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return []
    try:
        library.nvmlInit()
    except library.NVMLError:
        return []
    found: list[Meter] = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        uuid = str(library.nvmlDeviceGetUUID(handle))
        if visible is not None and not {str(index), uuid} & set(visible.split(",")):
            continue
        try:
            library.nvmlDeviceGetTotalEnergyConsumption(handle)
            rated = library.nvmlDeviceGetEnforcedPowerLimit(handle) * 1e-3
        except library.NVMLError:
            continue
        found.append(
            CounterMeter(
                "nvml",
                lambda handle=handle: library.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3,
                error=0.05,
                rated=rated,
            )
        )
    return found


def of_this_machine(kinds: list[str] | None = None) -> list[Meter]:
    """Returns the best meters that there are: of the accelerators, and of the processor.

    Args:
        kinds: Names of the accelerators that are used, none for the processor alone.
    """
    gpus = nvml() if kinds else []
    found: list[Meter] = [*gpus, *(rapl() or [ProcessorMeter()])]
    if kinds and len(gpus) < len(kinds):
        found.append(RatedMeter(kinds[len(gpus) :]))
    return found
