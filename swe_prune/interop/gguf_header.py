"""Headers of GGUF files: settings, and where each tensor lies; all held against the file's size.

The package `gguf` makes two arrays for every text of a vocabulary, which takes seconds, and loops
over whatever lengths a file gives; a header is read here in one pass.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from swe_prune.errors import InputError
from swe_prune.interop.stranger_files import LARGEST, check_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_MOST_AXES = 4
_ALIGNMENT = "general.alignment"


@dataclasses.dataclass(frozen=True)
class StoredIn:
    """Where a tensor lies.

    Attributes:
        shape: From the slowest axis to the fastest; a GGUF file lists them the other way round.
        kind: Number of its `GGMLQuantizationType`.
        start: Position of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


class Damaged(ValueError):
    """What the header says cannot be in a file of this size."""


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredIn]]:
    """Returns the settings by key, and the places of the tensors by name.

    Raises:
        InputError: The file is not GGUF, is of another version or byte order, or is truncated or
            damaged.
    """
    size = check_file(path, None).stat().st_size
    if size < len(MAGIC) or (mapped := np.memmap(path, np.uint8, "r"))[:4].tobytes() != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")
    cursor = _Cursor(mapped.data)
    try:
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise InputError(
                f"{path} is GGUF of version {version}, which is not supported; supported are "
                f"{', '.join(map(str, VERSIONS))} in little-endian order: convert it again"
            )
        tensors, settings = cursor.scalar("Q"), cursor.scalar("Q")
        fields = dict(cursor.field() for _ in cursor.up_to(settings, 13))
        places = [cursor.tensor() for _ in cursor.up_to(tensors, 24)]
        alignment = fields.get(_ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise Damaged(f"{_ALIGNMENT} is {alignment!r}")
        off = next((name for name, one in places if one.start % alignment), None)
        if off is not None:
            raise Damaged(f"{off!r} does not begin at a multiple of {alignment}")
        if len(dict(places)) < tensors or len(fields) < settings:
            raise Damaged("a name is there twice")
    except (Damaged, struct.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is truncated or damaged: its header does not fit its {size:,} bytes "
            f"({error}); download it again"
        ) from None
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: dataclasses.replace(one, start=start + one.start) for name, one in places}


class _Cursor:
    """A position in a file that never goes beyond its end."""

    def __init__(self, data: memoryview):
        self._data, self.at = data, len(MAGIC)

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self._data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def up_to(self, count: int, least: int) -> range:
        """Returns a range of so many elements that each take at least so many bytes."""
        if count * least > min(len(self._data) - self.at, LARGEST):
            raise Damaged(f"{count:,} elements at byte {self.at:,}")
        return range(count)

    def text(self) -> str:
        length = self.scalar("Q")
        self.up_to(length, 1)
        self.at += length
        return str(self._data[self.at - length : self.at], "utf-8")

    def field(self) -> tuple[str, Any]:
        key = self.text()
        kind = self.scalar("I")
        try:
            return key, self._values() if kind == _ARRAY else self._value(kind)
        except UnicodeDecodeError as error:
            raise Damaged(f"{key!r} is not UTF-8: {error}") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise Damaged(f"a value of the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _values(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.text() for _ in self.up_to(count, 8)]
        if kind not in _SCALARS:  # arrays of arrays among them, which no model has
            raise Damaged(f"an array of the unknown type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        self.up_to(count, dtype.itemsize)
        found = np.frombuffer(self._data, dtype, count, self.at)
        self.at += count * dtype.itemsize
        return found.tolist()

    def tensor(self) -> tuple[str, StoredIn]:
        name, axes = self.text(), self.scalar("I")
        if axes > _MOST_AXES:
            raise Damaged(f"{name!r} has {axes} axes")
        shape = tuple(reversed([self.scalar("Q") for _ in range(axes)]))
        if math.prod(shape) >= 1 << 63 or max(shape, default=0) >= 1 << 63:
            raise Damaged(f"{name!r} has the shape {shape}")
        return name, StoredIn(shape, self.scalar("I"), self.scalar("Q"))
