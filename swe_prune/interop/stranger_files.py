"""Opening of files that strangers made, the only place that does: links, kinds, sizes and errors.

Source: https://github.com/huggingface/huggingface_hub (the layout of its cache).
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from swe_prune.errors import InputError, first_line, reading
from swe_prune.runtime.storage import each_once

LARGEST = 100_000_000
"""Bytes that a file other than weights may have, and the header of a safetensors file."""


@contextlib.contextmanager
def reading_in_rust(what: object, advice: str = "get it again") -> Iterator[None]:
    """`reading` that also leaves out what a panic of Rust prints by itself."""
    with open(os.devnull, "wb") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            with reading(what, advice):
                yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def check_file(path: Path, most: int | None = LARGEST) -> Path:
    """Returns the path of a regular file, found to be one before it is opened.

    Args:
        path: Path of the file.
        most: Largest size in bytes. None: any.

    Raises:
        InputError: There is no such file, or it is a pipe, a device or a folder, or too large.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        missing = "is a link to what does not exist; get the file" if path.is_symlink() else ""
        missing = missing or "does not exist; give the path of a file"
        raise InputError(f"{path} {missing}") from None
    except (OSError, ValueError) as error:  # a name with NUL; a circle of links
        raise InputError(f"{str(path)!r} cannot be read ({first_line(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{path} is not a regular file, so it is not read; put the file itself there"
        )
    if most is not None and found.st_size > most:
        raise InputError(
            f"{path} has {found.st_size:,} bytes, and a file of this kind at most {most:,}; get it "
            "again"
        )
    return path


def inside(folder: Path, name: str, most: int | None = LARGEST) -> Path:
    """Returns the path of a folder's file, which must be regular and lie in the folder.

    In the cache of Hugging Face a folder's files are links to ../../blobs, which counts as inside.

    Raises:
        InputError: The file is a link that leaves the folder, or as `check_file`.
    """
    file = folder / name
    with reading(repr(str(file)), "put the file itself there"):  # a circle of links
        home, target = folder.resolve(), file.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(one) for one in homes):
        raise InputError(
            f"{folder} has {name!r}, a link to {target}, which leaves its folder; "
            "put the file itself there"
        )
    return check_file(file, most)


def check_inside(folder: Path, names: Iterable[str], most: int | None = LARGEST) -> None:
    """Checks those files of a folder that exist, as `inside`."""
    for name in names:
        if os.path.lexists(folder / name):
            inside(folder, name, most)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a model folder.

    Raises:
        InputError: There is no such file in the folder, or no JSON object in it.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path.parent} is not a model folder: it has no {path.name}")
    inside(path.parent, path.name)
    with reading(path):
        raw = path.read_bytes()
    return parse_json(raw, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the JSON object of a file of a model folder, as Hugging Face lays it out."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def parse_json(raw: bytes | str, where: object, advice: str = "get it again") -> dict[str, Any]:
    """Returns the object that a JSON text is: finite numbers, texts in UTF-8, each key once.

    Args:
        raw: The text.
        where: Path or description of the file it comes from.
        advice: Instruction at the end of the sentence.

    Raises:
        InputError: The text is not a JSON object.
    """
    with reading(where, advice):
        text = raw.decode() if isinstance(raw, bytes) else raw
        value = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=each_once,
        )
        if "\\ud" in text or "\\uD" in text:  # half of a pair cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise InputError(f"{where} holds no JSON object; {advice}")
    return value


def check_sizes(sizes: Mapping[str, tuple[int, int]], count: int, largest: int, path: Path) -> None:
    """Checks the sizes of a config against what the tensors of its file allow.

    Args:
        sizes: Each size with the most that it may be, by name.
        count: Number of tensors.
        largest: Size of the longest axis of them.
        path: Path of the model.

    Raises:
        InputError: A size is larger.
    """
    for name, (size, most) in sizes.items():
        if size > most:
            raise InputError(
                f"config.json of {path} has {size} as the size of {name}, and its {count} tensors, "
                f"of up to {largest} rows, allow {most}; correct the config, or get both again"
            )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _whole(text: str) -> int:
    _finite(text)  # an integer beyond all floats is not a setting
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value
