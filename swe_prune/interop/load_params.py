"""A checkpoint's tensors to parameters, one at a time, each straight to its sharding."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.errors import InputError
from swe_prune.interop.slices import ParamSlice, Shape, StoredTensor, nested
from swe_prune.interop.tensor_names import Table

Shardings = Callable[[str, Shape], jax.sharding.Sharding] | PyTree | None
"""Of the parameters: a function of name and shape, a pytree like them, or None: one device."""

PARAM_DTYPES = ("float32", "bfloat16", "float16")
_SHOWN = 3  # names in a sentence
_CHUNK = 1 << 22  # numbers that two tensors are compared by at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says of a tensor before it is read: shape and dtype, by our names for them."""

    shape: Shape
    dtype: str


class Source(Protocol):
    """A checkpoint's tensors by name."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is."""
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Gives a tensor to be sliced; what comes of it is no view of the file."""
        ...


def match(
    source: Source,
    bound: Sequence[StoredTensor],
    table: Table,
    duplicates: Mapping[str, str],
    where: str,
) -> dict[str, str]:
    """Returns the name in the file of each stored tensor; all is checked before any is read.

    Args:
        source: the checkpoint.
        bound: what the model needs.
        table: the names of this kind of file.
        duplicates: names of copies that are allowed, and of what they must equal.
        where: names the checkpoint in a sentence.

    Raises:
        InputError: a tensor is missing, of another shape or dtype, or there is one that the model
            has no place for.
    """
    entries = source.entries
    bare = bool(table.prefix) and not any(name.startswith(table.prefix) for name in entries)
    names = {one.name: one.name.removeprefix(table.prefix) if bare else one.name for one in bound}
    missing = [name for name in names.values() if name not in entries]
    if missing:
        raise InputError(
            f"{where} lacks {_listed(missing)} of this model's {len(bound)} tensors; get it again, "
            "or correct its config"
        )
    copies = {name.removeprefix(table.prefix) if bare else name for name in duplicates}
    known = copies | set(names.values())
    unexpected = [
        name
        for name in entries
        if name not in known and not any(re.search(rule, name) for rule in table.ignored)
    ]
    if unexpected:
        raise InputError(
            f"{where} has {_listed(unexpected)}, which this model has no place for; "
            "correct its config, or remove what is no part of the model"
        )
    for one in bound:
        _check(entries[names[one.name]], one, where)
    for copy, original in duplicates.items():
        if copy in entries:
            _check_equal(source, copy, names[original], where)
    return names


def read_params(
    source: Source,
    bound: Sequence[StoredTensor],
    names: Mapping[str, str],
    dtype: str | None,
    shardings: Shardings,
) -> dict[str, Any]:
    """Returns the parameters as a nested dict; beside them one stored tensor is held at a time.

    Args:
        source: the checkpoint.
        bound: what the model needs.
        names: the name in the file of each.
        dtype: of the parameters; None: as stored.
        shardings: where they go; of a divided parameter each device's slice alone is read.

    Raises:
        InputError: an unknown dtype, or shardings of another structure.
    """
    if dtype is not None and dtype not in PARAM_DTYPES:
        raise InputError(f"dtype = {dtype!r} is unknown; choose {', '.join(PARAM_DTYPES)} or None")
    sharding_of = _by_name(shardings)
    params = {}
    for one in bound:
        with source.open(names[one.name]) as stored:
            for part in one.parts:
                params[part.name] = _placed(part, stored, dtype, sharding_of)
    return nested(params)


def _placed(
    part: ParamSlice,
    stored: Any,
    dtype: str | None,
    sharding_of: Callable[[str, Shape], jax.sharding.Sharding | None],
) -> Array:
    whole = (slice(None),) * len(part.shape)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        values = part.read(stored, whole if index is None else index)
        wanted = values.dtype if dtype is None else jnp.dtype(dtype)
        return np.ascontiguousarray(values, wanted)

    sharding = sharding_of(part.name, part.shape)
    if sharding is None:
        placed = jnp.asarray(read(whole))
    else:
        placed = jax.make_array_from_callback(part.shape, sharding, read)
    return placed.block_until_ready()  # or the copies on the host would queue up behind the reader


def _by_name(shardings: Shardings) -> Callable[[str, Shape], Any]:
    if shardings is None or callable(shardings):
        return shardings or (lambda name, shape: None)
    leaves = dict(tree.named_leaves(shardings))

    def of(name: str, shape: Shape) -> Any:
        if name not in leaves:
            raise InputError(
                f"the shardings have none for {name!r}; give a pytree like the parameters, with "
                "None for the default device, or a function of name and shape"
            )
        return leaves[name]

    return of


def _check(entry: Entry, one: StoredTensor, where: str) -> None:
    if entry.shape != one.shape:
        raise InputError(
            f"{where} has {one.name!r} of the shape {entry.shape} and its config asks for "
            f"{one.shape}; get it again, or correct its config"
        )
    if entry.dtype not in PARAM_DTYPES:
        raise InputError(
            f"{where} has {one.name!r} as {entry.dtype}, which is not supported; "
            f"supported are {', '.join(PARAM_DTYPES)}"
        )


def _check_equal(source: Source, copy: str, original: str, where: str) -> None:
    first, second = source.entries[copy], source.entries[original]
    same = first == second
    if same:
        rows = max(1, _CHUNK // max(1, first.shape[-1]))
        with source.open(copy) as one, source.open(original) as two:
            for start in range(0, first.shape[0], rows):
                part = slice(start, min(start + rows, first.shape[0])), slice(0, first.shape[1])
                same = same and np.array_equal(one[part], two[part])
    if not same:
        raise InputError(
            f"{where} has {copy!r} that differs from {original!r}, and its config says that the "
            "two are one; set tie_word_embeddings to false in its config"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
