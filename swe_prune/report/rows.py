"""Rows of results.csv, each value as the type of its column."""

import csv
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

from swe_prune.errors import InputError, did_you_mean, shown
from swe_prune.report.files import malformed, text_of
from swe_prune.report.records import GROUPS, key_of
from swe_prune.study.results import COLUMNS, Row

_TYPES: dict[str, Any] = typing.get_type_hints(Row)
_SCOPES = [name for name in GROUPS if name != "rate"]
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?inf|nan", re.ASCII)


def read_rows(path: epath.Path) -> tuple[list[Row], int]:
    """Returns the rows of `results.csv`, the last of each cell, and how many it replaced."""
    if not path.exists():
        raise InputError(
            f"working directory {str(path.parent)!r} has no results.csv, so nothing was measured "
            "there yet; run the experiment first or give its working directory"
        )
    try:
        lines = list(csv.reader(text_of(path).splitlines()))
    except csv.Error as error:
        raise malformed(path, str(error)) from None
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
        row = Row(**{name: converted(name, text.strip()) for name, text in texts.items()})
        check_identity(vars(row))
    except ValueError as error:
        raise InputError(f"{where} has {error}; repair the line") from None
    for name in ("sparsity_prunable", "sparsity_total"):
        if not 0 <= getattr(row, name) <= 1:
            raise InputError(f"{where} has a {name} outside 0 to 1; repair the line")
    if not 0 <= row.seconds < math.inf:
        raise InputError(f"{where} has seconds = {row.seconds}; repair the line")
    return row


def converted(name: str, value: Any) -> Any:
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


def check_identity(values: Mapping[str, Any]) -> None:
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
