"""The tables of `docs/pretrained.md` from the working directory of a study of a pretrained model.

    python docs/generate_pretrained.py runs/smollm2

Perplexities, distance from the dense model and repetition by criterion and level, what the models
wrote, and how far the masks of two criteria differ, which says whether one knows what the other
does not.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from swe_prune import study, trajectory, tree
from swe_prune.report import language, read
from swe_prune.report.formats import number, percent
from swe_prune.report.records import Results, Row
from swe_prune.runtime import storage
from swe_prune.study import saved
from swe_prune.study.workdir import config_of


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--pair", default="swe,magnitude", help="criteria whose masks to compare")
    options = parser.parse_args()
    results = read.load(options.workdir)
    references = language.references(results)
    shown = ", ".join(f"{name} {math.exp(loss):.2f}" for name, loss in references.items())
    print(f"Perplexity: {shown}.\n")
    for title, field, form in (
        ("Perplexity straight after pruning", "pruned_loss", _perplexity),
        ("Perplexity after the recovery", "finetuned_loss", _perplexity),
        ("KL to the dense model straight after pruning, nats per token", "pruned_kl", _number),
        ("KL to the dense model after the recovery", "finetuned_kl", _number),
        ("Repeated 3-grams in the samples, straight after pruning", "pruned_repetition", _percent),
        ("Repeated 3-grams in the samples, after the recovery", "finetuned_repetition", _percent),
    ):
        print(f"{title}\n\n{matrix(results, field, form)}\n")
    print(samples(results))
    place = storage.parse_path(options.workdir)
    experiment = study.setup(config_of(place), place)
    print(f"\n{differing(experiment, *options.pair.split(','))}\n\n{moved(experiment)}")


def matrix(results: Results, field: str, form: Any) -> str:
    """Returns one number of every cell, criteria down and levels across; the lowest is bold."""
    rows = {(row.criterion.removesuffix(" 2:4"), level(row)): row for row in results.study}
    names = list(dict.fromkeys(name for name, _ in rows))
    levels = sorted({at for _, at in rows}, key=lambda at: (":" in at, at))
    lines = [["", *levels], ["---", *["---:"] * len(levels)]]
    lowest = {
        at: min(
            (v for n in names if (v := _value(rows.get((n, at)), field)) is not None), default=None
        )
        for at in levels
    }
    for name in names:
        cells = []
        for at in levels:
            value = _value(rows.get((name, at)), field)
            text = "" if value is None else form(value)
            cells.append(f"**{text}**" if value is not None and value == lowest[at] else text)
        lines.append([f"`{name}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def level(row: Row) -> str:
    """Returns the sparsity that was asked for, or the pattern."""
    return "2:4" if row.criterion.endswith(" 2:4") else percent(row.sparsity).replace("\xa0", " ")


def samples(results: Results) -> str:
    """Returns what the models wrote, as the report's table has it."""
    table = language.samples(results)
    rule = ["---"] * len(table.head)
    lines = [table.head, rule, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differing(experiment: study.Experiment, one: str, other: str) -> str:
    """Returns how many of the removed weights two criteria do not share, at each sparsity."""
    by_name: dict[tuple[str, float, str], Any] = {
        (cell.recipe.name, cell.recipe.target, cell.recipe.pattern or ""): cell
        for cell in experiment.cells
    }
    lines = []
    for (name, sparsity, pattern), cell in by_name.items():
        twin = by_name.get((other, sparsity, pattern))
        if name != one or twin is None:
            continue
        masks = [saved.load_masks(experiment, which) for which in (cell, twin)]
        apart = removed = 0
        for (_, a), (_, b) in zip(*map(tree.named_leaves, masks), strict=True):
            if a is not None:
                a, b = np.asarray(a), np.asarray(b)
                apart, removed = apart + int((~a & b).sum()), removed + int((~a).sum())
        lines.append(f"{pattern or percent(sparsity)}: {apart / removed:.2%}")
    return f"Of the weights that `{one}` removes, `{other}` keeps: " + ", ".join(lines) + "."


def moved(experiment: study.Experiment) -> str:
    """Returns how far the weights are from their late mean, of which swe knows nothing else."""
    state = saved.load_dense(experiment, experiment.cells[0].seed)
    if state.stats is None or "late_mean" not in state.stats.measures:
        return "No late mean was tracked."
    late = trajectory.read(state.stats, "late_mean")
    apart = size = 0.0
    for (_, weight), (_, mean) in zip(
        tree.named_leaves(state.params), tree.named_leaves(late), strict=True
    ):
        if mean is not None:
            weight, mean = np.asarray(weight, np.float64), np.asarray(mean, np.float64)
            apart, size = apart + ((weight - mean) ** 2).sum(), size + (weight**2).sum()
    return f"The weights are {math.sqrt(apart / size):.3%} of their norm away from their late mean."


def _value(row: Row | None, field: str) -> float | None:
    return None if row is None else getattr(row, field)


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if value >= 1000 else number(value, 1)


def _number(value: float) -> str:
    return number(value, 3)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


if __name__ == "__main__":
    main()
