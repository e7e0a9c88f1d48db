"""Numbers with the interval that they are known to lie in, carried through sums and products."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Union

import numpy as np

from swe_prune.arguments import checked
from swe_prune.bounds import PART
from swe_prune.errors import InputError

Operand = Union["Interval", float, int]

ENDS = ("low", "value", "high")
"""Fields of an interval, in their order."""


@checked
@dataclasses.dataclass(frozen=True)
class Interval:
    """A number that is known to lie between two others.

    Sums, differences, products and quotients hold every result of numbers within their operands
    (Moore 1966); the value is the result of the values. Operands are taken as independent, so a
    difference of an interval with itself is not 0.

    Attributes:
        low: Least value.
        value: Best estimate.
        high: Greatest value.

    Raises:
        InputError: If the three are not finite and in this order.

    >>> Interval(1, 2, 3) * 2 + 1
    Interval(low=3, value=5, high=7)
    """

    low: float
    value: float
    high: float

    def __post_init__(self) -> None:
        """Checks the order."""
        if not (math.isfinite(self.low + self.high) and self.low <= self.value <= self.high):
            raise InputError(
                "an interval must have finite numbers with low <= value <= high, got "
                f"{self.low}, {self.value}, {self.high}; give them in this order"
            )

    @property
    def holds_zero(self) -> bool:
        """Whether the number may be 0."""
        return self.low <= 0 <= self.high

    def map(self, f: Callable[..., float], *others: "Interval") -> "Interval":
        """Returns the interval of a function's results, end by end: lows, values and highs.

        Args:
            f: Function of an end of this interval and the same one of each of the others.
            *others: Intervals that go up and down with this one, as of the same meter.

        >>> Interval(1, 2, 4).map(lambda a, b: a - b, Interval(1, 1, 2))
        Interval(low=0, value=1, high=2)
        """
        every = (self, *others)
        return Interval(*(f(*(getattr(one, end) for one in every)) for end in ENDS))

    def __add__(self, other: Operand) -> "Interval":
        other = interval(other)
        return Interval(self.low + other.low, self.value + other.value, self.high + other.high)

    def __sub__(self, other: Operand) -> "Interval":
        other = interval(other)
        return Interval(self.low - other.high, self.value - other.value, self.high - other.low)

    def __mul__(self, other: Operand) -> "Interval":
        other = interval(other)
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(min(ends), self.value * other.value, max(ends))

    def __truediv__(self, other: Operand) -> "Interval":
        other = interval(other)
        if other.holds_zero:
            raise InputError(f"cannot divide by {other}, which may be 0; measure it more precisely")
        return self * Interval(1 / other.high, 1 / other.value, 1 / other.low)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Operand) -> "Interval":
        return interval(other) - self


ZERO = Interval(0.0, 0.0, 0.0)


def interval(value: Operand) -> Interval:
    """Returns a number as an interval without width, and an interval as it is."""
    return value if isinstance(value, Interval) else Interval(value, value, value)


@checked
def of_samples(
    samples: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Returns the mean of samples with its bootstrap percentile interval (Efron 1979).

    Args:
        samples: Repeated measurements, at least two.
        confidence: Share of the resampled means that the interval holds.
        resamples: Number of resampled means.
        seed: Seed of the resampling.

    Raises:
        InputError: If there are fewer than two samples, or one is not finite.

    >>> of_samples([1.0, 1.0, 1.0])
    Interval(low=1.0, value=1.0, high=1.0)
    """
    PART.check(confidence, "confidence")
    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise InputError(
            f"a mean with an interval needs at least two finite samples, got {list(samples)[:5]}; "
            "measure more windows"
        )
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = values.mean()
    return Interval(float(min(low, mean)), float(mean), float(max(high, mean)))


PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


@checked
def text(number: Operand, unit: str = "") -> str:
    """Returns a number with its interval, in no more digits than the interval has.

    The last digit shown is the first of a quarter of the interval's width; a number without width
    has three digits.

    Args:
        number: Number or interval.
        unit: Unit, which gets a prefix such as k or m.

    >>> text(Interval(9.1, 12.3, 15.0), "Wh"), text(1234.5, "J"), text(Interval(0, 3e-5, 6e-5), "L")
    ('12 (9 to 15) Wh', '1.23 kJ', '30 (0 to 60) µL')
    """
    number = interval(number)
    size = max(abs(number.low), abs(number.value), abs(number.high))
    size = abs(number.value) or size
    factor, prefix = next(((f, p) for f, p in PREFIXES if unit and size >= f), (1.0, ""))
    if unit and 0 < size < PREFIXES[-1][0]:
        factor, prefix = PREFIXES[-1]
    low, value, high = (end / factor for end in (number.low, number.value, number.high))
    quarter = (high - low) / 4
    finest = math.log10(quarter) if quarter else math.log10(abs(value) or 1) - 2
    digit = math.floor(finest)
    shown = [_rounded(end, digit) for end in (value, low, high)]
    tail = f" ({shown[1]} to {shown[2]})" if quarter else ""
    return f"{shown[0]}{tail} {prefix}{unit}".rstrip()


def _rounded(value: float, digit: int) -> str:
    return f"{round(value, -digit) + 0.0:,.{max(0, -digit)}f}"
