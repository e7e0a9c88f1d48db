"""The results of all cells as one table, results.csv."""

import csv
import dataclasses
import io
from typing import Any

from swe_prune.runtime import processes, storage
from swe_prune.runtime.locks import lock
from swe_prune.study import grid
from swe_prune.study.workdir import Workdir, read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of the study; the fields are the columns of results.csv, in this order.

    Losses are nats per token. An optional value is None, and its entry in the table empty, where it
    does not apply or is not measured yet.

    Attributes:
        seed: Seed of the dense model.
        criterion: Registered criterion, or empty where a method scores by itself.
        method: Method that prunes block after block, or empty.
        options: Options of the criterion as `name=value`, joined by commas.
        allocation: Allocation rule, or empty where the scope decides.
        scope: Where the sparsity is met: "tensor", "global" or "row".
        sparsity: Share of the weights to remove; None for the paper's rule.
        rate: Multiple of the standard deviation of the scores, of the paper's rule only.
        pattern: Shape of what is removed, or empty for single weights.
        restore: How the weights that stay make up for those that go, or empty.
        include: Rules of the prunable weights that the cell prunes, or empty for all.
        schedule: When to prune, such as "one_shot" or "cubic".
        recovery: Training after pruning, such as "none", "finetune" or "rewind-200".
        steps: Steps of that training.
        sparsity_prunable: Achieved sparsity of the prunable weights, or of those of `include`.
        sparsity_total: Achieved sparsity of all parameters.
        nonzero_params: Number of parameters that are not pruned.
        dense_loss: Validation loss of the dense model.
        control_loss: Validation loss of the dense model after the same extra training.
        pruned_loss: Validation loss straight after pruning.
        finetuned_loss: Validation loss after the recovery.
        dense_train_loss: Training loss of the dense model.
        control_train_loss: Training loss of the control.
        pruned_train_loss: Training loss straight after pruning.
        finetuned_train_loss: Training loss after the recovery.
        generalisation_gap: Validation minus training loss after the recovery, or as pruned before.
        control_gap: Validation minus training loss of the control.
        pruned_kl: KL divergence from the dense model straight after pruning; see `samples`.
        finetuned_kl: KL divergence from the dense model after the recovery.
        pruned_repetition: Repetition in the samples of the pruned model.
        finetuned_repetition: Repetition in the samples after the recovery.
        dense_mae: Mean absolute error of the prices that the dense model generates.
        control_mae: The same of the control.
        pruned_mae: The same straight after pruning.
        finetuned_mae: The same after the recovery.
        seconds: Time that the cell took.
    """

    seed: int
    criterion: str = ""
    method: str = ""
    options: str = ""
    allocation: str = ""
    scope: str
    sparsity: float | None = None
    rate: float | None = None
    pattern: str = ""
    restore: str = ""
    include: str = ""
    schedule: str
    recovery: str
    steps: int
    sparsity_prunable: float
    sparsity_total: float
    nonzero_params: int
    dense_loss: float
    control_loss: float | None = None
    pruned_loss: float
    finetuned_loss: float | None = None
    dense_train_loss: float | None = None
    control_train_loss: float | None = None
    pruned_train_loss: float | None = None
    finetuned_train_loss: float | None = None
    generalisation_gap: float | None = None
    control_gap: float | None = None
    pruned_kl: float | None = None
    finetuned_kl: float | None = None
    pruned_repetition: float | None = None
    finetuned_repetition: float | None = None
    dense_mae: float | None = None
    control_mae: float | None = None
    pruned_mae: float | None = None
    finetuned_mae: float | None = None
    seconds: float


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
"""Header of results.csv."""


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
                held_out, train = result.get(f"{model}_loss"), result.get(f"{model}_train_loss")
                if held_out is not None and train is not None:
                    result[name] = held_out - train
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
