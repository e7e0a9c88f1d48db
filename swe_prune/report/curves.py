"""Figures of losses: the training curve, and loss against achieved sparsity, three views each."""

import math
from collections.abc import Callable, Sequence

from matplotlib import ticker
from matplotlib.axes import Axes

from swe_prune.report import formats, stats
from swe_prune.report.look import (
    GRID,
    INK,
    QUIET,
    Picture,
    legend,
    line_style,
    panel,
    slug,
    sparsity_axis,
)
from swe_prune.report.records import CellGroup, Results
from swe_prune.report.stats import Cell, Spread
from swe_prune.study.results import Row

LINEAR = 0.01
"""Nats per token around the control within which the axis of the cost is linear."""

Reader = Callable[[Cell], Spread | None]


def comparison(cells: Sequence[Cell], group: CellGroup, names: Sequence[str]) -> list[Picture]:
    """Returns the panels of one comparison: before, after, and after minus control.

    Args:
        cells: Cells of all comparisons.
        group: Comparison to draw.
        names: Names of all curves of the page, so that each has the same style in all figures.
    """
    own = [cell for cell in cells if cell.group == group]
    pictures = [_losses(own, group, names, "pruned")]
    if any(cell.of("finetuned_loss") for cell in own):
        pictures.append(_losses(own, group, names, "finetuned"))
    if any(cell.changes(recovered=True) for cell in own):
        pictures.append(_against_control(own, group, names))
    return pictures


def _curves(axes: Axes, cells: Sequence[Cell], names: Sequence[str], read: Reader) -> int:
    """Draws one curve per name; returns how many points diverged and cannot be drawn."""
    lost = 0
    for name in names:
        found = [(cell.sparsity, read(cell)) for cell in cells if cell.name == name]
        points = [(x, y) for x, y in found if y is not None]
        drawn = [(x, y) for x, y in points if math.isfinite(y.mean)]
        lost += len(points) - len(drawn)
        if not drawn:
            continue
        axes.errorbar(
            [100 * x.mean for x, _ in drawn],
            [y.mean for _, y in drawn],
            xerr=_bars([100 * (x.sd or 0) for x, _ in drawn]),
            yerr=_bars([y.sd or 0 for _, y in drawn]),
            label=name,
            capsize=2.5,
            elinewidth=1,
            linewidth=1.9 if name == "swe" else 1.4,
            zorder=4 if name == "swe" else 3,
            **line_style(name, names),
        )
    return lost


def _bars(sizes: list[float]) -> list[float] | None:
    # An error bar of length 0 is drawn as a cap through the marker, which looks like a measurement.
    return sizes if any(size > 1e-9 for size in sizes) else None


def _references(axes: Axes, rows: Sequence[Row]) -> None:
    for field, label, dash in (
        ("dense_loss", "dense", (0, (1, 1.2))),
        ("control_loss", "control", "-"),
    ):
        level = stats.spread(stats.per_seed(rows, field).values())
        if level is None or not math.isfinite(level.mean):
            continue
        axes.axhline(level.mean, color=INK, linewidth=1.1, linestyle=dash, label=label, zorder=2)
        if level.sd:
            axes.axhspan(level.low, level.high, color=INK, alpha=0.08, linewidth=0, zorder=1)


def _losses(cells: list[Cell], group: CellGroup, names: Sequence[str], stage: str) -> Picture:
    def read(cell: Cell) -> Spread | None:
        return cell.of(f"{stage}_loss")

    figure, axes = panel()
    lost = _curves(axes, cells, names, read)
    _references(axes, [row for cell in cells for row in cell.rows])
    axes.set_ylabel("validation loss (nats/token)")
    if stage == "pruned":  # the loss explodes there
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_ylabel("validation loss (nats/token, log axis)")
    when = {"pruned": "straight after pruning", "finetuned": "after fine-tuning"}[stage]
    axes.set_title(when[0].upper() + when[1:])
    _finish(axes, lost)
    alt = _alt(cells, group, f"Validation loss {when}", read)
    return Picture(slug(f"loss_{group.rule}_{group.part}_{stage}"), alt, figure)


def _against_control(cells: list[Cell], group: CellGroup, names: Sequence[str]) -> Picture:
    def read(cell: Cell) -> Spread | None:
        return cell.change(recovered=True)

    figure, axes = panel()
    axes.axhspan(-LINEAR, LINEAR, color=INK, alpha=0.08, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1.1)
    lost = _curves(axes, cells, names, read)
    # Linear near the control, logarithmic outside: a cost of 0.02 and one of 2 are both readable.
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    decades = [sign * LINEAR * 10**k for sign in (-1, 1) for k in range(4)]
    axes.yaxis.set_major_locator(ticker.FixedLocator(sorted([0, *decades])))
    axes.yaxis.set_major_formatter(lambda value, _: formats.signed(value, 2).removesuffix(".00"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -2 * LINEAR), max(high, 4 * LINEAR))
    axes.set_ylabel("fine-tuned minus control (nats/token)")
    axes.set_title("What the mask costs")
    _finish(axes, lost)
    alt = _alt(cells, group, "Fine-tuned loss minus control loss", read)
    return Picture(slug(f"loss_{group.rule}_{group.part}_against_control"), alt, figure)


def _finish(axes: Axes, lost: int) -> None:
    sparsity_axis(axes)
    legend(axes)
    if lost:
        text = f"{formats.plural(lost, 'point')} diverged and not drawn"
        axes.annotate(
            text, (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color=QUIET
        )


def _alt(cells: list[Cell], group: CellGroup, what: str, read: Reader) -> str:
    parts = []
    for name in stats.order(cells):
        own = [(cell.sparsity.mean, read(cell)) for cell in cells if cell.name == name]
        ends = [(x, y.mean) for x, y in own if y is not None]
        if ends:
            (x0, y0), (x1, y1) = ends[0], ends[-1]
            parts.append(
                f"{name} from {formats.number(y0, 3)} at {formats.percent(x0)} "
                f"to {formats.number(y1, 3)} at {formats.percent(x1)}"
            )
    return f"{what} against achieved sparsity, {group.phrase}: {'; '.join(parts)}."


def training(results: Results) -> Picture | None:
    """Returns the training curve: the loss of the batches, thin, and the validation loss, dots."""
    if not results.training:
        return None
    figure, axes = panel()
    ends = []
    for index, (seed, lines) in enumerate(results.training.items()):
        train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        valid = [(line["step"], line["validation_loss"]) for line in lines
                 if "validation_loss" in line]  # fmt: skip
        first = index == 0
        if train:
            axes.plot(*zip(*train, strict=True), color="#9fb3c8", linewidth=0.8, alpha=0.9,
                      label="batch, training text" if first else None)  # fmt: skip
        if valid:
            axes.plot(*zip(*valid, strict=True), color="#0072B2", linewidth=1.6, marker="o",
                      markersize=3, label="validation text" if first else None)  # fmt: skip
            ends.append(f"seed {seed} ends at {formats.number(valid[-1][1], 3)}")
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats/token)")
    axes.set_title("Training the dense model")
    legend(axes)
    alt = "Loss of the dense model against the training step"
    return Picture("training", f"{alt}: validation loss of {', '.join(ends)}." if ends else
                   f"{alt}.", figure)  # fmt: skip
