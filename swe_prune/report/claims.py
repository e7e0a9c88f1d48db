"""The paper's claims about prices read off pictures (arXiv 2502.17071), answered from the numbers.

It reports that moderate pruning lowers the error, and that more pruning destroys the model. The
error is the mean absolute one of the prices that a model generates, after the recovery, beside that
of the dense model trained for as many more steps. Differences are paired by seed; one that is no
larger than its standard deviation over the seeds, or has one seed, settles nothing.
"""

from collections.abc import Sequence

from swe_prune.report.comparison import PAPER
from swe_prune.report.formats import mean_sd, number, percent, plural
from swe_prune.report.stats import MODERATE, Cell, Spread, by_part, difference, spread

MOST = MODERATE + 0.05
"""Largest achieved sparsity that counts as moderate."""


def of_prices(cells: Sequence[Cell], blank: float | None) -> list[str]:
    """Returns a sentence for each of the two claims; none where no price was read.

    Args:
        cells: Cells of the study.
        blank: Error of the dense models that are shown blank pictures, the mean over the seeds.
    """
    own = [cell for cell in cells if cell.criterion == PAPER and change(cell) is not None]
    told: tuple[list[str], list[str]] = ([], [])
    for of_part in by_part(own).values():
        # Of each part of the model, the most that was removed within either claim.
        claimed = (
            [cell for cell in of_part if cell.sparsity.mean <= MOST],
            [cell for cell in of_part if cell.sparsity.mean > MOST],
        )
        if claimed[0]:
            cell = max(claimed[0], key=lambda one: one.sparsity.mean)
            told[0].append(_told(cell, ("yes", "no, it costs")))
        if claimed[1]:
            cell = max(claimed[1], key=lambda one: one.sparsity.mean)
            error, answers = cell.of("finetuned_mae"), ("no, it lowers the error", "it costs")
            if error is not None and blank is not None and error.mean >= blank:
                answers = answers[0], "yes, the pictures might as well be blank"
            told[1].append(_told(cell, answers))
    if told[1] and blank is not None:
        told[1].append(f"with blank pictures the dense model's error is {number(blank, 2)}")
    asked = (
        "Does moderate pruning lower the error of prices?",
        "Does more pruning destroy the model?",
    )
    return [
        f"{question} {'; '.join(known)}."
        for question, known in zip(asked, told, strict=True)
        if known
    ]


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
        f"{answer[0].upper()}{answer[1:]}: without {percent(cell.sparsity.mean)} of "
        f"{cell.group.part or 'the weights'} by "
        f"{cell.name} it is {mean_sd(cell.of('finetuned_mae'), 2)} after the recovery, "
        f"{mean_sd(moved, 2, sign=True)} against the control ({plural(moved.n, 'seed')})"
    )
    return f"{text}, and one seed cannot tell" if moved.n == 1 else text
