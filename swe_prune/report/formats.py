"""How numbers are written in text, tables and figures."""

import math

from swe_prune.report.stats import Spread

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def number(value: float, digits: int = 4) -> str:
    """Returns a decimal with a true minus sign, or "diverged" where it is not finite.

    >>> number(-0.00001, 3), number(float("inf"))
    ('0.000', 'diverged')
    """
    if not math.isfinite(value):
        return "diverged"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 4) -> str:
    """Returns a change with its sign, + or −.

    >>> signed(0.25, 2), signed(0.0, 2)
    ('+0.25', '0.00')
    """
    text = number(value, digits)
    return f"+{text}" if math.isfinite(value) and float(f"{value:.{digits}f}") > 0 else text


def percent(fraction: float) -> str:
    """Returns a fraction as a percentage with a no-break space before the sign; whole ones bare."""
    return f"{f'{100 * fraction:.1f}'.removesuffix('.0')}{NBSP}%"


def mean_sd(value: Spread | None, digits: int = 4, sign: bool = False) -> str:
    """Returns `mean ± sd`, the mean alone without an sd, a dash where nothing was measured."""
    if value is None:
        return DASH
    if value.diverged:
        return f"diverged ({value.diverged} of {value.n})" if value.n > 1 else "diverged"
    mean = signed(value.mean, digits) if sign else number(value.mean, digits)
    return mean if value.sd is None else f"{mean}{NBSP}±{NBSP}{number(value.sd, digits)}"


def percent_sd(value: Spread) -> str:
    """Returns a fraction as `mean ± sd %`; an sd too small to print is left out."""
    mean = f"{100 * value.mean:.1f}"
    if value.sd is None or round(100 * value.sd, 1) == 0:
        return f"{mean}{NBSP}%"
    return f"{mean}{NBSP}±{NBSP}{100 * value.sd:.1f}{NBSP}%"


def count(value: float) -> str:
    """Returns a whole number in groups of three.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{round(value):,}"


def plural(n: int, word: str) -> str:
    """Returns the number with its noun.

    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {word if n == 1 else word + 's'}"


def seeds_of(cells_seeds: list[int]) -> str:
    """Returns the range of seed counts behind a figure, `1 seed`, `3 seeds` or `2 to 3 seeds`."""
    low, high = min(cells_seeds), max(cells_seeds)
    return plural(high, "seed") if low == high else f"{low} to {high} seeds"
