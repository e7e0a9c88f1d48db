"""Sweeps for config files: lists of settings from products, chains and parallel lists.

A sweep is a plain list of dicts, each one cell of a study, so it can be printed, counted and
sliced like any list:

    cells = chain(
        product({"criterion": ["swe", "magnitude"], "sparsity": [0.5, 0.8]}),
        product({"recovery": ["none"]}, zipped({"pattern": ["2:4"], "sparsity": [0.5]})),
    )

The settings are those of `config.CellConfig`. A cell that occurs twice is retained once, at
its first place.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swe_prune.arguments import checked
from swe_prune.config import CellConfig
from swe_prune.errors import InputError, did_you_mean

Settings = dict[str, Any]
Sweep = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""Choices by setting, which stand for every combination; or a list of cells."""

KNOWN = tuple(field.name for field in dataclasses.fields(CellConfig))


def product(*sweeps: Sweep) -> list[Settings]:
    """Returns every combination of the choices; the last setting varies fastest.

    Args:
        *sweeps: Mappings of a setting to its choices, or lists of cells, such as other sweeps.

    Raises:
        InputError: A setting is unknown or set by two sweeps, or choices are not a list.

    >>> product({"criterion": ["swe", "random"]}, [{"sparsity": 0.5}, {"sparsity": 0.8}])[1]
    {'criterion': 'swe', 'sparsity': 0.8}
    """
    cells: list[Settings] = [{}]
    for sweep in sweeps:
        choices = _combined(sweep) if isinstance(sweep, Mapping) else _checked(sweep)
        cells = [_joined(cell, choice) for cell in cells for choice in choices]
    return _unique(cells)


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> list[Settings]:
    """Returns the cells of every sweep, one sweep after the other.

    Raises:
        InputError: A setting is unknown.

    >>> len(chain(product({"sparsity": [0.5, 0.6]}), [{"sparsity": 0.6}, {"sparsity": 0.7}]))
    3
    """
    return _unique(cell for sweep in sweeps for cell in _checked(sweep))


@checked
def zipped(choices: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Returns the first choice of each setting as one cell, the second ones as another, and so on.

    Raises:
        InputError: A setting is unknown, or the lists differ in length.

    >>> zipped({"pattern": ["2:4", "1:4"], "sparsity": [0.5, 0.75]})[1]
    {'pattern': '1:4', 'sparsity': 0.75}
    """
    lengths = {name: len(_listed(name, choice)) for name, choice in choices.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"the lists of zipped must have one length, but {told}; make them equal")
    rows = zip(*choices.values(), strict=True)
    return _unique(dict(zip(choices, row, strict=True)) for row in rows)


def _combined(choices: Mapping[str, Sequence[Any]]) -> list[Settings]:
    lists = [_listed(name, choice) for name, choice in choices.items()]
    return [dict(zip(choices, row, strict=True)) for row in itertools.product(*lists)]


def _joined(cell: Settings, more: Settings) -> Settings:
    twice = sorted(cell.keys() & more.keys())
    if twice:
        raise InputError(f"two parts of a product set {twice[0]!r}; leave it in one of them")
    return {**cell, **more}


def _listed(name: str, choice: Any) -> Sequence[Any]:
    _check_known(name)
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        raise InputError(f"{name} must be a list of choices, got {choice!r}; write [{choice!r}]")
    return choice


def _checked(cells: Iterable[Mapping[str, Any]]) -> list[Settings]:
    listed = list(cells)
    for cell in listed:
        if not isinstance(cell, Mapping):
            raise InputError(
                f"a cell must be a dict of settings, got {cell!r}; or use product({{…}})"
            )
        for name in cell:
            _check_known(name)
    return [dict(cell) for cell in listed]


def _check_known(name: str) -> None:
    if name not in KNOWN:
        raise InputError(f"a cell has no setting {name!r}; {did_you_mean(name, KNOWN)}")


def _unique(cells: Iterable[Settings]) -> list[Settings]:
    # Settings may hold lists and mappings, which have no hash; their JSON has.
    kept: dict[str, Settings] = {}
    for cell in cells:
        kept.setdefault(json.dumps(cell, sort_keys=True, default=str), cell)
    return list(kept.values())
