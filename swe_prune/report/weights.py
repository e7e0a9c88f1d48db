"""Figures of weights: sparsity per tensor, trajectories of kept and pruned ones, histograms."""

import re

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.lines import Line2D

from swe_prune.report import formats, stats
from swe_prune.report.findings import MODERATE, Findings
from swe_prune.report.look import INK, KEPT, PRUNED, QUIET, Picture, panel
from swe_prune.report.read import CellKey, Detail, Histogram, Results, Trajectory
from swe_prune.report.stats import Cell
from swe_prune.report.words import rule_phrase

LINES = 14  # sampled weights drawn of each kind: more become a hatch, fewer an anecdote


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key under which block 10 follows block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def short(name: str) -> str:
    """Returns a tensor's name without the `/kernel` that all of them share."""
    return name.removeprefix("params/").removesuffix("/kernel")


def moderate_cells(found: Findings, rule: str) -> list[Cell]:
    """Returns the cell nearest 60 % of every criterion under a rule."""
    own = [cell for cell in found.cells if cell.rule == rule]
    chosen = []
    for name in stats.order(cell.criterion for cell in own):
        cell = stats.nearest((c for c in own if c.criterion == name), MODERATE)
        chosen += [cell] if cell else []
    return chosen


def details_of(results: Results, cell: Cell) -> list[tuple[CellKey, Detail]]:
    """Returns the details of a cell's seeds that are there."""
    keys = [(seed, cell.rule, cell.criterion, cell.requested) for seed in cell.seeds]
    return [(key, results.details[key]) for key in keys if key in results.details]


def per_tensor(results: Results, cell: Cell) -> dict[str, float]:
    """Returns the share pruned of each tensor, counts pooled over seeds."""
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for _, detail in details_of(results, cell):
        for name, (k, n) in detail.tensors.items():
            kept[name], total[name] = kept.get(name, 0) + k, total.get(name, 0) + n
    return {name: 1 - kept[name] / total[name] for name in total if total[name]}


def heat_map(results: Results, found: Findings, rule: str) -> Picture | None:
    """Returns tensors × criteria, each field the share pruned at the level nearest 60 %."""
    columns = [(cell, per_tensor(results, cell)) for cell in moderate_cells(found, rule)]
    columns = [(cell, shares) for cell, shares in columns if shares]
    if not columns:
        return None
    names = sorted({name for _, shares in columns for name in shares}, key=natural)
    share = np.array([[shares.get(name, np.nan) for _, shares in columns] for name in names])
    figure, axes = panel(2.6 + 0.75 * len(columns), 1.1 + 0.24 * len(names))
    axes.grid(False)
    # Light to dark in one hue reads the same in grey; the range is fixed, so maps can be compared.
    colours = colormaps["Blues"].with_extremes(bad="white")
    axes.imshow(100 * share, cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(share):
        if np.isfinite(value):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 else INK)  # fmt: skip
    heads = [f"{cell.criterion.replace('_', chr(10))}\n{100 * cell.sparsity.mean:.0f} %"
             for cell, _ in columns]  # fmt: skip
    axes.set_xticks(range(len(columns)), heads)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    phrase = rule_phrase(rule)
    axes.set_title(phrase[0].upper() + phrase[1:], pad=10)
    spans = [
        f"{cell.criterion} prunes {100 * min(s.values()):.0f} to {100 * max(s.values()):.0f} %"
        for cell, s in columns
    ]
    return Picture(f"tensors_{rule}", f"Share pruned of each tensor, {phrase}: {'; '.join(spans)}.", figure)  # fmt: skip


def example(results: Results, found: Findings) -> tuple[CellKey, Detail] | None:
    """Returns the first seed's cell nearest 60 % of the criterion the claims are about."""
    cells = [c for c in found.cells
             if (c.rule, c.criterion) == (found.main.rule, found.main.criterion)]  # fmt: skip
    for cell in sorted(cells, key=lambda c: abs(c.sparsity.mean - MODERATE)):
        there = details_of(results, cell)
        if there:
            return there[0]
    return None


def trajectories(results: Results, key: CellKey, detail: Detail) -> list[Picture]:
    """Returns the paths of sampled kept and pruned weights in up to three tensors."""
    history = results.trajectories.get(key[0])
    if history is None or len(history.steps) < 2:
        return []
    usable = [
        name
        for name in sorted(history.values, key=natural)
        if len(detail.sample_kept.get(name, ())) == len(history.values[name][0])
        and len(set(detail.sample_kept[name])) == 2
    ]
    # First, middle and last: chosen by place in the network, not by how well they look.
    chosen = (
        dict.fromkeys(usable[round(i * (len(usable) - 1) / 2)] for i in range(3)) if usable else {}
    )
    return [_paths(history, name, detail.sample_kept[name]) for name in chosen]


def _paths(history: Trajectory, name: str, kept: list[bool]) -> Picture:
    values = np.array(history.values[name])
    mask = np.array(kept)
    figure, axes = panel(4.6, 3.3)
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
    return Picture(f"trajectories_{re.sub(r'[^A-Za-z0-9]+', '_', short(name))}", alt, figure)


def histograms(results: Results, found: Findings) -> list[Picture]:
    """Returns weights before and after, one panel per criterion, at the level nearest 60 %."""
    pictures = []
    for cell in moderate_cells(found, found.main.rule):
        there = [(key, d) for key, d in details_of(results, cell) if d.histogram]
        if there and there[0][1].histogram:
            pictures.append(_histogram(there[0][1].histogram, cell, there[0][1].total))
    return pictures[:4]


def _histogram(counts: Histogram, cell: Cell, total: int) -> Picture:
    edges = np.array(counts.edges)
    figure, axes = panel(4.6, 3.3)
    axes.stairs(counts.dense, edges, fill=True, color="#d5dbe2", label="dense")
    axes.stairs(counts.pruned, edges, color=PRUNED, linewidth=1.5, label="pruned, not yet tuned")
    if counts.finetuned:
        axes.stairs(counts.finetuned, edges, color=KEPT, linewidth=1.4, linestyle=(0, (3, 1.2)),
                    label="pruned and fine-tuned")  # fmt: skip
    axes.set_xlim(*_middle(edges, np.array(counts.dense)))
    axes.set_ylim(0, 1.28 * max(max(counts.dense), *counts.pruned, *counts.finetuned, 1))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: formats.count(v)))
    axes.set_xlabel("weight (no unit)")
    axes.set_ylabel("weights per bin")
    axes.set_title(f"{cell.criterion}, {formats.percent(cell.sparsity.mean)} pruned")
    axes.legend(loc="upper left")
    zeros = total - sum(counts.pruned)
    alt = (
        f"Histogram of the prunable weights before and after pruning with {cell.criterion}"
        + (
            f": {formats.count(zeros)} of {formats.count(total)} are now exactly zero."
            if total
            else "."
        )  # fmt: skip
    )
    return Picture(f"histogram_{cell.criterion}", alt, figure)


def _middle(edges: np.ndarray, counts: np.ndarray, share: float = 0.995) -> tuple[float, float]:
    """Returns the symmetric range that holds `share` of the counts: the tails squeeze the rest."""
    centres = (edges[1:] + edges[:-1]) / 2
    ranks = np.argsort(np.abs(centres))
    cumulated = np.cumsum(counts[ranks]) / max(counts.sum(), 1)
    reach = float(
        np.abs(centres[ranks][np.searchsorted(cumulated, share).clip(max=len(ranks) - 1)])
    )
    width = float(edges[1] - edges[0])
    return -reach - width, reach + width
