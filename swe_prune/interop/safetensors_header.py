"""Headers of safetensors files: what is in a file and where, checked before a tensor is read.

Source: https://github.com/huggingface/safetensors (the format: eight bytes of length, a JSON
header, the data).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swe_prune.errors import InputError, reading
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require
from swe_prune.interop.stranger_files import LARGEST, check_file, parse_json

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of dtypes in the header, and ours; others are named as they are."""

_LENGTH = 8  # bytes that the header's length takes
_CHUNK = 1 << 22  # bytes to compare at a time


@dataclasses.dataclass(frozen=True)
class Header:
    """Tensors of one file.

    Attributes:
        path: Path of the file.
        entries: Shape and dtype of each tensor by name.
        places: Position of the first byte and of the end of each tensor in the file, by name.
        metadata: Texts that the file has about itself.
    """

    path: Path
    entries: Mapping[str, Entry]
    places: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Returns the header of a file, after checking that the file is complete.

    Raises:
        InputError: If the file cannot be read, is truncated or damaged, or is not safetensors.
    """
    size = check_file(path, None).stat().st_size
    with reading(path, "see to its rights"), open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        raw = file.read(length) if length <= min(size - _LENGTH, LARGEST) else None
    if length > LARGEST:
        raise InputError(
            f"{path} says that its header has {length:,} bytes, which is not a header of "
            "safetensors; get it again"
        )
    if raw is None:
        raise InputError(
            f"{path} ends within its header, after {size:,} bytes: it is truncated, or no "
            "safetensors; get it again"
        )
    start = _LENGTH + length
    header = parse_json(raw, f"the header of {path}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path} has {_shown(metadata)} as its metadata; get it again")
    entries, places, end = {}, {}, 0
    for name, one in header.items():
        if not _is_entry(one) or "\0" in name:
            raise InputError(
                f"{path} has {name!r} in its header, with {_shown(one)}, which is not a tensor of "
                "safetensors; get it again"
            )
        dtype: str = one["dtype"]
        entries[name] = Entry(tuple(one["shape"]), DTYPES.get(dtype, dtype))
        first, last = one["data_offsets"]
        places[name] = (start + first, start + last)
        end = max(end, last)
    if size < start + end:
        raise InputError(
            f"{path} is truncated: it has {size:,} of {start + end:,} bytes; get it again"
        )
    _check_opens(path)
    return Header(path, entries, places, metadata)


def first_difference(one: Header, others: Mapping[str, Header]) -> str | None:
    """Returns the name of the first tensor that differs between two sets of files, or None.

    Args:
        one: Header of a file with all tensors.
        others: Header of the other file with each tensor, by the tensor's name.
    """
    names = [*one.entries, *(name for name in others if name not in one.entries)]
    for name in names:
        if name not in others or others[name].entries[name] != one.entries.get(name):
            return name
    return next((name for name in names if not _same_bytes(name, one, others[name])), None)


def _same_bytes(name: str, one: Header, other: Header) -> bool:
    (start, stop), (begin, _) = one.places[name], other.places[name]
    if one.path == other.path:
        return True
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(start)
        second.seek(begin)
        for left in range(stop - start, 0, -_CHUNK):  # in chunks, since a tensor may be large
            count = min(left, _CHUNK)
            if first.read(count) != second.read(count):
                return False
    return True


def _is_entry(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("dtype"), str):
        return False
    shape, offsets = one.get("shape"), one.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    numbers = [*shape, *offsets]
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _shown(one: Any) -> str:
    return f"{one!r:.80}"


def _check_opens(path: Path) -> None:
    safetensors = require("safetensors", "reading safetensors")
    with reading(path), safetensors.safe_open(path, framework="numpy"):
        pass
