"""Reads what an experiment has written so far, and refuses what is malformed by its file's name.

A missing seed, cell or phase is no error here: an experiment takes hours and its report is wanted
before the end. What is there but cannot be understood is an `InputError`.
"""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from swe_prune.errors import InputError, did_you_mean
from swe_prune.report.records import (
    RULES,
    USUAL,
    CellKey,
    Detail,
    Histogram,
    Results,
    Row,
    Trajectory,
    full_name,
)
from swe_prune.runtime import storage

COLUMNS = [
    "seed", "criterion", "rule", "requested", "sparsity_prunable", "sparsity_total",
    "nonzero_params", "dense_loss", "control_loss", "pruned_loss", "finetuned_loss", "steps",
    "seconds",
]  # fmt: skip

ADDED = [
    "options", "allocation", "pattern", "schedule", "recovery", "dense_train_loss",
    "control_train_loss", "pruned_train_loss", "finetuned_train_loss", "generalisation_gap",
    "control_gap", "pruned_kl", "finetuned_kl", "pruned_repetition", "finetuned_repetition",
]  # fmt: skip
"""Columns that may follow; a table from before they were there does without."""

_NAMING = ("options", "allocation", "pattern")  # that become part of the criterion's name
_OPTIONAL = ("control_loss", "finetuned_loss", *ADDED)  # empty until that phase has run
_KINDS: dict[str, type] = {
    "seed": int, "criterion": str, "rule": str, "nonzero_params": int, "steps": int,
    "schedule": str, "recovery": str,
}  # fmt: skip


def load(workdir: epath.PathLike) -> Results:
    """Returns everything the working directory holds by now.

    Raises:
        InputError: there is no finished cell, or a file is malformed; the file is named.
    """
    workdir = storage.parse_path(workdir, "working directory")
    study, repeated = read_rows(workdir / "results.csv")
    plain = any(row.plain for row in study)
    config, fingerprint = _read_config(workdir / "config.json")
    training, trajectories, dense, controls, details = {}, {}, {}, {}, {}
    for folder in sorted(workdir.glob("seed_*")):
        if not re.fullmatch(r"seed_\d+", folder.name):
            continue
        seed = int(folder.name.removeprefix("seed_"))
        for name, into, reader in (
            ("dense/metrics.jsonl", training, _read_metrics),
            ("dense/trajectory.jsonl", trajectories, _read_trajectory),
            ("dense/result.json", dense, _read_object),
            ("control/result.json", controls, _read_object),
        ):
            if (folder / name).is_file():
                into[seed] = reader(folder / name)
        for path in sorted(folder.glob("cells/*/result.json")):
            key, detail = _read_detail(path, seed)
            if not plain or (detail.schedule, detail.recovery) == USUAL:
                details[key] = detail
    study = [_with_control(row, controls, workdir) for row in study]
    rows = [row.in_full() for row in study if row.plain or not plain]
    return Results(
        config, fingerprint, rows, study, repeated, training, trajectories, dense, details
    )


def read_rows(path: epath.Path) -> tuple[list[Row], int]:
    """Returns the rows of `results.csv`, the last of each cell, and how many it replaced."""
    if not path.is_file():
        raise InputError(
            f"working directory {str(path.parent)!r} has no results.csv, so nothing was measured "
            "there yet; run the experiment first or give its working directory"
        )
    try:
        lines = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise _malformed(path, str(error)) from None
    if not lines or lines[0][: len(COLUMNS)] != COLUMNS:
        raise InputError(
            f"{str(path)!r} does not begin with the columns {','.join(COLUMNS)}; "
            "let the experiment write it anew"
        )
    rows = [
        _row(lines[0], values, f"{str(path)!r} line {number}")
        for number, values in enumerate(lines[1:], start=2)
        if values
    ]
    if not rows:
        raise InputError(
            f"{str(path)!r} holds no finished cell yet, so there is nothing to report; "
            "run the experiment until its first cell is done"
        )
    by_cell = {(*row.key, row.schedule, row.recovery): row for row in rows}
    return list(by_cell.values()), len(rows) - len(by_cell)


def _row(columns: list[str], values: list[str], where: str) -> Row:
    if len(values) != len(columns):
        raise InputError(
            f"{where} has {len(values)} values and not {len(columns)}; remove or repair the line"
        )
    cell = dict(zip(columns, values, strict=True))
    if cell["rule"] not in RULES:
        raise InputError(
            f"{where} has the unknown rule {cell['rule']!r}; {did_you_mean(cell['rule'], RULES)}"
        )
    converted: dict[str, Any] = {}
    for name in [*COLUMNS, *ADDED]:
        text = cell.get(name, "").strip()
        if name in _NAMING or (name in _KINDS and name in ADDED and not text):
            continue
        try:
            converted[name] = (
                None if name in _OPTIONAL and not text else _KINDS.get(name, float)(text)
            )
        except ValueError:
            raise InputError(
                f"{where} has {name} = {text!r}, which is no number; repair the line"
            ) from None
    converted["criterion"] = label(cell)
    row = Row(**converted)
    if not (0 <= row.sparsity_prunable <= 1 and math.isfinite(row.requested)):
        raise InputError(
            f"{where} has a sparsity outside 0 to 1 or an endless request; repair the line"
        )
    return row


def label(cell: Mapping[str, Any]) -> str:
    """Returns the name of a criterion with its options, its allocation and its pattern."""
    return " ".join([cell["criterion"], *(str(cell[name]) for name in _NAMING if cell.get(name))])


def _with_control(row: Row, controls: dict[int, dict[str, Any]], workdir: epath.Path) -> Row:
    # A cell may finish before its seed's control does: the control's own file is then the newer.
    if row.control_loss is not None or row.recovery != "finetune" or row.seed not in controls:
        return row
    path = workdir / f"seed_{row.seed}" / "control" / "result.json"
    loss = controls[row.seed].get("control_loss")
    if not isinstance(loss, int | float):
        raise _malformed(path, "'control_loss' is no number")
    return dataclasses.replace(row, control_loss=float(loss))


def _malformed(path: epath.Path, reason: str) -> InputError:
    return InputError(f"{str(path)!r} cannot be read: {reason}; repair or remove it")


def _text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except (UnicodeDecodeError, OSError) as error:
        raise _malformed(path, str(error)) from None


def _read_object(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise _malformed(path, str(error)) from None
    if not isinstance(value, dict):
        raise _malformed(path, "it is no JSON object")
    return value


def _read_lines(path: epath.Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _malformed(path, f"line {number}: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise _malformed(path, f"line {number} has no whole number 'step'")
        yield value


def _read_config(path: epath.Path) -> tuple[dict[str, Any] | None, str | None]:
    if not path.is_file():
        return None, None
    value = _read_object(path)
    if not isinstance(value.get("config"), dict):
        raise _malformed(path, "it has no group 'config'")
    return value["config"], str(value.get("fingerprint", "")) or None


def _read_metrics(path: epath.Path) -> list[dict[str, float]]:
    # A resumed run repeats the steps after its checkpoint: of one step the later line is kept.
    merged: dict[int, dict[str, float]] = {}
    for line in _read_lines(path):
        kept = {k: v for k, v in line.items() if isinstance(v, int | float)}
        merged.setdefault(line["step"], {}).update(kept)
    return [merged[step] for step in sorted(merged)]


def _read_trajectory(path: epath.Path) -> Trajectory:
    snapshots = {line["step"]: line.get("values") for line in _read_lines(path)}
    steps = sorted(snapshots)
    values: dict[str, list[list[float]]] = {}
    for step in steps:
        sample = snapshots[step]
        if not isinstance(sample, dict):
            raise _malformed(path, f"step {step} has no group 'values'")
        for name, weights in sample.items():
            if not isinstance(weights, list):
                raise _malformed(path, f"step {step} has no list for {name!r}")
            values.setdefault(name, []).append(weights)
    for name, history in values.items():
        if len(history) != len(steps) or len({len(weights) for weights in history}) > 1:
            raise _malformed(path, f"the sample of {name!r} changes its size between snapshots")
    return Trajectory(steps, values)


def _read_detail(path: epath.Path, seed: int) -> tuple[CellKey, Detail]:
    value = _read_object(path)
    try:
        names = (label(value), str(value.get("schedule") or USUAL[0]))
        names = (*names, str(value.get("recovery") or USUAL[1]))
        key = (seed, str(value["rule"]), full_name(*names), float(value["requested"]))
        tensors = {
            name: (int(counts["kept"]), int(counts["total"]))
            for name, counts in value.get("tensors", {}).items()
        }
        histogram = _histogram(value["histogram"]) if value.get("histogram") else None
        kept = {
            name: [bool(v) for v in mask] for name, mask in value.get("sample_kept", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, f"{type(error).__name__}: {error}") from None
    samples = {
        stage: value[f"{stage}_samples"]
        for stage in ("pruned", "finetuned")
        if value.get(f"{stage}_samples")
    }
    return key, Detail(tensors, histogram, kept, *names[1:], samples=samples)


def _histogram(value: dict[str, Any]) -> Histogram:
    edges = [float(edge) for edge in value["edges"]]
    names = ("dense", "pruned", "finetuned")
    counts = {name: [int(count) for count in value.get(name) or []] for name in names}
    for name, numbers in counts.items():
        if len(numbers) != len(edges) - 1 and not (name == "finetuned" and not numbers):
            raise ValueError(f"histogram {name!r} has {len(numbers)} counts, {len(edges)} edges")
    return Histogram(edges, **counts)
