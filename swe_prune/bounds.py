"""Ranges of numbers, one table of them for config files, command lines and library calls."""

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from swe_prune.errors import InputError, shown

_LARGEST = 3.4028234663852886e38  # of float32
_TINY = 1.1754943508222875e-38


class Bound(NamedTuple):
    """The numbers that a setting may be; NaN is none of them.

    Attributes:
        least: Least value.
        most: Largest value.
        below: Number that the value must be less than.
        whole: Whether it must be an integer.
    """

    least: float
    most: float = _LARGEST
    below: float = math.inf
    whole: bool = False

    def check(self, value: Any, what: str) -> None:
        """Checks a value.

        Args:
            value: Value to check.
            what: Name of the setting, for the sentence.

        Raises:
            InputError: The value is not a number, of the wrong kind or out of the range.

        >>> COUNT.check(3, "steps")
        >>> SHARE.check(2, "rate")
        Traceback (most recent call last):
        ...
        swe_prune.errors.InputError: rate must be a finite number of at least 0 and below 1, got 2
        """
        kind = numbers.Integral if self.whole else numbers.Real
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()  # of numpy and jax
        number: Any = value if isinstance(value, kind) and not isinstance(value, bool) else math.nan
        if not (self.least <= number <= self.most and number < self.below):
            range_ = self._words(maximum=number > self.most)
            raise InputError(f"{what} must be {range_}, got {shown(value)}")

    def __str__(self) -> str:
        """Returns the range in words."""
        return self._words(maximum=False)

    def _words(self, maximum: bool) -> str:
        """Returns the range in words, and a maximum of the usual size if asked."""
        words = [f"above {0:g}" if self.least == _TINY else f"of at least {self.least:g}"]
        if math.isfinite(self.below):
            words.append(f"below {self.below:g}")
        elif maximum or self.most not in (COUNT.most, _LARGEST):
            words.append(f"at most {self.most if self.whole else format(self.most, 'g')}")
        return f"{'an integer' if self.whole else 'a finite number'} {' and '.join(words)}"


def check_each(settings: Any, ranges: Mapping[str, Bound], where: str) -> None:
    """Checks numbers of settings, or the members of tuples; None is left to a setting's type.

    Args:
        settings: Dataclass with the settings.
        ranges: Range of each by its name, such as "rope.theta".
        where: Name of the settings, for the sentence.

    Raises:
        InputError: One is out of its range.
    """
    for name, bound in ranges.items():
        value = operator.attrgetter(name)(settings)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                bound.check(one, f"{where}.{name}")


COUNT = Bound(1, 2**31 - 1, whole=True)
"""Sizes and steps, which are int32 on the devices."""

TURNS = Bound(0, 10**6, whole=True)
"""Runs of a measurement, each of which takes its time and is remembered."""

DAY = Bound(0.0, 86_400.0)
"""Seconds of a measurement or a wait."""

INDEX = Bound(0, 2**31 - 1, whole=True)
SEED = Bound(0, 2**32 - 1, whole=True)
POSITIVE = Bound(_TINY)
NOT_NEGATIVE = Bound(0.0)
SHARE = Bound(0.0, below=1.0)
FRACTION = Bound(_TINY, 1.0)
PART = Bound(0.0, 1.0)
