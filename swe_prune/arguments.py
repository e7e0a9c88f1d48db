"""Arguments of public calls, held against the annotations of their signatures.

    @checked
    def samples(fn, params, batches, *, leaves: str | Sequence[str], tokens: int = 512): ...

A value of another kind than the annotation names ends in one sentence before anything is computed,
in place of whatever error its first use would raise. What an annotation cannot say, such as which
shapes belong together, the function checks itself.
"""

import collections.abc
import functools
import inspect
import itertools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from swe_prune import bounds
from swe_prune.annotations import SCALARS, SERIES, has_shape, in_words, is_array, is_union, told
from swe_prune.errors import InputError, shown

F = TypeVar("F", bound=Callable[..., Any])

RANGES = {
    name: bound
    for bound, names in {
        bounds.SEED: "seed seeds",
        bounds.COUNT: "at_once batch block context count every iterations max_new_tokens n "
        "number patience rank ranks resamples rounds steps vocab_size window windows",
        bounds.INDEX: "at begin end leave_out process to",
        bounds.Bound(0, 2**48, whole=True): "size tokens total",  # which may be billions
    }.items()
    for name in names.split()
}
"""Ranges of the integers that have the same meaning in every call, by name."""

_LARGEST = 2**63 - 1
ABSTRACT = "ShapeDtypeStruct"
UNSORTED = "sorting pytree dictionary keys"
"""Part of what JAX says of keys that have no order."""
_LONGEST_NAME = 255  # bytes


def checked(call: F) -> F:
    """Returns a function, or a class, that checks its arguments by their annotations first.

    Sequences of numbers and nested ones count as arrays and are handed on as such.

    Raises:
        InputError: By the call, if an argument is not what its annotation says.

    >>> @checked
    ... def half(size: int, rule: str = "up"):
    ...     return size // 2
    >>> half(4)
    2
    >>> half("x")
    Traceback (most recent call last):
    ...
    swe_prune.errors.InputError: size must be an integer, got 'x'
    """
    if isinstance(call, type):
        made: Any = call
        made.__init__ = checked(made.__init__)
        return made
    signature, annotations = inspect.signature(call), call.__annotations__
    hints: dict[str, Any] = {}

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        if not hints:  # now, since annotations may name what is defined further down
            given = {name: one for name, one in annotations.items() if name != "return"}
            holder = types.SimpleNamespace(__annotations__=given)
            hints.update(typing.get_type_hints(holder, call.__globals__))  # pyright: ignore
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            # An own default may be a marker that the annotation does not name.
            if name in hints and value is not signature.parameters[name].default:
                kind = signature.parameters[name].kind
                if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                    bound.arguments[name] = _checked(name, value, hints[name], name)
        _check_sizes(bound.arguments, hints)
        try:
            return call(*bound.args, **bound.kwargs)
        except (ValueError, TypeError, AttributeError) as error:
            said = None if isinstance(error, InputError) else _said(error, bound.arguments)
            if said is None:
                raise
            raise InputError(said) from None

    return typing.cast(F, checking)


def _said(error: Exception, given: Mapping[str, Any]) -> str | None:
    """Returns the sentence of an error of JAX that arguments bring about wherever they are used."""
    if isinstance(error, ValueError) and UNSORTED in str(error):
        return (
            "a dict in a pytree has keys that have no order, such as a number and a string; make "
            "the keys of every dict strings"
        )
    # Many calls take shapes alone, and those that do not meet them in their first computation.
    abstract = isinstance(error, TypeError | AttributeError) and ABSTRACT in str(error)
    said = (_abstract(name, value) for name, value in given.items() if abstract)
    return next(filter(None, said), None)


def check_concrete(value: Any, what: str) -> None:
    """Raises InputError for a pytree with shapes in place of arrays, before anything is traced."""
    said = _abstract(what, value)
    if said is not None:
        raise InputError(said)


def _abstract(name: str, value: Any) -> str | None:
    """Returns the sentence of the first leaf that is a shape alone, if there is one."""
    # Iterators are not pytrees, and may be read once.
    leaves = jax.tree.leaves(value, is_leaf=lambda one: isinstance(one, Iterator))
    first = next(filter(is_abstract, leaves), None)
    if first is None:
        return None
    return (
        f"{name} must have arrays with values, got the {ABSTRACT} {told(first)}, which is a shape "
        "alone; give arrays"
    )


def is_abstract(value: Any) -> bool:
    """Returns whether a value has the shape and dtype of an array but no numbers."""
    return isinstance(value, jax.ShapeDtypeStruct)


def _checked(name: str, value: Any, hint: Any, where: str) -> Any:
    """Returns a value that fits an annotation, lists as arrays; else raises the sentence."""
    if isinstance(value, types.ModuleType):  # which has all kinds of attributes
        raise InputError(f"{where} must be a value, got the module {value.__name__}")
    if not _fits(value, hint):
        raise InputError(f"{where} must be {in_words(hint)}, got {told(value)}")
    kinds = typing.get_args(hint) if is_union(hint) else (hint,)
    if isinstance(value, list | tuple) and any(
        is_array(one) and _is_array_of(value, one) for one in kinds
    ):
        return np.asarray(value)
    if not isinstance(value, list | tuple) and getattr(value, "ndim", None) == 1:
        series = [typing.get_args(one)[:1] for one in kinds if typing.get_origin(one) in SERIES]
        if hasattr(value, "tolist") and any(of and of[0] in SCALARS for of in series):
            value = value.tolist()  # whose truth and order are those of numbers
    if isinstance(value, int) and abs(value) >= 2**31 and float in kinds and int not in kinds:
        return float(value)  # a compiled program takes an integer for an int32
    if isinstance(value, str | os.PathLike) and any(
        typing.get_origin(k) is os.PathLike or k is os.PathLike for k in kinds
    ):
        _check_path(os.fspath(value), where)
    if name in RANGES:
        for one in value if isinstance(value, list | tuple) else [value]:
            whole = isinstance(one, numbers.Integral) or _is_scalar(one, int)
            if whole and not _is_tracer(one):
                RANGES[name].check(one, where)
    return value


def _check_path(path: str | bytes, where: str) -> None:
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:  # half of a pair
        raw = b""
    if not raw or b"\0" in raw or max(map(len, raw.split(b"/"))) > _LONGEST_NAME:
        raise InputError(
            f"{where} must be the path of a file or folder, got {shown(path)}; give one"
        )


def _takes(call: Any, number: int) -> bool:
    """Returns whether a function can be called with a number of arguments, as far as it says."""
    try:
        inspect.signature(call).bind(*[None] * number)
    except TypeError:
        return False
    except ValueError:  # it says nothing
        return True
    return True


def _fits(value: Any, hint: Any) -> bool:
    if is_union(hint):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint in SCALARS:
        return _is_scalar(value, hint)
    if is_array(hint):
        return _is_array_of(value, hint)
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str | int | None) and value in of
    if origin is os.PathLike or hint is os.PathLike:
        return isinstance(value, os.PathLike)
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        with_arguments = of and isinstance(of[0], list)
        return callable(value) and (not with_arguments or _takes(value, len(of[0])))
    kind = origin if isinstance(origin, type) else hint
    if not isinstance(kind, type) or kind in (Any, object):
        return True  # Any, type variables
    if getattr(kind, "_is_protocol", False):
        wanted = [name for name in vars(kind) if not name.startswith("_")]
        return not isinstance(value, type) and all(hasattr(value, name) for name in wanted)
    if kind.__module__.startswith("jaxtyping"):  # PyTree
        return True
    if kind.__name__.lower().endswith("array"):  # either library's will do
        texts = ("<U", "|S", "object")
        return has_shape(value) and not str(getattr(value, "dtype", "|S")).startswith(texts)
    if issubclass(kind, Mapping):
        key, inner = of or (Any, Any)
        return isinstance(value, Mapping) and all(
            _fits(name, key) and _fits(one, inner) for name, one in value.items()
        )
    if issubclass(kind, tuple) and of:
        every = of[-1] is Ellipsis
        fits = isinstance(value, tuple | list) and (every or len(value) == len(of))
        return fits and all(map(_fits, value, itertools.cycle(of[:1]) if every else of))
    if kind in SERIES:
        return _is_series(value, kind, of[0] if of else Any)
    return isinstance(value, kind)


def _is_series(value: Any, kind: Any, inner: Any) -> bool:
    """Returns whether a value is a sequence, or what iterates, of members of a kind."""
    if isinstance(value, str | bytes) or is_abstract(value):
        return False
    if getattr(value, "ndim", None) is not None:
        if inner in SCALARS:
            return value.ndim == 1 and _fits(value[:1].tolist(), list[inner])
        return value.ndim > 0 and (is_array(inner) or _fits(object, inner))
    if kind is collections.abc.Iterable:
        if not isinstance(value, collections.abc.Iterable) and not hasattr(value, "__getitem__"):
            return False
        if not isinstance(value, collections.abc.Collection):
            return not isinstance(value, type)  # a generator is not used up
    elif isinstance(value, Mapping) or not (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, type)
    ):
        return False
    return all(_fits(one, inner) for one in value)


def _is_scalar(value: Any, kind: type) -> bool:
    """Returns whether a value is of one of the four kinds, also as an array without axes."""
    if kind is str:
        return isinstance(value, str)
    name = "" if is_abstract(value) else str(getattr(value, "dtype", ""))
    if name and getattr(value, "ndim", None) == 0:
        if kind is bool or name == "bool":
            return kind is bool and name == "bool"
        if "int" not in name and not (kind is float and "float" in name):
            return False
        if not hasattr(value, "item") or _is_tracer(value):
            return True
        value = value.item()
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and abs(int(value)) <= _LARGEST
    # A number beyond float32 overflows in a compiled program.
    number: Any = value if isinstance(value, numbers.Real) else math.nan
    return bool(abs(number) <= bounds.POSITIVE.most)


def _is_tracer(value: Any) -> bool:
    return isinstance(value, Tracer)


def _is_array_of(value: Any, hint: Any) -> bool:
    """Returns whether a value is an array of the dtypes and number of axes of an annotation."""
    if isinstance(value, list | tuple | numbers.Number):
        try:
            value = np.asarray(value)
        except (ValueError, TypeError, OverflowError):  # rows of different lengths
            return False
    if not has_shape(value) or not hasattr(value, "dtype"):
        return False
    if is_abstract(value) and not value.shape:  # a condition or a count, whose value is read
        return False
    name, wanted = str(value.dtype), hint.dtypes
    kinds = ("bool", "int", "float", "key")
    kind = next((one for one in kinds if one in name), name)
    if isinstance(wanted, list | tuple):
        allowed = {one for one in kinds for text in wanted if one in str(text)}
        if "float" in allowed:
            allowed.add("int")  # whole numbers do where others do
        # No numbers are of any dtype, but where one alone will do, as that of a random key.
        empty = not value.size and len(wanted) > 1
        if kind not in allowed and not empty:
            return False
    axes = hint.dim_str.split()
    if any(axis.startswith("*") or axis == "..." for axis in axes):
        return len(value.shape) >= sum(not (a.startswith("*") or a == "...") for a in axes)
    return len(value.shape) == len(axes)


def _check_sizes(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raises InputError where two axes of one letter, as in (R, C) and (R, R), differ in size."""
    known: dict[str, tuple[int, str]] = {}
    for name, value in given.items():
        hint = hints.get(name)
        kinds: tuple[Any, ...] = typing.get_args(hint) if is_union(hint) else (hint,)
        letters = next((one.dim_str.split() for one in kinds if is_array(one)), [])
        shape = getattr(value, "shape", None)
        if not isinstance(shape, tuple) or any(axis.startswith("*") for axis in letters):
            continue
        ends = len(letters) - letters.index("...") - 1 if "..." in letters else len(letters)
        for letter, size in zip(letters[len(letters) - ends :], shape[len(shape) - ends :],
                                strict=False):  # fmt: skip
            if letter.isidentifier() and known.setdefault(letter, (size, name))[0] != size:
                before, where = known[letter]
                raise InputError(
                    f"{name} must have shape ({', '.join(letters)}) with {letter} = {before} as in "
                    f"{where}, got {tuple(shape)}"
                )
