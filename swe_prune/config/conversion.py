"""Plain values to settings and back: types, choices and durations."""

import ast
import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from swe_prune.config.experiment import Config, Duration
from swe_prune.errors import InputError, check_choice, did_you_mean, shown


def flat(config: Any) -> dict[str, Any]:
    """Returns every setting by its dotted path.

    >>> from swe_prune.config import CalibrationConfig
    >>> flat(CalibrationConfig(windows=2))
    {'windows': 2, 'batch': 32, 'seed': 0}
    """

    def walk(values: Any, path: str) -> dict[str, Any]:
        if isinstance(values, dict):
            found: dict[str, Any] = {}
            for key, value in values.items():
                found |= walk(value, f"{path}.{key}" if path else key)
            return found
        return {path: list(values) if isinstance(values, tuple) else values}

    return walk(dataclasses.asdict(config), "")


def to_steps(duration: Duration, *, total: int | None = None, epoch: int | None = None) -> int:
    """Returns a duration in steps, rounded to the nearest and at least 1 unless it is 0.

    Args:
        duration: Number of steps, `"p%"` of `total`, or `"n epochs"` of `epoch` steps each.
        total: Number of steps of the phase that the duration belongs to.
        epoch: Number of steps of one pass over the training text.

    Raises:
        InputError: The duration is malformed, or its unit has no length here.

    >>> to_steps("5%", total=2000), to_steps("2 epochs", epoch=150), to_steps(7)
    (100, 300, 7)
    """
    if isinstance(duration, int) and not isinstance(duration, bool) and duration >= 0:
        return duration
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|epochs?|steps?)\s*", str(duration))
    if not match:
        raise InputError(
            "a duration must be a number of steps, 'p%' or 'n epochs', "
            f"got {duration!r}; write e.g. 500"
        )
    value, unit = float(match[1]), match[2].rstrip("s")
    base = {"step": 1, "%": None if total is None else total / 100, "epoch": epoch}[unit]
    if base is None:
        raise InputError(
            f"duration {duration!r} cannot be used here, where a {unit!r} has no length; give steps"
        )
    steps = value * base
    return 0 if steps == 0 else max(1, math.floor(steps + 0.5))


def from_dict(
    values: Mapping[str, Any] | ConfigDict, cls: type = Config, path: str = "config"
) -> Any:
    """Returns the frozen dataclass `cls` filled from nested plain values.

    Raises:
        InputError: A key is unknown, or a value does not fit its type; named by its dotted path.
    """
    if not isinstance(values, Mapping | ConfigDict):
        raise InputError(f"{path} must be a mapping of names to values, got {shown(values)}")
    types_of = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in types_of:
            raise InputError(f"{path} has no setting {key!r}; {did_you_mean(key, types_of)}")
        kwargs[key] = convert(value, types_of[key], f"{path}.{key}")
    return cls(**kwargs)


class Text(str):
    """Text from a command line, which `convert` reads as the type it is to become."""


def literal(text: str) -> Any:
    """Returns the Python value that a text spells, or else the text.

    >>> literal("3"), literal("1e-3"), literal("inf"), literal("[1, None]"), literal("5%")
    (3, 0.001, inf, [1, None], '5%')
    """
    # float() reads the digits of every script, which nothing else here does.
    for read in (ast.literal_eval, float) if text.isascii() else (ast.literal_eval,):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return str(text)


def convert(value: Any, wanted: Any, what: str) -> Any:
    """Returns a value as the type of its setting.

    Args:
        value: Python value, or `Text`.
        wanted: Type hint of the setting.
        what: Name of the setting, for the sentence.

    Raises:
        InputError: The value does not fit the type.

    >>> convert(Text("3"), int | None, "--steps"), convert([1, 2.5], tuple[float, ...], "rates")
    (3, (1.0, 2.5))
    """
    if isinstance(value, Text):
        return _read(value, wanted, what)
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, typing.cast(type, wanted)):
            return value
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{what} is a group of settings, got {value!r}; set its members")
        return from_dict(value, typing.cast(type, wanted), what)
    if choices := _choices(wanted):
        check_choice(value, choices, what)
        return value
    for one in _alternatives(wanted):
        origin = typing.get_origin(one) or one
        grouped: Any = one
        if dataclasses.is_dataclass(grouped) and isinstance(value, Mapping | ConfigDict):
            return from_dict(value, typing.cast(type, grouped), what)
        if origin is Mapping:
            if isinstance(value, Mapping):
                return dict(value)
        elif origin is tuple:
            if isinstance(value, Sequence) and not isinstance(value, str):
                member = typing.get_args(one)[0]
                return tuple(convert(v, member, f"{what}[{i}]") for i, v in enumerate(value))
        elif one is float and isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer beyond all floats
                return float(value)
        elif isinstance(value, one) and not (isinstance(value, bool) and one is int):
            return value
    kinds = [typing.get_origin(one) or one for one in _alternatives(wanted)]
    names = [_KINDS.get(kind, str(kind)) for kind in kinds]
    raise InputError(f"{what} must be {' or '.join(names)}, got {value!r}")


_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple: "a list",
    Mapping: "a dict",
    types.NoneType: "None",
}


def _read(text: Text, wanted: Any, what: str) -> Any:
    try:
        return convert(literal(text), wanted, what)
    except InputError:
        kinds = set(_alternatives(wanted))
        if str in kinds and not kinds & {int, float, bool}:
            return str(text)  # a name such as "123", which spells a number
        raise


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    united = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return typing.get_args(wanted) if united else (wanted,)


def _choices(wanted: Any) -> tuple[str | None, ...]:
    """Returns the values of a Literal, and None where it may be None; () for other types."""
    found = [one for one in _alternatives(wanted) if typing.get_origin(one) is Literal]
    values = tuple(value for one in found for value in typing.get_args(one))
    return (*values, None) if values and types.NoneType in _alternatives(wanted) else values


def check_choices(settings: Any, path: str = "config") -> None:
    """Checks every choice in a dataclass of settings and in the groups inside it.

    For settings that were made without `from_dict`, which has checked them already.

    Raises:
        InputError: A setting is not one of its choices.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        members = enumerate(value) if isinstance(value, tuple) else ()
        kind = next(iter(typing.get_args(hint)), None)  # of the members, if it is a tuple
        within = [(f"[{i}]", member, kind) for i, member in members]
        for suffix, one, wanted in (("", value, hint), *within):
            if choices := _choices(wanted):
                check_choice(one, choices, f"{path}.{name}{suffix}")
            if dataclasses.is_dataclass(one):
                check_choices(one, f"{path}.{name}{suffix}")
