"""The paper's claims about prices read off pictures (arXiv 2502.17071), answered from the numbers.

It reports that moderate pruning lowers the error, and that more pruning destroys the model. The
error is the mean absolute one of the prices that a model generates, after the recovery, beside that
of the dense model trained for as many more steps. Differences are paired by seed; one that is no
larger than its standard deviation over the seeds, or has one seed, settles nothing.
"""

from collections.abc import Sequence

from swe_prune.report.comparison import PAPER
from swe_prune.report.formats import mean_sd, number, percent, plural
from swe_prune.report.stats import MODERATE, Cell, Spread, difference, spread

MOST = MODERATE + 0.05
"""Largest achieved sparsity that counts as moderate."""


def of_prices(cells: Sequence[Cell], blank: float | None) -> list[str]:
    """Returns a sentence for each of the two claims; none where no price was read.

    Args:
        cells: Cells of the study.
        blank: Error of the dense models that are shown blank pictures, the mean over the seeds.
    """
    own = [cell for cell in cells if cell.criterion == PAPER and change(cell) is not None]
    parts = (
        [cell for cell in own if cell.sparsity.mean <= MOST],
        [cell for cell in own if cell.sparsity.mean > MOST],
    )
    sentences = []
    if parts[0]:
        cell = max(parts[0], key=lambda one: one.sparsity.mean)
        answers = "yes", "no, it costs"
        sentences.append(
            f"Does moderate pruning lower the error of prices? {_told(cell, answers)}."
        )
    if parts[1]:
        cell = max(parts[1], key=lambda one: one.sparsity.mean)
        error, answers = cell.of("finetuned_mae"), ("no, it lowers the error", "it costs")
        if error is not None and blank is not None and error.mean >= blank:
            answers = answers[0], "yes, the pictures might as well be blank"
        told = _told(cell, answers)
        if blank is not None:
            told += f"; with blank pictures the dense model's error is {number(blank, 2)}"
        sentences.append(f"Does more pruning destroy the model? {told}.")
    return sentences


def change(cell: Cell) -> Spread | None:
    """Returns the error after the recovery minus the control's, over the seeds."""
    return spread(difference(row.finetuned_mae, row.control_mae) for row in cell.rows)


def _told(cell: Cell, answers: tuple[str, str]) -> str:
    moved = change(cell)
    assert moved is not None  # `of_prices` asks for no other
    answer = "not settled"
    if moved.sd is not None and abs(moved.mean) > moved.sd:
        answer = answers[0] if moved.mean < 0 else answers[1]
    if moved.diverged:
        answer = answers[1]
    text = (
        f"{answer[0].upper()}{answer[1:]}: without {percent(cell.sparsity.mean)} of the weights by "
        f"{cell.name} it is {mean_sd(cell.of('finetuned_mae'), 2)} after the recovery, "
        f"{mean_sd(moved, 2, sign=True)} against the control ({plural(moved.n, 'seed')})"
    )
    return f"{text}, and one seed cannot tell" if moved.n == 1 else text
