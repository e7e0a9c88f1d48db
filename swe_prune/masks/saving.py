"""One file for masks and statistics: safetensors, with the settings in its header.

The file needs no package to read or write: eight bytes of length, a JSON header with the dtype,
shape and place of every tensor, and the tensors. `safetensors` reads it too. Source of the format:
https://github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, reading, why_unwritten
from swe_prune.masks.fitting import check_mask
from swe_prune.runtime.storage import checksum_of, each_once
from swe_prune.trajectory import SETTINGS, TrajectoryStats, encoded, from_dict, restored

FORMAT = "swe_prune.state.1"

_DTYPES = {"BOOL": np.dtype(bool), "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
           "BF16": np.dtype(jnp.bfloat16)}  # fmt: skip
LARGEST_HEADER = 100_000_000  # bytes, of the format
_ALIGNED = 8  # the length of the header is a multiple of this
_FIELDS = ("start", "count", "weight_sum", "settings")  # of the statistics, beside the buffers


class Saved(NamedTuple):
    """What a file of `save` holds.

    Attributes:
        masks: Bool pytree of dicts and lists, None where dense; or None.
        stats: Trajectory statistics with the settings that they were tracked with; or None.
    """

    masks: PyTree | None
    stats: TrajectoryStats | None


@checked
def save(
    path: str | os.PathLike[str],
    *,
    masks: PyTree | None = None,
    stats: TrajectoryStats | None = None,
) -> None:
    """Writes masks, statistics, or both to one file, whole or not at all.

    Args:
        path: Path of the file; one that exists is replaced.
        masks: Bool pytree, None where dense.
        stats: Trajectory statistics.

    Raises:
        InputError: Nothing was given, a mask is not bool, an array is divided over processes, or
            the file cannot be written.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/state.safetensors"
    >>> save(path, masks={"up": {"kernel": jnp.array([True, False]), "bias": None}})
    >>> load(path).masks["up"]["kernel"].tolist()
    [True, False]
    """
    if masks is None and stats is None:
        raise InputError("nothing to save was given; give masks=, stats= or both")
    parts: dict[str, PyTree] = {}
    about: dict[str, Any] = {}
    if masks is not None:
        check_mask(masks)
        parts["masks"] = masks
    if stats is not None:
        stats = restored(stats)
        parts |= {f"buffers/{name}": buffer for name, buffer in stats.buffers.items()}
        parts |= {f"stats/{field}": getattr(stats, field) for field in _FIELDS}
        settings = {name: getattr(stats, name) for name in SETTINGS}
        about["settings"] = {"measures": list(stats.measures), **settings}
    # The header has every place of a leaf, so that names may have any characters.
    arrays: dict[str, Any] = {}
    about["places"] = {}
    for part, values in parts.items():
        about["places"][part] = {}
        for name, place, leaf in _leaves(values):
            about["places"][part][name] = [place, leaf is not None]
            if leaf is not None:
                if not getattr(leaf, "is_fully_addressable", True):
                    raise InputError(
                        f"{tree.short(name)!r} is divided over processes; save it with a "
                        "checkpoint library"
                    )
                arrays[f"{part}/{name}"] = leaf if hasattr(leaf, "__array__") else jnp.asarray(leaf)
    about["checksum"] = checksum_of(arrays, json.dumps(about))
    _write(Path(path), arrays, {"format": FORMAT, "about": json.dumps(about)})


@checked
def load(path: str | os.PathLike[str]) -> Saved:
    """Returns the masks and the statistics of a file that `save` has written.

    Their containers are dicts and lists, which go together with weights in any containers.

    Args:
        path: Path of the file.

    Raises:
        InputError: There is no such file, or it is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give one that swe_prune.save has written")
    advice = "give a file that swe_prune.save has written, or save it again"
    try:
        return _load(path, advice)
    except InputError as error:  # of trees and of masks, which do not know the file
        if str(path) in str(error):
            raise
        raise InputError(f"{path} cannot be read ({error}); {advice}") from None


def _load(path: Path, advice: str) -> Saved:
    with reading(path, advice):
        arrays, about = _read(path)
        parts = {
            part: _nested(
                {
                    name: (place, arrays[f"{part}/{name}"] if there else None)
                    for name, (place, there) in leaves.items()
                }
            )
            for part, leaves in about["places"].items()
        }
        stats = None
        if "settings" in about:
            stats = from_dict(_fields_of(parts, about["settings"]))
            stats = _with_measures(stats, about["settings"])
    masks = parts.get("masks")
    if masks is not None:
        check_mask(masks)
    return Saved(masks, stats)


def _fields_of(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: parts[f"stats/{name}"] for name in _FIELDS}
    stored = [float(one) for one in fields["settings"]]
    power, window_start, vote_rate = (settings[n] for n in ("power", "window_start", "vote_rate"))
    named = encoded(power, window_start, vote_rate, settings.get("index", "window"))
    if any(np.float32(a) != np.float32(b) for a, b in zip(stored, named, strict=False)):
        raise ValueError("the header and the tensors have different settings")
    return fields | {
        "buffers": {
            part.removeprefix("buffers/"): values
            for part, values in parts.items()
            if part.startswith("buffers/")
        }
    }


def _with_measures(stats: TrajectoryStats, settings: Mapping[str, Any]) -> TrajectoryStats:
    """Returns statistics with the measures that were asked for; their buffers may allow more."""
    return dataclasses.replace(
        stats,
        measures=tuple(settings["measures"]),
        power=float(settings["power"]),
        vote_rate=float(settings["vote_rate"]),
    )


def _leaves(values: PyTree) -> list[tuple[str, list[Any], Any]]:
    """Returns the name, the place and the array of every leaf."""
    return [
        (name, [_key(one) for one in path], leaf) for name, path, leaf in tree.placed_leaves(values)
    ]


def _key(entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.SequenceKey):
        return {"index": entry.idx}
    key = getattr(entry, "key", getattr(entry, "name", entry))
    return key if isinstance(key, str | int) else str(key)


def _nested(leaves: Mapping[str, tuple[list[Any], Any]]) -> PyTree:
    """Returns the pytree of dicts and lists that has the leaves at their places."""
    places = list(leaves.values())
    if len(places) == 1 and not places[0][0]:
        return places[0][1]
    groups: dict[Any, dict[str, tuple[list[Any], Any]]] = {}
    for name, (place, leaf) in leaves.items():
        first, *rest = place
        key = ("index", first["index"]) if isinstance(first, dict) else ("key", first)
        groups.setdefault(key, {})[name] = (rest, leaf)
    made = {key: _nested(group) for key, group in groups.items()}
    if all(kind == "index" for kind, _ in made):
        return [made[key] for key in sorted(made)]
    return {key: value for (_, key), value in made.items()}


def _write(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        dtype = np.dtype(array.dtype)
        start, end = end, end + math.prod(array.shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNED)
    # Under another name first, so that an interrupted write leaves the old file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for array in arrays.values():
                file.write(np.ascontiguousarray(np.asarray(array)).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({why_unwritten(error)}); give a path in a folder that can "
            "be"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and what the header says of them; any fault is a ValueError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("the header is longer than the file, or than safetensors allows")
        header = json.loads(file.read(length), object_pairs_hook=each_once)
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise ValueError("another kind of file")
        arrays = {}
        for name, one in header.items():
            dtype = _DTYPES[one["dtype"]]
            start, end = one["data_offsets"]
            count = math.prod(one["shape"])
            if not 0 <= start <= end <= size - 8 - length or end - start != count * dtype.itemsize:
                raise ValueError("a tensor lies outside of the file")
            file.seek(8 + length + start)
            raw = file.read(end - start)
            if one["dtype"] == "BOOL" and raw.translate(None, b"\x00\x01"):
                raise ValueError("a bool is neither 0 nor 1")
            arrays[name] = np.frombuffer(raw, dtype).reshape(one["shape"])
    about = json.loads(metadata["about"], object_pairs_hook=each_once)
    wanted = about.pop("checksum", None)  # of an early version, none
    if wanted is not None and wanted != checksum_of(arrays, json.dumps(about)):
        raise ValueError("it was changed after it was written")
    return {name: jnp.asarray(array) for name, array in arrays.items()}, about
