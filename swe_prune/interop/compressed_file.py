"""Weights without their zeros: a safetensors file of bitmaps and values.

A tensor NAME of n elements is stored as two, if that is smaller, and as it is otherwise:

    NAME.bitmap   uint8 [ceil(n / 8)]   a bit for each element in row-major order, the first in the
                                        highest bit (`numpy.packbits`): 1 where it is stored
    NAME.values   [number of ones]      the stored elements in this order, in the tensor's dtype

An element is left out if all its bits are 0, so the others, -0.0 and NaN among them, come back bit
for bit. The header's metadata has `format`, and as JSON in `shapes` the shape of each NAME and in
`checksums` the CRC-32 of each stored tensor, since a bit that changes in a bitmap or in a value is
another model. With a share s of zeros a float32 tensor takes 1 - s + 1/32 of its size, one of 16
bits 1 - s + 1/16.

Writing and reading keep one tensor at a time in memory.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swe_prune.errors import InputError, reading, shown
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require
from swe_prune.interop.safetensors_header import Header
from swe_prune.interop.stranger_files import parse_json
from swe_prune.interop.weights_file import Piece, write_file
from swe_prune.runtime import storage

FORMAT = "swe_prune.compressed.1"
BITMAP, VALUES = ".bitmap", ".values"


def write_compressed(path: Path, pieces: Sequence[Piece]) -> None:
    """Writes the tensors without their zeros; each is made twice, to be counted and to be written.

    Raises:
        InputError: If safetensors does not support a dtype.
    """
    shapes, checksums, written = {}, {}, []
    for one in pieces:
        values = one.values()
        kept = _bits(values) != 0
        stored = int(np.count_nonzero(kept))
        size = math.prod(one.shape)
        if stored * one.dtype.itemsize + -(-size // 8) >= one.size:
            written.append(one)
            checksums[one.name] = storage.checksum_of({"": values})
            continue
        shapes[one.name] = list(one.shape)
        parts = [
            Piece(
                one.name + BITMAP,
                np.dtype(np.uint8),
                (-(-size // 8),),
                lambda one=one: np.packbits(_bits(one.values()) != 0),
            ),
            Piece(
                one.name + VALUES,
                one.dtype,
                (stored,),
                lambda one=one: (found := one.values()).reshape(-1)[_bits(found) != 0],
            ),
        ]
        written += parts
        checksums[parts[0].name] = storage.checksum_of({"": np.packbits(kept)})
        checksums[parts[1].name] = storage.checksum_of({"": values.reshape(-1)[kept]})
    about = {"shapes": shapes, "checksums": checksums}
    write_file(path, written, {"format": FORMAT, **{k: json.dumps(v) for k, v in about.items()}})


def check_compressed(header: Header) -> dict[str, Entry]:
    """Returns the shape and dtype of each tensor of a file, checked against the file's header.

    Raises:
        InputError: If the file is of another kind, or a bitmap or values do not fit a shape.
    """
    where = header.path
    if header.metadata.get("format") != FORMAT:
        raise InputError(f"{where} is not a {FORMAT} file; export the model again")
    shapes = _listed(header, "shapes")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise InputError(
                f"{where} has {shown(shape)} as the shape of {name!r}; export the model again"
            )
        shapes[name] = tuple(shape)
    entries = dict(header.entries)
    for name, shape in shapes.items():
        bitmap, values = (entries.pop(name + end, None) for end in (BITMAP, VALUES))
        size = math.prod(shape)
        if bitmap is None or values is None or name in entries:
            raise InputError(
                f"{where} must have {name!r} as a bitmap and values; export the model again"
            )
        fits = bitmap == Entry((-(-size // 8),), "U8") and min(shape, default=0) >= 0
        if not fits or len(values.shape) != 1 or values.shape[0] > size:
            raise InputError(
                f"{where} is damaged: the bitmap or the values of {name!r} do not fit its shape "
                f"{shape}; export the model again"
            )
        entries[name] = Entry(shape, values.dtype)
    return entries


def _listed(header: Header, key: str) -> dict[str, Any]:
    text = header.metadata.get(key)
    if not isinstance(text, str):
        raise InputError(f"{header.path} has no {key} in its header; export the model again")
    return parse_json(text, f"{header.path}, {key} in its header,", "export the model again")


def checksums_of(header: Header) -> dict[str, Any]:
    """Returns the checksum of each stored tensor by name; of a file of an early version, none.

    Raises:
        InputError: If they cannot be read.
    """
    return _listed(header, "checksums") if "checksums" in header.metadata else {}


def decompressed(
    path: Path, name: str, entry: Entry, checksums: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Returns one tensor of a file whose header was checked.

    Args:
        path: Path of the file.
        name: Name of the tensor.
        entry: Shape and dtype of the tensor.
        checksums: Result of `checksums_of`.

    Raises:
        InputError: If the stored numbers were changed after they were written.
    """
    safetensors = require("safetensors", "reading safetensors")
    with reading(path), safetensors.safe_open(path, framework="numpy") as file:
        whole = name in file.keys()  # noqa: SIM118 (not a mapping)
        stored = [name] if whole else [name + BITMAP, name + VALUES]
        arrays = [file.get_tensor(one) for one in stored]
    for one, array in zip(stored, arrays, strict=True):
        if checksums and checksums.get(one) != storage.checksum_of({"": array}):
            raise InputError(
                f"{path} is damaged: {one!r} was changed after it was written; export the model "
                "again"
            )
    if whole:
        return arrays[0]
    packed, values = arrays
    size = math.prod(entry.shape)
    ones = int(np.bitwise_count(packed).sum())  # those in the padding included, which has none
    kept = np.unpackbits(packed, count=size).view(bool)
    if ones != len(values) or np.count_nonzero(kept) != ones:
        raise InputError(
            f"{path} is damaged: the bitmap of {name!r} has {ones:,} ones for {len(values):,} "
            "values; export the model again"
        )
    whole = np.zeros(size, values.dtype)
    whole[kept] = values
    return whole.reshape(entry.shape)


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the elements as unsigned integers of the same bits, flat."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.dtype(f"uint{8 * flat.dtype.itemsize}"))
