"""Energy of models that serve, in windows of each in turn, and the power of the idle machine."""

import dataclasses
import numbers
import time
from collections.abc import Callable, Mapping, Sequence

from swe_prune.arguments import checked
from swe_prune.bounds import DAY, TURNS
from swe_prune.errors import InputError, shown
from swe_prune.ledger.interval import ENDS, ZERO, Interval, of_samples
from swe_prune.ledger.meters import Meter

WINDOWS, SECONDS = 20, 5.0
"""Windows of each model, and the least seconds of one: NVML refreshes its counter every 0.1 s."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What one model took in one window.

    Attributes:
        joules: Energy by the meters.
        seconds: Length of the window.
        tokens: Tokens that were worked through.
    """

    joules: Interval
    seconds: float
    tokens: int

    @property
    def per_token(self) -> Interval:
        """Joules per token.

        Raises:
            InputError: If there are no tokens.
        """
        if self.tokens < 1:
            raise InputError(f"a window must have tokens, got {self.tokens}; work for longer")
        return self.joules * (1 / self.tokens)


@checked
def windows(
    works: Mapping[str, Callable[[], int]],
    meters: Sequence[Meter],
    *,
    count: int = WINDOWS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[Window]]:
    """Measures works in turns: window i of each is next to window i of the others.

    Every other round goes backward, so that a machine that warms up favours none. Each work runs
    once before the first window.

    Args:
        works: Functions by name that work until the device is done, and return how many tokens
            they worked through.
        meters: Meters to read, such as those of `Ledger().meters`.
        count: Number of windows of each work.
        seconds: Least length of a window; 0: one run of the work.
        clock: Seconds that never go back.

    Raises:
        InputError: If count is not 1 to 10^6, seconds is negative or more than a day, or a work has
            no tokens.

    >>> from swe_prune.ledger.meters import ProcessorMeter
    >>> found = windows({"model": lambda: 128}, [ProcessorMeter()], count=2, seconds=0.01)
    >>> len(found["model"]), found["model"][0].seconds >= 0.01
    (2, True)
    """
    TURNS.check(count, "count")
    DAY.check(seconds, "seconds")
    found: dict[str, list[Window]] = {name: [] for name in works}
    for number in range(-1, count):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            begun, before, tokens = clock(), _polled(meters), 0
            while True:
                tokens += _counted(name, works[name]())
                if number < 0 or clock() - begun >= seconds:
                    break
            after, length = _polled(meters), clock() - begun
            if tokens < 1:
                raise InputError(f"work {name!r} must work through tokens, got {tokens}")
            if number >= 0:
                spent = after.map(lambda b, a: max(0.0, b - a), before)
                found[name].append(Window(spent, length, tokens))
    return found


def _counted(name: str, tokens: object) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral) or tokens < 0:
        raise InputError(
            f"work {name!r} must return how many tokens it worked through, got {shown(tokens)}"
        )
    return int(tokens)


@checked
def per_token(found: Sequence[Window]) -> Interval:
    """Returns joules per token: the mean, from the meter's low end to its high end.

    The ends are those of the bootstrap's intervals of the mean, if there are several windows.

    >>> one = Window(Interval(1.0, 2.0, 4.0), 5.0, 2)
    >>> per_token([one, one])
    Interval(low=0.5, value=1.0, high=2.0)
    """
    each = [one.per_token for one in found]
    if not each:
        raise InputError("found must have one window or more, got none")
    if len(each) == 1:
        return each[0]
    low, value, high = (of_samples([getattr(one, end) for one in each]) for end in ENDS)
    return Interval(low.low, value.value, high.high)


@checked
def idle_watts(meters: Sequence[Meter], seconds: float = SECONDS) -> Interval:
    """Returns the power of the machine while this process does nothing.

    Args:
        meters: Meters to read.
        seconds: Time to wait, positive.

    Raises:
        InputError: If it is not positive, or more than a day.
    """
    DAY.check(seconds, "seconds")
    if seconds == 0:
        raise InputError("seconds must be above 0, in which energy can be used, got 0")
    begun, before = time.monotonic(), _polled(meters)
    time.sleep(float(seconds))
    after, length = _polled(meters), time.monotonic() - begun
    return after.map(lambda b, a: (b - a) / length, before)


def _polled(meters: Sequence[Meter]) -> Interval:
    return sum((meter.poll() for meter in meters), ZERO)
