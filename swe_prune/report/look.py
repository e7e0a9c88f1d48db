"""The look of the figures: colours, markers and line styles that survive grey printing."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2933"
QUIET = "#6b7480"
GRID = "#e4e7eb"

# Okabe and Ito's colours without the yellow, which is too light on white. Each name also has a
# marker and a dash, so colour-blind readers and readers of grey prints can tell the curves apart.
_KNOWN = {
    "swe": ("#0072B2", "o", "-"),
    "magnitude": ("#D55E00", "s", "--"),
    "random": ("#6b6b6b", "x", ":"),
    "swe_spread": ("#009E73", "^", "-."),
    "votes": ("#CC79A7", "D", (0, (5, 1, 1, 1, 1, 1))),
    "mean_abs": ("#B87700", "v", (0, (8, 3))),
    "forecast_curvature": ("#882255", ">", (0, (6, 2, 2, 2))),
}
_SPARE = (
    ("#56B4E9", "P", (0, (3, 1))),
    ("#332288", "<", (0, (1, 1))),
    ("#44AA99", "h", (0, (4, 4))),
    ("#999933", "p", (0, (2, 3))),
    ("#AA4499", "X", (0, (7, 1, 1, 1))),
    ("#117733", "d", (0, (2, 1))),
    ("#661100", "*", (0, (5, 2, 1, 2))),
)
_INSIDE = 6  # a legend of more names goes below the axes, where it covers no curve
_WIDE, _LINE = 22, 50  # characters of the names in two columns, and of a line

PRUNED = "#D55E00"
KEPT = "#0072B2"

_RC: Any = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so a figure is the same everywhere
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,  # a legend may lie on a grid line or on the line of the control
    "legend.borderaxespad": 0.3,
    "legend.fontsize": 8.5,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "swe_prune",  # the same numbers give the same bytes
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with its alternative text."""

    name: str
    alt: str
    figure: Figure


@contextmanager
def look() -> Iterator[None]:
    """Sets matplotlib's style inside the block and restores it afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def line_style(criterion: str, all_criteria: Sequence[str]) -> dict[str, Any]:
    """Returns colour, marker and dash of a criterion, the same in every figure of a page."""
    if criterion in _KNOWN:
        colour, marker, dash = _KNOWN[criterion]
    else:
        others = [name for name in all_criteria if name not in _KNOWN]
        colour, marker, dash = _SPARE[others.index(criterion) % len(_SPARE)]
    return {"color": colour, "marker": marker, "linestyle": dash}


def panel(width: float = 4.1, height: float = 3.4) -> tuple[Figure, Axes]:
    """Returns an empty figure with one pair of axes, about 10 cm wide: readable on a phone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes) -> None:
    """Adds a legend inside the axes, or below them for many or long names; none without curves."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    longest = max(map(len, names), default=0)
    if (len(names) > _INSIDE or longest > _WIDE) and isinstance(figure, Figure):
        columns = 1 if longest > _WIDE else 2
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.17 * -(-len(names) // columns))
        shown = [abbreviated(name, _LINE) for name in names]
        place: Any = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.0}
        figure.legend(handles, shown, **place)
    elif names:
        axes.legend(loc="best")


def abbreviated(name: str, most: int) -> str:
    """Returns a name of at most so many characters.

    >>> abbreviated("forecast_curvature", 9)
    'forecast…'
    """
    return name if len(name) <= most else f"{name[: most - 1]}…"


def slug(name: str) -> str:
    """Returns a file name made of the name of a criterion or a tensor.

    >>> slug("block_0/attention/qkv")
    'block_0_attention_qkv'
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def sparsity_axis(axes: Axes) -> None:
    """Labels the x axis as achieved sparsity in per cent."""
    axes.set_xlabel("achieved sparsity of the prunable weights (%)")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=7, integer=True))
