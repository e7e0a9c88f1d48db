"""A Hugging Face folder: the tensors in model.safetensors or in its shards.

Everything that can be seen to be wrong is seen from the headers, before a tensor is read. A tensor
is read through a mapping of its own, so that what was read does not stay in memory.

Source: https://github.com/huggingface/transformers, modeling_utils.py (which file is read where
there are several).
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swe_prune.errors import InputError, reading
from swe_prune.interop.compressed_file import check_compressed, checksums_of, decompressed
from swe_prune.interop.folder_files import (
    ADAPTER,
    COMPRESSED,
    INDEX,
    WEIGHTS,
    indexed,
    shards,
    stray_shards,
)
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require
from swe_prune.interop.safetensors_header import Header, first_difference, read_header


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors of a folder; a `load_params.Source`.

    Attributes:
        path: Path of the folder.
        entries: Shape and dtype of each tensor by name.
        files: File of each tensor by name.
        checksums: Checksums of weights without their zeros.
    """

    path: Path
    entries: Mapping[str, Entry]
    files: Mapping[str, Path]
    checksums: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Yields a tensor that can be sliced by one slice for each axis."""
        safetensors = require("safetensors", "reading safetensors")
        if self.files[name].name == COMPRESSED:
            yield decompressed(self.files[name], name, self.entries[name], self.checksums)
            return
        with reading(self.files[name]):
            file = safetensors.safe_open(self.files[name], framework="numpy")
        with file:
            yield file.get_slice(name)


def read_folder(path: Path) -> Folder:
    """Returns the tensors of a folder; only the headers of its files are read and checked.

    As in transformers, model.safetensors is read where there is one, then the shards of the index.
    Shards without an index are read by their names, and weights without their zeros where there
    are no others.

    Raises:
        InputError: If there are no safetensors, or a file is missing, truncated, damaged or outside
            the folder.

    Warns:
        UserWarning: If the folder also has what is not read: an index of other weights, or an
            adapter.
    """
    if (path / WEIGHTS).exists():
        header = read_header(path / WEIGHTS)
        _warn_of_others(path, header)
        return Folder(path, header.entries, dict.fromkeys(header.entries, path / WEIGHTS))
    if (path / INDEX).exists():
        files = indexed(path)
        by_name = _headers(path, files)
    elif (path / COMPRESSED).exists():
        header = read_header(path / COMPRESSED)
        entries = check_compressed(header)
        files = dict.fromkeys(entries, path / COMPRESSED)
        return Folder(path, entries, files, checksums_of(header))
    else:
        by_name = _joined(path, [read_header(file) for file in shards(path)])
        files = {name: header.path for name, header in by_name.items()}
    return Folder(path, {name: by_name[name].entries[name] for name in files}, files)


def _headers(path: Path, files: Mapping[str, Path]) -> dict[str, Header]:
    """Returns the header with each tensor of an index."""
    headers = {file: read_header(file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file].entries:
            raise InputError(
                f"{path / INDEX} says that {name!r} is in {file.name}, which does not have it; "
                "get both files again"
            )
    return {name: headers[file] for name, file in files.items()}


def _joined(path: Path, headers: list[Header]) -> dict[str, Header]:
    """Returns the header with each tensor of shards without an index."""
    found: dict[str, Header] = {}
    for header in headers:
        for name in header.entries:
            if name in found:
                raise InputError(
                    f"{path} has {name!r} both in {found[name].path.name} and in "
                    f"{header.path.name}, and no {INDEX} that says which counts; get the index"
                )
            found[name] = header
    return found


def _warn_of_others(path: Path, header: Header) -> None:
    if (path / COMPRESSED).exists():
        warnings.warn(
            f"{path} has {COMPRESSED} next to its {WEIGHTS}, which alone is read; remove the one "
            "that is out of date",
            stacklevel=2,
        )
    if (path / INDEX).exists():
        try:
            others = _headers(path, indexed(path))
            name = first_difference(header, others)
            differs = None if name is None else f"its {name!r} differs"
        except InputError as error:
            differs = str(error)
        if differs is not None:
            warnings.warn(
                f"{path} has both {WEIGHTS}, which is read, as transformers does, and {INDEX} of "
                f"other weights, which are not ({differs}); remove the one that is out of date",
                stacklevel=2,
            )
    elif strays := stray_shards(path):
        warnings.warn(
            f"{path} has {strays[0]!r} next to its {WEIGHTS}, which alone is read, as transformers "
            "does; give shards their own names to have them read together",
            stacklevel=2,
        )
    if (path / ADAPTER).exists():
        warnings.warn(
            f"{path} has an adapter next to its {WEIGHTS}, which is not applied; merge it first if "
            "it belongs to the model",
            stacklevel=2,
        )
