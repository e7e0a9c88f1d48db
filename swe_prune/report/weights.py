"""Figures of weights: sparsity per tensor, trajectories of kept and pruned ones, histograms."""

import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.lines import Line2D

from swe_prune.report import formats, stats
from swe_prune.report.look import INK, KEPT, PRUNED, QUIET, Picture, abbreviated, panel, slug
from swe_prune.report.records import (
    CellGroup,
    Detail,
    Histogram,
    Results,
    Trajectory,
    key_of,
)
from swe_prune.report.stats import Cell
from swe_prune.study.results import Row

Column = tuple[Cell, dict[str, float]]
"""A cell with the sparsity of each tensor."""

LINES = 14  # sampled weights drawn of each kind: more could not be told apart


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key under which block 10 follows block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def short(name: str) -> str:
    """Returns a tensor's name without the `/kernel` that all of them end in."""
    return name.removeprefix("params/").removesuffix("/kernel")


def details_of(results: Results, cell: Cell) -> list[tuple[Row, Detail]]:
    """Returns the details of a cell's seeds that are there."""
    found = [(row, results.details.get(key_of(row))) for row in cell.rows]
    return [(row, detail) for row, detail in found if detail is not None]


def per_tensor(results: Results, cell: Cell) -> dict[str, float]:
    """Returns the sparsity of each tensor, counts pooled over seeds."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for _, detail in details_of(results, cell):
        for name, (k, n) in detail.tensors.items():
            kept[name], total[name] = kept.get(name, 0) + k, total.get(name, 0) + n
    return {name: 1 - kept[name] / total[name] for name in total if total[name]}


def heat_maps(
    results: Results, cells: Sequence[Cell], groups: Sequence[CellGroup]
) -> list[Picture]:
    """Returns tensors × criteria for each comparison, each field the sparsity near 60 %."""
    maps: dict[CellGroup, list[Column]] = {}
    for group in groups:
        chosen = stats.moderate(cell for cell in cells if cell.group == group)
        columns = [(cell, per_tensor(results, cell)) for cell in chosen]
        maps[group] = [(cell, values) for cell, values in columns if values]
    every = [v for columns in maps.values() for _, values in columns for v in values.values()]
    if not every:
        return []
    # One range for all maps, so they can be compared; as narrow as the numbers, so they differ.
    limits = (math.floor(10 * min(every)) / 10, math.ceil(10 * max(every)) / 10)
    return [_heat_map(columns, group, limits) for group, columns in maps.items() if columns]


def _heat_map(columns: list[Column], group: CellGroup, limits: tuple[float, float]) -> Picture:
    names = sorted({name for _, values in columns for name in values}, key=natural)
    table = np.array([[values.get(name, np.nan) for _, values in columns] for name in names])
    wide = max(len(cell.name) for cell, _ in columns) > 11  # wider than a column
    gap = ", " if wide else "\n"
    heads = [
        f"{abbreviated(cell.name, 40)}{gap}{100 * cell.sparsity.mean:.0f} %" for cell, _ in columns
    ]
    # Slanted heads reach beyond the last column, and above the map.
    beyond = 0.06 * max(0, max(map(len, heads)) - 20) if wide else 0.0
    width, height = 1.9 + 0.9 * len(columns), 0.9 + 0.235 * len(names)
    figure, axes = panel(width + beyond, height + 0.6 * beyond)
    axes.grid(False)
    low, high = limits if limits[1] > limits[0] else (limits[0] - 0.1, limits[0] + 0.1)
    # Light to dark in one hue reads the same in grey.
    colours = colormaps["Blues"].with_extremes(bad="white")
    axes.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if value > low + 0.62 * (high - low) else INK
            text = f"{100 * value:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    slanted = {"rotation": 30, "ha": "left", "rotation_mode": "anchor"} if wide else {}
    axes.set_xticks(range(len(columns)), heads, **slanted)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(group.title, pad=10)
    spans = [
        f"{cell.name} prunes {100 * min(s.values()):.0f} to {100 * max(s.values()):.0f} %"
        for cell, s in columns
    ]
    alt = f"Sparsity of each tensor, {group.phrase}: {'; '.join(spans)}."
    return Picture(slug(f"tensors_{group.rule}_{group.part}"), alt, figure)


def example(results: Results, cells: Sequence[Cell]) -> tuple[Cell, Row, Detail] | None:
    """Returns the cell nearest to 60 % sparsity that has details, with its first seed's."""
    for cell in sorted(cells, key=lambda cell: abs(cell.sparsity.mean - stats.MODERATE)):
        there = details_of(results, cell)
        if there:
            return (cell, *there[0])
    return None


def trajectories(results: Results, seed: int, detail: Detail) -> list[Picture]:
    """Returns the paths of sampled kept and pruned weights in up to three tensors."""
    history = results.trajectories.get(seed)
    if history is None or len(history.steps) < 2:
        return []
    usable = [
        name
        for name in sorted(history.values, key=natural)
        if len(detail.sample_kept.get(name, ())) == len(history.values[name][0])
        and len(set(detail.sample_kept[name])) == 2
    ]
    # First, middle and last: chosen by their order, not by how they look.
    chosen = dict.fromkeys(round(i * (len(usable) - 1) / 2) for i in range(3)) if usable else {}
    return [_paths(history, usable[i], detail.sample_kept[usable[i]]) for i in chosen]


def _paths(history: Trajectory, name: str, kept: list[bool]) -> Picture:
    values = np.array(history.values[name])
    mask = np.array(kept)
    figure, axes = panel(4.1, 3.0)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    sizes = []
    for wanted, colour, dash, width in ((True, KEPT, "-", 1.2), (False, PRUNED, (0, (3, 1)), 1.0)):
        chosen = np.flatnonzero(mask == wanted)[:LINES]
        sizes.append(len(chosen))
        axes.plot(history.steps, values[:, chosen], color=colour, linestyle=dash, linewidth=width,
                  alpha=0.85)  # fmt: skip
    axes.legend(
        [Line2D([], [], color=KEPT, linewidth=1.6), Line2D([], [], color=PRUNED, linestyle="--")],
        [f"kept ({sizes[0]} shown)", f"pruned ({sizes[1]} shown)"],
        loc="upper left",
        ncols=2,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.14 * (high - low))  # room for the legend above the lines
    axes.set_xlabel("training step")
    axes.set_ylabel("weight (no unit)")
    axes.set_title(short(name))
    ends = [np.abs(values[-1, mask == wanted]).mean() for wanted in (True, False)]
    alt = (
        f"Paths of sampled weights of {name} over training: at the end kept weights are "
        f"{ends[0]:.3f} from zero on average, pruned ones {ends[1]:.3f}."
    )
    return Picture(f"trajectories_{slug(short(name))}", alt, figure)


def histograms(results: Results, cells: Sequence[Cell]) -> list[Picture]:
    """Returns weights before and after, one panel per criterion, at the level nearest 60 %."""
    pictures = []
    for cell in stats.moderate(cells):
        there = [(d, d.histogram) for _, d in details_of(results, cell) if d.histogram]
        pictures += [_histogram(counts, cell, detail) for detail, counts in there[:1]]
    return pictures


def _histogram(counts: Histogram, cell: Cell, detail: Detail) -> Picture:
    edges = np.array(counts.edges)
    figure, axes = panel(4.1, 3.0)
    axes.stairs(counts.dense, edges, fill=True, color="#d5dbe2", label="dense")
    axes.stairs(counts.pruned, edges, color=PRUNED, linewidth=1.5, label="pruned, not yet tuned")
    if counts.finetuned:
        axes.stairs(counts.finetuned, edges, color=KEPT, linewidth=1.4, linestyle=(0, (3, 1.2)),
                    label="pruned and fine-tuned")  # fmt: skip
    axes.set_xlim(*_middle(edges, np.array(counts.dense)))
    axes.set_ylim(0, 1.5 * max(max(counts.dense), *counts.pruned, *counts.finetuned, 1))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: formats.count(v)))
    axes.set_xlabel("weight (no unit)")
    axes.set_ylabel("weights per bin")
    axes.set_title(f"{cell.name}, {formats.percent(cell.sparsity.mean)} pruned")
    axes.legend(loc="upper left")
    alt = f"Histogram of the prunable weights before and after pruning with {cell.name}"
    if detail.tensors:
        zeros = sum(total - kept for kept, total in detail.tensors.values())
        alt += f": {formats.count(zeros)} of {formats.count(detail.total)} are now exactly zero"
    return Picture(f"histogram_{slug(cell.name)}", f"{alt}.", figure)


def _middle(edges: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Returns the symmetric range that holds 99.5 % of the counts, without the long tails."""
    centres = (edges[1:] + edges[:-1]) / 2
    ranks = np.argsort(np.abs(centres))
    cumulated = np.cumsum(counts[ranks]) / max(counts.sum(), 1)
    reach = float(
        np.abs(centres[ranks][np.searchsorted(cumulated, 0.995).clip(max=len(ranks) - 1)])
    )
    width = float(edges[1] - edges[0])
    return -reach - width, reach + width
