"""What an annotation is, and what it asks for in words."""

import collections.abc
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from swe_prune.errors import shown

SCALARS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string"}
SERIES = (list, tuple, Sequence, collections.abc.Iterable, collections.abc.Collection)


def has_shape(value: Any) -> bool:
    """Returns whether a value has a shape, as arrays do; that of a module is none."""
    return isinstance(getattr(value, "shape", None), tuple)


def is_union(hint: Any) -> bool:
    """Returns whether an annotation is one of several."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def is_array(hint: Any) -> bool:
    """Returns whether an annotation is that of arrays, with dtypes and axes."""
    return hasattr(hint, "dim_str") and hasattr(hint, "dtypes")


def in_words(hint: Any) -> str:
    """Returns what an annotation asks for, in words."""
    if is_union(hint):
        every = list(dict.fromkeys(in_words(one) for one in typing.get_args(hint)))
        return " or ".join(every)
    if hint is None or hint is type(None):
        return "None"
    if hint in SCALARS:
        return SCALARS[hint]
    if is_array(hint):
        wanted = str(hint.dtypes)
        kind = next((one for one in ("float", "bool", "key", "int") if one in wanted), "")
        shape = f" of shape ({', '.join(hint.dim_str.split())})" if hint.dim_str.split() else ""
        named = {"int": "an integer array", "": "an array"}.get(kind, f"a {kind} array")
        return f"{named}{shape}"
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, of))}"
    if origin is os.PathLike or hint is os.PathLike:
        return "a path"
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        number = len(of[0]) if of and isinstance(of[0], list) else None
        return "a function" + (f" of {number} arguments" if number is not None else "")
    kind = origin if isinstance(origin, type) else hint
    if not isinstance(kind, type) or kind is Any:
        return "a value"
    if issubclass(kind, Mapping):
        return f"a mapping of {' to '.join(map(_plural, of or (Any, Any)))}"
    if issubclass(kind, tuple) and of:
        number = f"{len(of)} " if of[-1] is not Ellipsis else ""
        return f"a tuple of {number}{_plural(of[0])}"
    if kind in SERIES:
        return f"a sequence of {_plural(of[0] if of else Any)}"
    name = kind.__name__.rpartition(".")[2].replace("PyTree", "pytree")
    return f"a{'n' * (name[0] in 'AEIO')} {name}"


_PLURALS = {str: "strings", int: "integers", float: "finite numbers", bool: "bools"}


def _plural(hint: Any) -> str:
    if is_union(hint):
        return " or ".join(dict.fromkeys(_plural(one) for one in typing.get_args(hint)))
    if hint is Any or isinstance(hint, TypeVar):
        return "values"
    if hint in SCALARS:
        return _PLURALS[hint]
    name, of, rest = in_words(hint).removeprefix("a ").removeprefix("an ").partition(" of ")
    return f"{name}s{of}{rest}"


def told(value: Any) -> str:
    """Returns a value for a sentence: arrays as their dtype and shape, others as their repr."""
    if has_shape(value) and value.shape and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return shown(value)
