"""A Hugging Face folder: config.json, and the tensors in model.safetensors or its shards.

Everything that can be seen to be wrong is seen from the headers, before a tensor is read. A tensor
is read through a mapping of its own, so that what was read does not stay in memory.

Source: https://github.com/huggingface/safetensors (the format: eight bytes of length, a JSON
header, the data).
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swe_prune.errors import InputError
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of dtypes in the header, and ours; others are named as they are."""

_LENGTH = 8  # bytes that the header's length takes


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors of a folder; a `reading.Source`.

    Attributes:
        path: of the folder.
        entries: shape and dtype of each tensor, by name.
        files: where each is.
    """

    path: Path
    entries: Mapping[str, Entry]
    files: Mapping[str, Path]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Gives a tensor to be sliced by one slice for each axis."""
        safetensors = require("safetensors", "reading safetensors")
        with safetensors.safe_open(self.files[name], framework="numpy") as file:
            yield file.get_slice(name)


def read_folder(path: Path) -> Folder:
    """Returns the tensors that a folder has; of the files, the headers are read and checked.

    Raises:
        InputError: no safetensors, pickles alone, a shard that is missing, truncated, damaged or
            outside the folder, or an index that is no index.
    """
    if not (path / INDEX).exists():
        if not (path / WEIGHTS).exists():
            raise InputError(_no_weights(path))
        header = _header(path / WEIGHTS)
        return Folder(path, header, dict.fromkeys(header, path / WEIGHTS))
    files = _indexed(path)
    headers = {file: _header(file) for file in set(files.values())}
    for name, file in files.items():
        if name not in headers[file]:
            raise InputError(
                f"{path / INDEX} says that {name!r} is in {file.name}, which does not have it; "
                "get both files again"
            )
    entries = {name: headers[file][name] for name, file in files.items()}
    return Folder(path, entries, files)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; get it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; get it again")
    return value


def _indexed(path: Path) -> dict[str, Path]:
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{path / INDEX} has no weight_map of names to files; get it again")
    inside = {name: _inside(path, name) for name in set(listed.values())}
    return {tensor: inside[name] for tensor, name in listed.items()}


def _inside(path: Path, name: str) -> Path:
    """Returns the path of a file that an index names, which must lie in its folder.

    In the cache of Hugging Face a folder's files are links to ../../blobs, which counts as inside.
    """
    file = path / name
    home = path.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(
            f"{path / INDEX} names {name!r}, which leaves its folder; do not use this checkpoint"
        )
    if not any(file.resolve().is_relative_to(home) for home in homes):
        raise InputError(
            f"{path / INDEX} names {name!r}, a link to {file.resolve()}, which leaves its folder; "
            "put the file itself there"
        )
    if not file.is_file():
        raise InputError(f"{path} lacks {name!r}, which its index names; get that file")
    return file


def _no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    other = [name for name in names if name.endswith(".safetensors")]
    if pickles:
        return (
            f"{path} has its weights as {pickles[0]}, a pickle, which can run code when it is "
            "opened; only safetensors are read: convert it, or get the model's safetensors"
        )
    if other:
        return f"{path} has {other[0]} and neither {WEIGHTS} nor {INDEX}; rename it to {WEIGHTS}"
    return f"{path} has no weights: neither {WEIGHTS} nor {INDEX}; get them"


def _header(path: Path) -> dict[str, Entry]:
    """Returns what the header says of each tensor, once it is sure that all of them are there."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            raw = file.read(length) if length <= size - _LENGTH else None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; see to its rights") from None
    if raw is None:
        raise InputError(
            f"{path} ends within its header, after {size:,} bytes: it is truncated, or no "
            "safetensors; get it again"
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((one["data_offsets"][1] for one in header.values()), default=0)
        entries = {
            name: Entry(tuple(one["shape"]), DTYPES.get(one["dtype"]) or str(one["dtype"]))
            for name, one in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path} has no header of safetensors; get it again") from None
    if size < _LENGTH + length + end:
        raise InputError(
            f"{path} is truncated: it has {size:,} of {_LENGTH + length + end:,} bytes; "
            "get it again"
        )
    _check_opens(path)
    return entries


def _check_opens(path: Path) -> None:
    safetensors = require("safetensors", "reading safetensors")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}; get it again") from None
