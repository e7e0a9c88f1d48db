"""Writing of safetensors files one tensor at a time; the package needs all of them in memory.

Source: https://github.com/huggingface/safetensors (the format: eight bytes of length, a JSON header
with the offsets of the tensors, and the tensors).
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from swe_prune.errors import InputError
from swe_prune.interop.folder_files import INDEX, WEIGHTS
from swe_prune.interop.safetensors_header import DTYPES
from swe_prune.interop.slices import StoredTensor

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
    sizes = [math.prod(one.shape) * dtype(one).itemsize for one in tensors]
    shards = list(_shards(tensors, sizes, shard_bytes))
    if len(shards) == 1:
        _write(folder / WEIGHTS, shards[0], dtype, values)
        return
    listed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard, dtype, values)
        listed |= {one.name: name for one in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": listed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Sequence[StoredTensor], sizes: Sequence[int], shard_bytes: int
) -> Iterator[list[StoredTensor]]:
    shard, filled = [], 0
    for one, size in zip(tensors, sizes, strict=True):
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(one)
        filled += size
    yield shard


def _write(
    path: Path,
    tensors: Sequence[StoredTensor],
    dtype: Callable[[StoredTensor], np.dtype],
    values: Callable[[StoredTensor], np.ndarray],
) -> None:
    # The header contains all offsets, so it is computed before any tensor is written.
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in tensors:
        if dtype(one).name not in names:
            raise InputError(
                f"{one.name!r} is {dtype(one).name}, which is not supported; "
                f"convert the parameters to one of {', '.join(names)}"
            )
        start, end = end, end + math.prod(one.shape) * dtype(one).itemsize
        header[one.name] = {
            "dtype": names[dtype(one).name],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Pad the header, then write the tensors one at a time.
    encoded += b" " * (-len(encoded) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for one in tensors:
            array = np.ascontiguousarray(values(one), dtype(one).newbyteorder("<"))
            file.write(array.view(np.uint8).data if array.size else b"")
