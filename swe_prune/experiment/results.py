"""The cells' results as one table."""

import csv
import io
from typing import Any

from swe_prune.experiment import grid
from swe_prune.experiment.workdir import Workdir, read_json

COLUMNS = (
    "seed",
    "criterion",
    "rule",
    "requested",
    "sparsity_prunable",
    "sparsity_total",
    "nonzero_params",
    "dense_loss",
    "control_loss",
    "pruned_loss",
    "finetuned_loss",
    "steps",
    "seconds",
)


def rows(workdir: Workdir, cells: list[grid.Cell]) -> list[dict[str, Any]]:
    """Returns what is known of every cell that has been pruned, in the order of the grid."""
    found = []
    for cell in cells:
        path = workdir.cell(cell) / "result.json"
        if path.exists():
            result = read_json(path)
            control = workdir.control(cell.seed) / "result.json"
            if control.exists():
                result["control_loss"] = read_json(control)["control_loss"]
            found.append(result)
    return found


def write(workdir: Workdir, cells: list[grid.Cell]) -> None:
    """Writes results.csv, whole or not at all; what is not known yet is left empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows(workdir, cells):
        table.writerow([row.get(column, "") for column in COLUMNS])
    temporary = workdir.results.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(workdir.results)
