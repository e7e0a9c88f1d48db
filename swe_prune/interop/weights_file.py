"""Writing of safetensors files one tensor at a time; the package needs all of them in memory.

Source: https://github.com/huggingface/safetensors (the format: eight bytes of length, a JSON header
with the offsets of the tensors, and the tensors).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from swe_prune.errors import InputError
from swe_prune.interop.folder_files import INDEX, WEIGHTS
from swe_prune.interop.safetensors_header import DTYPES
from swe_prune.interop.slices import Shape, StoredTensor
from swe_prune.interop.stranger_files import write_json

METADATA = {"format": "pt"}
_ALIGNED = 8  # the length of the header is a multiple of this


def write_folder(
    folder: Path,
    tensors: Sequence[StoredTensor],
    dtype: Callable[[StoredTensor], np.dtype],
    values: Callable[[StoredTensor], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes model.safetensors, or shards and their index if one file would be too large.

    Args:
        folder: Existing folder to write to.
        tensors: Tensors to write, in this order.
        dtype: Function from a tensor to its dtype.
        values: Function from a tensor to its values, called once per tensor.
        shard_bytes: Maximal size in bytes of a shard; a larger tensor has its own shard.

    Raises:
        InputError: If safetensors does not support a dtype.
    """
    pieces = pieces_of(tensors, dtype, values)
    shards = list(_shards(pieces, shard_bytes))
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0], METADATA)
        return
    listed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, METADATA)
        listed |= {one.name: name for one in shard}
    index = {"metadata": {"total_size": sum(one.size for one in pieces)}, "weight_map": listed}
    write_json(folder / INDEX, index)


def pieces_of(
    tensors: Sequence[StoredTensor],
    dtype: Callable[[StoredTensor], np.dtype],
    values: Callable[[StoredTensor], np.ndarray],
) -> list["Piece"]:
    """Returns the tensors of a model as pieces of a file."""
    return [
        Piece(one.name, dtype(one), one.shape, functools.partial(values, one)) for one in tensors
    ]


def _shards(pieces: Sequence["Piece"], shard_bytes: int) -> Iterator[list["Piece"]]:
    shard, filled = [], 0
    for one in pieces:
        if shard and filled + one.size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(one)
        filled += one.size
    yield shard


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a file.

    Attributes:
        name: Name in the file.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
        values: Function that returns the array, called when it is written.
    """

    name: str
    dtype: np.dtype
    shape: Shape
    values: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, of which one tensor at a time is in memory.

    Raises:
        InputError: If safetensors does not support a dtype.
    """
    # The header contains all offsets, so it is computed before any tensor is written.
    names = {ours: theirs for theirs, ours in DTYPES.items()} | {"uint8": "U8"}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for one in pieces:
        if one.dtype.name not in names:
            raise InputError(
                f"{one.name!r} is {one.dtype.name}, which is not supported; "
                f"convert the parameters to one of {', '.join(DTYPES.values())}"
            )
        start, end = end, end + one.size
        header[one.name] = {
            "dtype": names[one.dtype.name],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Pad the header, then write the tensors one at a time.
    encoded += b" " * (-len(encoded) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for one in pieces:
            array = np.ascontiguousarray(one.values(), one.dtype.newbyteorder("<"))
            file.write(array.view(np.uint8).data if array.size else b"")
