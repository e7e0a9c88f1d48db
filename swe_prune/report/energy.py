"""Cumulated energy of cut models against the tokens served, and the table of break-evens."""

import math

import numpy as np
from matplotlib.axes import Axes

from swe_prune import ledger
from swe_prune.ledger import BreakEven, Interval
from swe_prune.ledger.interval import ENDS, ZERO
from swe_prune.report.look import INK, KEPT, PRUNED, QUIET, Picture, legend, panel
from swe_prune.report.records import Results
from swe_prune.report.tables import Table
from swe_prune.study.payback import Payback

POINTS = 60
WITHOUT = 1e7
"""Tokens shown where nothing is saved."""


def pictures(results: Results) -> list[Picture]:
    """Returns one figure for each cut: what both models take, its cost included, with bands."""
    return [_picture(one) for one in results.paybacks]


def _picture(one: Payback) -> Picture:
    figure, axes = panel(5.2)
    reach = _reach(one.dense)
    x = np.linspace(0.0, reach, POINTS)
    unit, scale = _unit(one.dense, reach)
    _band(axes, x, ZERO, one.dense.dense, scale, "dense", INK)
    _band(axes, x, one.dense.spent, one.dense.pruned, scale, "cut, its making included", PRUNED)
    if one.smaller is not None:
        name = f"{one.rival}, from random weights"
        _band(axes, x, ZERO, one.smaller.dense, scale, name, KEPT)
    met = one.dense.tokens
    if met is not None:
        axes.axvspan(met.low, met.high, color=QUIET, alpha=0.15, linewidth=0)
        axes.axvline(met.value, color=QUIET, linewidth=1, linestyle=":")
    axes.set_xlabel("tokens served")
    axes.set_ylabel(f"cumulated energy ({unit})")
    axes.set_title("Paid for itself" if met is not None and one.dense.equal else "Not shown to pay")
    legend(axes)
    alt = f"Cumulated energy against tokens served: {one.sentences[0]}"
    return Picture(f"energy_{one.name}_seed_{one.seed}", alt, figure)


def _reach(found: BreakEven) -> float:
    """Returns the tokens that the axis reaches: twice those of the break-even, if there is one."""
    if found.tokens is not None:
        return 2 * found.tokens.value
    per = max(abs(found.saved.low), abs(found.saved.high))
    return 2 * found.spent.value / per if per and found.spent.value else WITHOUT


def _unit(found: BreakEven, reach: float) -> tuple[str, float]:
    top = found.spent.value + max(found.dense.value, found.pruned.value) * reach
    power = min(3, max(0, int(math.log10(max(top, 1.0)) // 3)))
    return ("J", "kJ", "MJ", "GJ")[power], 1e-3**power


def _band(
    axes: Axes,
    x: np.ndarray,
    start: Interval,
    slope: Interval,
    scale: float,
    name: str,
    color: str,
) -> None:
    low, value, high = (scale * (getattr(start, end) + getattr(slope, end) * x) for end in ENDS)
    axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
    axes.plot(x, value, color=color, label=name, linewidth=1.6)


def table(results: Results) -> list[Table]:
    """Returns what each cut cost and saves, no table without one."""
    if not results.paybacks:
        return []
    rows = []
    for one in results.paybacks:
        for rival, found in (("dense", one.dense), (one.rival or "smaller, dense", one.smaller)):
            if found is None:
                rows.append((one.name, str(one.seed), rival, *["none of its loss"], *[""] * 4))
                continue
            assert found.worse is not None
            rows.append(
                (
                    one.name,
                    str(one.seed),
                    rival,
                    ledger.text(found.worse),
                    ledger.text(found.spent, "J"),
                    ledger.text(found.dense, "J"),
                    ledger.text(found.pruned, "J"),
                    "not shown" if found.tokens is None else ledger.text(found.tokens),
                )
            )
    head = [
        "Cut", "Seed", "Against", "Loss minus its", "Making took", "Its J a token",
        "Cut's J a token", "Tokens to break even",
    ]  # fmt: skip
    caption = (
        "After how many served tokens a cut has paid for itself. A meter's own error is common to "
        "all its numbers, so savings are taken pair by pair, end by end."
    )
    return [Table(caption, head, rows)]
