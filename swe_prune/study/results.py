"""The cells' results as one table."""

import csv
import io
from typing import Any

from swe_prune.runtime import processes, storage
from swe_prune.runtime.locks import lock
from swe_prune.study import grid
from swe_prune.study.workdir import Workdir, read_json

COLUMNS = (
    "seed",
    "criterion",
    "method",
    "scope",
    "sparsity",
    "rate",
    "sparsity_prunable",
    "sparsity_total",
    "nonzero_params",
    "dense_loss",
    "control_loss",
    "pruned_loss",
    "finetuned_loss",
    "steps",
    "seconds",
    # Added later, at the end, for those who read the columns before by their place.
    "options",
    "allocation",
    "pattern",
    "schedule",
    "recovery",
    "dense_train_loss",
    "control_train_loss",
    "pruned_train_loss",
    "finetuned_train_loss",
    "generalisation_gap",
    "control_gap",
    "pruned_kl",
    "finetuned_kl",
    "pruned_repetition",
    "finetuned_repetition",
)
"""Of results.csv. Losses are nats per token; a gap is the validation minus the training loss, of
the model after its recovery (before it, of the pruned one) and of its control. The last four are
there where the study writes samples; see `samples.sampled`."""


def rows(workdir: Workdir, cells: list[grid.Cell]) -> list[dict[str, Any]]:
    """Returns what is known of every cell that has been pruned, in the order of the grid."""
    found = []
    for cell in cells:
        path = workdir.cell(cell) / "result.json"
        if path.exists():
            result = read_json(path)
            control = workdir.control(cell.seed, cell.recovery) / "result.json"
            if control.exists():
                result |= read_json(control) | {"seconds": result["seconds"]}
            last = "finetuned" if "finetuned_loss" in result else "pruned"
            for name, model in (("generalisation_gap", last), ("control_gap", "control")):
                losses = [result.get(f"{model}{which}_loss") for which in ("", "_train")]
                if None not in losses:
                    result[name] = losses[0] - losses[1]
            found.append(result)
    return found


def write(workdir: Workdir, cells: list[grid.Cell]) -> None:
    """Writes results.csv, whole or not at all; what is not known yet is left empty.

    Processes that share the workdir take turns, so that the last table has all that is finished.
    """
    processes.first(lambda: _write(workdir, cells))


def _write(workdir: Workdir, cells: list[grid.Cell]) -> None:
    with lock(workdir.path / ".results", "table", lambda _: None):
        _write_locked(workdir, cells)


def _write_locked(workdir: Workdir, cells: list[grid.Cell]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows(workdir, cells):
        table.writerow([row.get(column, "") for column in COLUMNS])
    storage.write(workdir.results, text.getvalue())
