"""Loading of stored tensors as parameters, one at a time, directly with their shardings."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.errors import InputError, check_choice, listed
from swe_prune.interop.slices import ParamSlice, Shape, StoredTensor
from swe_prune.interop.tensor_rows import Table

Shardings = Callable[[str, Shape], jax.sharding.Sharding] | PyTree | None
"""Shardings of parameters: function of name and shape, pytree, or None for the default device."""

PARAM_DTYPES = ("float32", "bfloat16", "float16")
_CHUNK = 1 << 22  # numbers to compare at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """Shape and dtype of a stored tensor, known before it is read."""

    shape: Shape
    dtype: str


class Source(Protocol):
    """Stored tensors of a pretrained model by name."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape and dtype of each tensor by name."""
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Yields a tensor that can be sliced; slices are copies, not views of the file."""
        ...


def match(
    source: Source,
    bound: Sequence[StoredTensor],
    table: Table,
    duplicates: Mapping[str, str],
    where: str,
) -> dict[str, str]:
    """Returns the name in the file of each stored tensor, checking all before any is read.

    Args:
        source: Stored tensors of the model.
        bound: Stored tensors that the model needs.
        table: Table of names for this kind of file.
        duplicates: Allowed copies of tensors, as a mapping from the copy to the tensor it must
            equal.
        where: Description of the source for error messages.

    Raises:
        InputError: If a tensor is missing, unexpected, or has another shape or dtype.
    """
    entries = source.entries
    # Files of the bare model, without its head, omit the prefix of all names.
    bare = bool(table.prefix) and not any(name.startswith(table.prefix) for name in entries)
    names = {one.name: one.name.removeprefix(table.prefix) if bare else one.name for one in bound}
    # Of a tied pair, a file may have either name or both.
    alone = [
        (copy, original)
        for copy, original in duplicates.items()
        if copy in entries and names[original] not in entries
    ]
    names |= {original: copy for copy, original in alone}
    duplicates = {copy: original for copy, original in duplicates.items() if not alone}
    missing = [name for name in names.values() if name not in entries]
    if missing:
        raise InputError(
            f"{where} lacks {listed(missing)} of this model's {len(bound)} tensors; download it "
            "again, or correct its config"
        )
    # Other tensors are errors, except known copies and buffers without parameters.
    copies = {name.removeprefix(table.prefix) if bare else name for name in duplicates}
    known = copies | set(names.values())
    unexpected = [
        name
        for name in entries
        if name not in known and not any(re.search(rule, name) for rule in table.ignored)
    ]
    if unexpected:
        raise InputError(
            f"{where} has {listed(unexpected)}, which is not part of this model; "
            "correct its config, or remove it"
        )
    # Shapes and dtypes come from the headers; only copies are compared by value.
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
    """Reads the parameters into a nested dict, with one stored tensor at a time in memory.

    Args:
        source: Stored tensors of the model.
        bound: Stored tensors that the model needs.
        names: Name in the file of each stored tensor, from `match`.
        dtype: Dtype of the parameters. If None, as stored.
        shardings: Shardings of the parameters; of a sharded parameter only the devices' slices are
            read.

    Raises:
        InputError: If the dtype is unknown, or the shardings have another structure.
    """
    check_choice(dtype, (*PARAM_DTYPES, None), "dtype")
    sharding_of = _by_name(shardings)
    params: dict[str, Any] = {}
    copies: dict[str, list[tuple[str, ParamSlice]]] = {}
    for one in bound:
        if one.parts[0].copy is not None:
            for part in one.parts:
                copies.setdefault(part.name, []).append((names[one.name], part))
            continue
        with source.open(names[one.name]) as stored:
            opened = one.opened(stored)
            for part in one.parts:
                read = functools.partial(part.read, opened)
                params[part.name] = _to_device(read, part.name, part.shape, dtype, sharding_of)
    # Parameters with a tensor for each index of their first axis, such as an expert.
    for name, parts in copies.items():
        shape = (len(parts), *parts[0][1].shape)
        read = functools.partial(_stacked, source, parts)
        params[name] = _to_device(read, name, shape, dtype, sharding_of)
    return tree.nested({one.name: params[one.name] for tensor in bound for one in tensor.parts})


def _stacked(
    source: Source, parts: Sequence[tuple[str, ParamSlice]], index: tuple[slice, ...]
) -> np.ndarray:
    """Returns a slice of a parameter whose first axis is over stored tensors."""
    read = []
    for name, part in parts[index[0]]:
        with source.open(name) as stored:
            read.append(part.read(stored, index[1:]))
    return np.stack(read)


def _to_device(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    name: str,
    shape: Shape,
    dtype: str | None,
    sharding_of: Callable[[str, Shape], jax.sharding.Sharding | None],
) -> Array:
    whole = (slice(None),) * len(shape)

    def values(index: tuple[slice, ...] | None) -> np.ndarray:
        found = read(whole if index is None else index)
        wanted = found.dtype if dtype is None else jnp.dtype(dtype)
        return np.ascontiguousarray(found, wanted)

    sharding = sharding_of(name, shape)
    if sharding is None:
        param = jnp.asarray(values(whole))
    else:
        param = jax.make_array_from_callback(shape, sharding, values)
    return param.block_until_ready()  # otherwise host copies queue up behind the reader


def _by_name(shardings: Shardings) -> Callable[[str, Shape], Any]:
    if shardings is None or callable(shardings):
        return shardings or (lambda name, shape: None)
    leaves = dict(tree.named_leaves(shardings))

    def of(name: str, shape: Shape) -> Any:
        if name not in leaves:
            raise InputError(
                f"the shardings lack {name!r}; give a pytree like the parameters, with "
                "None for the default device, or a function of name and shape"
            )
        return leaves[name]

    return of


def _check(entry: Entry, one: StoredTensor, where: str) -> None:
    if entry.shape != one.shape:
        raise InputError(
            f"{where} has {one.name!r} of shape {entry.shape} and its config requires "
            f"{one.shape}; download it again, or correct its config"
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
        # Compare in chunks, so that neither tensor is in memory as a whole.
        rows = max(1, _CHUNK // max(1, first.shape[-1]))
        with source.open(copy) as one, source.open(original) as two:
            for start in range(0, first.shape[0], rows):
                part = slice(start, min(start + rows, first.shape[0])), slice(0, first.shape[1])
                same = same and np.array_equal(one[part], two[part])
    if not same:
        raise InputError(
            f"{where} has {copy!r} that differs from {original!r}, but its config says that they "
            "are tied; set tie_word_embeddings to false in its config"
        )
