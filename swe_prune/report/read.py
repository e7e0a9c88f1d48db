"""Reads what an experiment has written so far; a malformed file is refused and named.

A missing seed, cell or phase is not an error: an experiment takes hours and its report is wanted
before the end. A file that is there but cannot be understood is an `InputError`.
"""

import csv
import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from swe_prune import ledger
from swe_prune.config import Config, LedgerConfig, from_dict
from swe_prune.errors import InputError, did_you_mean, shown
from swe_prune.report.records import (
    GROUPS,
    IDENTITY,
    CellKey,
    Detail,
    Histogram,
    Results,
    Trajectory,
    key_of,
    name_of,
)
from swe_prune.runtime import storage
from swe_prune.study import grid
from swe_prune.study.payback import paybacks
from swe_prune.study.results import COLUMNS, Row

_TYPES: dict[str, Any] = typing.get_type_hints(Row)
_SCOPES = [name for name in GROUPS if name != "rate"]

_FORMS: dict[str, Any] = {
    "samples": [{"prompt": str, "text": str}],
    "answers": [{"number": int, "text": str, "price": float}],
    "prices": {
        "generated": dict.fromkeys(("own", "blank", "shuffled"), (float, types.NoneType)),
        "teacher_forced": float,
        "unparsable": {"own": int},
    },
}
"""What a result of a model of text, or of images and text, has beside numbers, by its name."""
_SIZES = ("seconds", "steps", "params", "prunable")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?inf|nan", re.ASCII)


def load(workdir: epath.PathLike) -> Results:
    """Returns everything the working directory holds by now.

    Raises:
        InputError: there is no finished cell, or a file is malformed; the file is named.
    """
    workdir = storage.parse_path(workdir, "working directory")
    rows, repeated = read_rows(workdir / "results.csv")
    config, fingerprint = _read_config(workdir / "config.json")
    # Every seed's folder: the dense model, its controls, its cells. Each file may be missing.
    training, trajectories, dense, details = {}, {}, {}, {}
    controls: dict[tuple[int, str], float] = {}
    for folder in sorted(workdir.glob("seed_*")):
        if not re.fullmatch(r"seed_\d+", folder.name):
            continue
        seed = int(folder.name.removeprefix("seed_"))
        for name, into, reader in (
            ("dense/metrics.jsonl", training, _read_metrics),
            ("dense/trajectory.jsonl", trajectories, _read_trajectory),
            ("dense/result.json", dense, _read_dense),
        ):
            if _there(folder / name):
                into[seed] = reader(folder / name)
        for path in sorted(folder.glob("control*/result.json")):
            recovery = path.parent.name.removeprefix("control").removeprefix("-")
            controls[seed, recovery or "finetune"] = _read_control(path)
        for path in sorted(folder.glob("cells/*/result.json")):
            key, detail = _read_detail(path)
            details[key] = detail
    rows = [_of_its_file(row, details, workdir) for row in rows]
    entries, settings = ledger.read(workdir / "ledger"), _settings(config)
    return Results(
        config,
        fingerprint,
        None if settings is None else len(grid.cells(settings)),
        [_with_control(row, controls) for row in rows],
        repeated,
        training,
        trajectories,
        dense,
        details,
        entries,
        (LedgerConfig() if settings is None else settings.ledger).factors,
        ledger.read_beside(workdir / "codecarbon"),
        [] if settings is None else paybacks(workdir, settings, entries),
    )


def read_rows(path: epath.Path) -> tuple[list[Row], int]:
    """Returns the rows of `results.csv`, the last of each cell, and how many it replaced."""
    if not path.exists():
        raise InputError(
            f"working directory {str(path.parent)!r} has no results.csv, so nothing was measured "
            "there yet; run the experiment first or give its working directory"
        )
    try:
        lines = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise _malformed(path, str(error)) from None
    header = lines[0] if lines else []
    if {"rule", "requested"} <= set(header):
        raise InputError(
            f"{str(path)!r} was made by an earlier version of swe_prune, whose columns differ; "
            "run the experiment again in a new working directory"
        )
    if header != list(COLUMNS):
        raise InputError(
            f"{str(path)!r} must have the columns {','.join(COLUMNS)}; "
            "run the experiment's command again to write it again"
        )
    rows = [
        _row(values, f"{str(path)!r} line {number}")
        for number, values in enumerate(lines[1:], start=2)
        if values
    ]
    if not rows:
        raise InputError(
            f"{str(path)!r} holds no finished cell yet, so there is nothing to report; "
            "run the experiment until its first cell is done"
        )
    by_cell = {key_of(row): row for row in rows}
    return list(by_cell.values()), len(rows) - len(by_cell)


def _row(values: list[str], where: str) -> Row:
    if len(values) != len(COLUMNS):
        raise InputError(
            f"{where} has {len(values)} values and not {len(COLUMNS)}; remove or repair the line"
        )
    texts = dict(zip(COLUMNS, values, strict=True))
    try:
        row = Row(**{name: _converted(name, text.strip()) for name, text in texts.items()})
        _check_identity(vars(row))
    except ValueError as error:
        raise InputError(f"{where} has {error}; repair the line") from None
    for name in ("sparsity_prunable", "sparsity_total"):
        if not 0 <= getattr(row, name) <= 1:
            raise InputError(f"{where} has a {name} outside 0 to 1; repair the line")
    if not 0 <= row.seconds < math.inf:
        raise InputError(f"{where} has seconds = {row.seconds}; repair the line")
    return row


def _of_its_file(row: Row, details: Mapping[CellKey, Detail], workdir: epath.Path) -> Row:
    """Returns a row with the numbers of its cell's own file, which has a checksum.

    Raises:
        InputError: There are files of cells, and none of this one.
    """
    detail = details.get(key_of(row))
    if detail is None and details:
        raise InputError(
            f"{str(workdir / 'results.csv')!r} has a row of {name_of(row)!r}, seed {row.seed}, of "
            "which there is no result.json; run the experiment's command again to write it again"
        )
    return row if detail is None else dataclasses.replace(row, **detail.values)


def _converted(name: str, value: Any) -> Any:
    """Returns a column's value, read from a table or from JSON, as the type of its field."""
    wanted = _TYPES[name]
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None or value == "":
        if str in kinds:
            return ""
        if types.NoneType in kinds:
            return None
    kind: Any = kinds[0]
    if kind is str and isinstance(value, str):
        return value
    is_number = type(value) in (int, float)
    if isinstance(value, str):
        is_number = _NUMBER.fullmatch(value) is not None
    try:
        if kind is not str and is_number:
            number: Any = kind(value)
            if kind is float or (0 <= number < 1 << 63 and number == float(value or 0)):
                return number
    except (ValueError, OverflowError):
        pass  # an integer with a point, or too large
    raise ValueError(
        f"{name} = {shown(value)}, which is not a {'text' if kind is str else 'number'}"
    )


def _check_identity(values: Mapping[str, Any]) -> None:
    """Raises ValueError where a cell cannot be placed in a comparison."""
    scope, levels = values["scope"], [values["sparsity"], values["rate"]]
    if scope not in _SCOPES:
        raise ValueError(f"the unknown scope {scope!r}, {did_you_mean(scope, _SCOPES)}")
    if not values["criterion"] and not values["method"]:
        raise ValueError("neither a criterion nor a method")
    known = [level for level in levels if level is not None]
    if len(known) != 1 or not math.isfinite(known[0]):
        raise ValueError(f"sparsity and rate = {levels}, where one must be a finite number")
    if known[0] < 0 or (values["sparsity"] or 0) >= 1:
        raise ValueError(f"sparsity and rate = {levels}, out of their range")


def _settings(config: dict[str, Any] | None) -> Config | None:
    """Returns the settings; None without them, or where they are of another version."""
    try:
        settings = None if config is None else from_dict(config)
        if settings is not None:
            grid.cells(settings)
    except InputError:
        return None
    return settings


def _read_control(path: epath.Path) -> float:
    loss: Any = _read_object(path).get("control_loss")
    if not _fits(loss, float):
        raise _malformed(path, f"'control_loss' is {shown(loss)}, not a number")
    return float(loss)


def _read_dense(path: epath.Path) -> dict[str, Any]:
    found = _read_object(path)
    for name, value in found.items():
        least = 0 if name in _SIZES else -math.inf
        of_numbers = name in _SIZES or name.endswith("_loss")
        if of_numbers and not (_fits(value, float) and value >= least):
            raise _malformed(path, f"{name!r} is {shown(value)}, not a number that it can be")
    if "dense_loss" not in found:
        raise _malformed(path, "it has no 'dense_loss'")
    _check_forms(path, found, "dense")
    return found


def _check_forms(path: epath.Path, found: Mapping[str, Any], *stages: str) -> None:
    """Raises InputError if texts, answers or prices of a result are not in their form."""
    for name, form in (
        (f"{stage}_{kind}", form) for stage in stages for kind, form in _FORMS.items()
    ):
        if name in found and not _fits(found[name], form):
            raise _malformed(path, f"{name!r} is not in its form: {shown(found[name])}")


def _fits(value: Any, form: Any) -> bool:
    """Returns whether a JSON value is of a form: types, and lists and dicts of forms."""
    if isinstance(form, tuple):
        return any(_fits(value, one) for one in form)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_fits(value.get(k), one) for k, one in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(one, form[0]) for one in value)
    if form is float:  # finite; JSON may have an integer in its place, of any size
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is form


def _with_control(row: Row, controls: Mapping[tuple[int, str], float]) -> Row:
    # A cell may finish before its seed's control does: the control's own file is then the newer.
    loss = controls.get((row.seed, row.recovery), row.control_loss)
    return dataclasses.replace(row, control_loss=loss)


def _there(path: epath.Path) -> bool:
    """Returns whether something has this name, be it a link that leads nowhere."""
    return path.exists() or (not storage.in_bucket(path) and os.path.islink(path))


def _malformed(path: epath.Path, reason: str) -> InputError:
    advice = "repair or remove it"
    if path.parent.parent.name == "cells":  # whose row would have no file
        advice = "remove it and run the experiment's command again, which makes it again"
    return InputError(f"{str(path)!r} cannot be read: {reason}; {advice}")


def _text(path: epath.Path) -> str:
    try:
        return storage.read_text(path, log=True)
    except (ValueError, OSError) as error:
        raise _malformed(path, str(error)) from None


def _read_object(path: epath.Path) -> dict[str, Any]:
    try:
        return storage.read_json(path)
    except (ValueError, OSError) as error:
        raise _malformed(path, str(error)) from None


def _read_lines(path: epath.Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = storage.parse_json(line)
        except ValueError as error:
            raise _malformed(path, f"line {number}: {error}") from None
        if not _fits(value.get("step"), int) or not 0 <= value["step"] < 1 << 63:
            raise _malformed(path, f"line {number} has no whole number 'step'")
        yield value


def _read_config(path: epath.Path) -> tuple[dict[str, Any] | None, str | None]:
    if not _there(path):
        return None, None
    value = _read_object(path)
    if not isinstance(value.get("config"), dict):
        raise _malformed(path, "it has no group 'config'")
    return value["config"], str(value.get("fingerprint", "")) or None


def _read_metrics(path: epath.Path) -> list[dict[str, float]]:
    # A resumed run repeats the steps after its checkpoint: the later line of a step counts.
    merged: dict[int, dict[str, float]] = {}
    for line in _read_lines(path):
        kept = {k: v for k, v in line.items() if v is not None}
        if not _fits(list(kept.values()), [float]):
            raise _malformed(path, f"step {line['step']} has what is not a number")
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
            if not _fits(weights, [float]):
                raise _malformed(path, f"step {step} has no list of numbers for {name!r}")
            values.setdefault(name, []).append(weights)
    for name, history in values.items():
        if len(history) != len(steps) or len({len(weights) for weights in history}) > 1:
            raise _malformed(path, f"the sample of {name!r} changes its size between snapshots")
    return Trajectory(steps, values)


def _read_detail(path: epath.Path) -> tuple[CellKey, Detail]:
    value = _read_object(path)
    try:
        identity = {name: _converted(name, value.get(name)) for name in IDENTITY}
        _check_identity(identity)
        values = {
            name: _converted(name, value[name])
            for name in COLUMNS
            if name in value and not name.startswith("control_")
        }
        tensors = {
            name: (counts["kept"], counts["total"])
            for name, counts in value.get("tensors", {}).items()
        }
        if not all(_fits([*two], [int]) and 0 <= two[0] <= two[1] for two in tensors.values()):
            raise ValueError("'tensors' has numbers that are no counts")
        histogram = _histogram(value["histogram"]) if value.get("histogram") else None
        kept = value.get("sample_kept", {})
        if not all(_fits(mask, [bool]) for mask in kept.values()):
            raise ValueError("'sample_kept' has what is not true or false")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, f"{type(error).__name__}: {error}") from None
    stages = ("pruned", "finetuned")
    samples = {stage: value.get(f"{stage}_samples") or [] for stage in stages}
    prices = {s: value[f"{s}_prices"] for s in stages if value.get(f"{s}_prices")}
    answers = {stage: value.get(f"{stage}_answers") or [] for stage in stages}
    _check_forms(path, value, *stages)
    found = Detail(tensors, histogram, kept, samples, prices, answers, values)
    return tuple(identity.values()), found


def _histogram(value: dict[str, Any]) -> Histogram:
    edges, names = value["edges"], ("dense", "pruned", "finetuned")
    counts = {name: value.get(name) or [] for name in names}
    if (
        not _fits(edges, [float])
        or sorted(edges) != edges
        or not _fits([*counts.values()], [[int]])
    ):
        raise ValueError("'histogram' has what are no edges or counts")
    for name, numbers in counts.items():
        if len(numbers) != len(edges) - 1 and not (name == "finetuned" and not numbers):
            raise ValueError(f"histogram {name!r} has {len(numbers)} counts, {len(edges)} edges")
    return Histogram(edges, **counts)
