"""Reads what an experiment has written so far; a malformed file is refused and named.

A missing seed, cell or phase is not an error: an experiment takes hours and its report is wanted
before the end. A file that is there but cannot be understood is an `InputError`.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any

from etils import epath

from swe_prune import ledger
from swe_prune.config import Config, LedgerConfig, from_dict
from swe_prune.errors import InputError, shown
from swe_prune.evaluation.prices import PICTURES
from swe_prune.report.files import fits, malformed, read_lines, read_object, there
from swe_prune.report.records import (
    IDENTITY,
    CellKey,
    CutModel,
    Detail,
    Histogram,
    Results,
    Trajectory,
    key_of,
    name_and_part_of,
)
from swe_prune.report.rows import check_identity, converted, read_rows
from swe_prune.runtime import storage
from swe_prune.study import grid
from swe_prune.study.payback import paybacks
from swe_prune.study.results import COLUMNS, Row

_FORMS: dict[str, Any] = {
    "samples": [{"prompt": str, "text": str}],
    "answers": [{"number": int, "text": str, "price": float}],
    "prices": {
        "generated": dict.fromkeys(PICTURES, (float, types.NoneType)),
        "teacher_forced": float,
        "unparsable": {"own": int},
    },
}
"""What a result of a model of text, or of images and text, has beside numbers, by its name."""
_PRICES_OF_CUT = re.compile(r"(cut|recovered|smaller_[0-9]+(?:\.[0-9]+)?)_prices")
_SIZES = ("seconds", "steps", "params", "prunable")


def load(workdir: epath.PathLike) -> Results:
    """Returns everything the working directory holds by now.

    Raises:
        InputError: There is no finished cell, or a file is malformed; the file is named.
    """
    workdir = storage.parse_path(workdir, "working directory")
    rows, repeated = read_rows(workdir / "results.csv")
    config, fingerprint = _read_config(workdir / "config.json")
    # Every seed's folder: the dense model, its controls, its cells. Each file may be missing.
    training, trajectories, dense, details, cuts = {}, {}, {}, {}, []
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
            if there(folder / name):
                into[seed] = reader(folder / name)
        for path in sorted(folder.glob("control*/result.json")):
            recovery = path.parent.name.removeprefix("control").removeprefix("-")
            controls[seed, recovery or "finetune"] = _read_control(path)
        for path in sorted(folder.glob("cells/*/result.json")):
            key, detail = _read_detail(path)
            details[key] = detail
        cuts += [_read_cut(path, seed) for path in sorted(folder.glob("cuts/*/result.json"))]
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
        cuts,
    )


def _of_its_file(row: Row, details: Mapping[CellKey, Detail], workdir: epath.Path) -> Row:
    """Returns a row with the numbers of its cell's own file, which has a checksum.

    Raises:
        InputError: There are files of cells, and none of this one.
    """
    detail = details.get(key_of(row))
    if detail is None and details:
        raise InputError(
            f"{str(workdir / 'results.csv')!r} has a row of {name_and_part_of(row)!r}, seed "
            f"{row.seed}, of which there is no result.json; run the experiment's command again to "
            "write it again"
        )
    return row if detail is None else dataclasses.replace(row, **detail.values)


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
    loss: Any = read_object(path).get("control_loss")
    if not fits(loss, float):
        raise malformed(path, f"'control_loss' is {shown(loss)}, not a number")
    return float(loss)


def _read_dense(path: epath.Path) -> dict[str, Any]:
    found = read_object(path)
    for name, value in found.items():
        least = 0 if name in _SIZES else -math.inf
        of_numbers = name in _SIZES or name.endswith("_loss")
        if of_numbers and not (fits(value, float) and value >= least):
            raise malformed(path, f"{name!r} is {shown(value)}, not a number that it can be")
    if "dense_loss" not in found:
        raise malformed(path, "it has no 'dense_loss'")
    _check_forms(path, found, "dense")
    return found


def _check_forms(path: epath.Path, found: Mapping[str, Any], *stages: str) -> None:
    """Raises InputError if texts, answers or prices of a result are not in their form."""
    for name, form in (
        (f"{stage}_{kind}", form) for stage in stages for kind, form in _FORMS.items()
    ):
        if name in found and not fits(found[name], form):
            raise malformed(path, f"{name!r} is not in its form: {shown(found[name])}")


def _with_control(row: Row, controls: Mapping[tuple[int, str], float]) -> Row:
    # A cell may finish before its seed's control does: the control's own file is then the newer.
    loss = controls.get((row.seed, row.recovery), row.control_loss)
    return dataclasses.replace(row, control_loss=loss)


def _read_config(path: epath.Path) -> tuple[dict[str, Any] | None, str | None]:
    if not there(path):
        return None, None
    value = read_object(path)
    if not isinstance(value.get("config"), dict):
        raise malformed(path, "it has no group 'config'")
    return value["config"], str(value.get("fingerprint", "")) or None


def _read_metrics(path: epath.Path) -> list[dict[str, float]]:
    # A resumed run repeats the steps after its checkpoint: the later line of a step counts.
    merged: dict[int, dict[str, float]] = {}
    for line in read_lines(path):
        kept = {k: v for k, v in line.items() if v is not None}
        if not fits(list(kept.values()), [float]):
            raise malformed(path, f"step {line['step']} has what is not a number")
        merged.setdefault(line["step"], {}).update(kept)
    return [merged[step] for step in sorted(merged)]


def _read_trajectory(path: epath.Path) -> Trajectory:
    snapshots = {line["step"]: line.get("values") for line in read_lines(path)}
    steps = sorted(snapshots)
    values: dict[str, list[list[float]]] = {}
    for step in steps:
        sample = snapshots[step]
        if not isinstance(sample, dict):
            raise malformed(path, f"step {step} has no group 'values'")
        for name, weights in sample.items():
            if not fits(weights, [float]):
                raise malformed(path, f"step {step} has no list of numbers for {name!r}")
            values.setdefault(name, []).append(weights)
    for name, history in values.items():
        if len(history) != len(steps) or len({len(weights) for weights in history}) > 1:
            raise malformed(path, f"the sample of {name!r} changes its size between snapshots")
    return Trajectory(steps, values)


def _read_detail(path: epath.Path) -> tuple[CellKey, Detail]:
    value = read_object(path)
    try:
        identity = {name: converted(name, value.get(name)) for name in IDENTITY}
        check_identity(identity)
        values = {
            name: converted(name, value[name])
            for name in COLUMNS
            if name in value and not name.startswith("control_")
        }
        tensors = {
            name: (counts["kept"], counts["total"])
            for name, counts in value.get("tensors", {}).items()
        }
        if not all(fits([*two], [int]) and 0 <= two[0] <= two[1] for two in tensors.values()):
            raise ValueError("'tensors' has numbers that are not counts")
        histogram = _histogram(value["histogram"]) if value.get("histogram") else None
        kept = value.get("sample_kept", {})
        if not all(fits(mask, [bool]) for mask in kept.values()):
            raise ValueError("'sample_kept' has what is not true or false")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed(path, f"{type(error).__name__}: {error}") from None
    stages = ("pruned", "finetuned")
    samples = {stage: value.get(f"{stage}_samples") or [] for stage in stages}
    prices = {s: value[f"{s}_prices"] for s in stages if value.get(f"{s}_prices")}
    answers = {stage: value.get(f"{stage}_answers") or [] for stage in stages}
    _check_forms(path, value, *stages)
    found = Detail(tensors, histogram, kept, samples, prices, answers, values)
    return tuple(identity.values()), found


def _read_cut(path: epath.Path, seed: int) -> CutModel:
    found = read_object(path)
    for name, kind in (("units", str), ("sparsity", float)):
        if not fits(found.get(name), kind):
            raise malformed(path, f"{name!r} is not in its form: {shown(found.get(name))}")
    models = [match[1] for name in found if (match := _PRICES_OF_CUT.fullmatch(name))]
    _check_forms(path, found, *models)
    prices = {model: found[f"{model}_prices"] for model in models}
    return CutModel(path.parent.name, seed, found["units"], found["sparsity"], prices)


def _histogram(value: dict[str, Any]) -> Histogram:
    edges, names = value["edges"], ("dense", "pruned", "finetuned")
    counts = {name: value.get(name) or [] for name in names}
    if not fits(edges, [float]) or sorted(edges) != edges or not fits([*counts.values()], [[int]]):
        raise ValueError("'histogram' has values that are not edges or counts")
    for name, numbers in counts.items():
        if len(numbers) != len(edges) - 1 and not (name == "finetuned" and not numbers):
            raise ValueError(f"histogram {name!r} has {len(numbers)} counts, {len(edges)} edges")
    return Histogram(edges, **counts)
