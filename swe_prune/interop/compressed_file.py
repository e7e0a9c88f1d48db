"""Weights without their zeros: a safetensors file of bitmaps and values.

A tensor NAME of n elements is stored as two, if that is smaller, and as it is otherwise:

    NAME.bitmap   uint8 [ceil(n / 8)]   a bit for each element in row-major order, the first in the
                                        highest bit (`numpy.packbits`): 1 where it is stored
    NAME.values   [number of ones]      the stored elements in this order, in the tensor's dtype

An element is left out if all its bits are 0, so the others, -0.0 and NaN among them, come back bit
for bit. The header's metadata has `format`, and in `shapes` the shape of each NAME as JSON. With a
share s of zeros a float32 tensor takes 1 - s + 1/32 of its size, one of 16 bits 1 - s + 1/16.

Writing and reading keep one tensor at a time in memory.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swe_prune.errors import InputError
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require
from swe_prune.interop.safetensors_header import Header
from swe_prune.interop.weights_file import Piece, write_file

FORMAT = "swe_prune.compressed.1"
BITMAP, VALUES = ".bitmap", ".values"


def write_compressed(path: Path, pieces: Sequence[Piece]) -> None:
    """Writes the tensors without their zeros; each is made twice, to be counted and to be written.

    Raises:
        InputError: If safetensors does not support a dtype.
    """
    shapes, written = {}, []
    for one in pieces:
        stored = int(np.count_nonzero(_bits(one.values())))
        size = math.prod(one.shape)
        if stored * one.dtype.itemsize + -(-size // 8) >= one.size:
            written.append(one)
            continue
        shapes[one.name] = list(one.shape)
        written += [
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
    write_file(path, written, {"format": FORMAT, "shapes": json.dumps(shapes)})


def check_compressed(header: Header) -> dict[str, Entry]:
    """Returns the shape and dtype of each tensor of a file, checked against the file's header.

    Raises:
        InputError: If the file is of another kind, or a bitmap or values do not fit a shape.
    """
    where = header.path
    if header.metadata.get("format") != FORMAT:
        raise InputError(f"{where} is not a {FORMAT} file; export the model again")
    try:
        shapes = json.loads(header.metadata["shapes"])
        shapes = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise InputError(f"{where} has no list of shapes in its header; export it again") from None
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


def decompressed(path: Path, name: str, entry: Entry) -> np.ndarray:
    """Returns one tensor of a file whose header was checked.

    Raises:
        InputError: If the bitmap has another number of ones than there are values.
    """
    safetensors = require("safetensors", "reading safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        if name in file.keys():  # noqa: SIM118 (not a mapping)
            return file.get_tensor(name)
        packed, values = file.get_tensor(name + BITMAP), file.get_tensor(name + VALUES)
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
