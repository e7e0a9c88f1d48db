"""Files of a working directory in a local folder or a Google Cloud Storage bucket.

A path is an `etils.epath.Path` in both cases. In a bucket (`gs://NAME/...`) an object is written
atomically as a whole: there is no appending, no atomic rename of a folder, and no lock. Files are
read and written with gcsfs, arrays with tensorstore.
"""

import contextlib
import importlib.util
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from swe_prune.errors import InputError, RunError
from swe_prune.runtime.packages import missing

SCHEME = "gs://"

LARGEST = 1 << 28
"""Bytes that a file of a run may have, other than arrays."""

CHECKSUM = "checksum"
"""Key of the checksum in the JSON objects that a run writes."""


def parse_path(path: epath.PathLike, name: str = "workdir") -> epath.Path:
    """Returns the path object for a local folder or a bucket address.

    Args:
        path: Path of a folder, or address of a folder in a bucket.
        name: Name of the setting, for the error message.

    Raises:
        InputError: If the address is not a Google Cloud Storage bucket, or gcsfs is not installed.

    >>> parse_path("runs/demo").name
    'demo'
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise InputError(f"{name} must be the path of a folder, got {text!r}; give one")
    if not text.startswith(SCHEME):
        if "://" in text:
            # A Path would create a local folder named "s3:", which is lost with the machine.
            raise InputError(
                f"{name} must be a folder or gs://BUCKET/..., got {text!r}; checkpoints cannot be "
                "written elsewhere, since orbax supports no other address; give one of these, or "
                "mount the bucket as a folder"
            )
        return epath.Path(text)
    if not text.removeprefix(SCHEME).strip("/"):
        raise InputError(f"{name} must be gs://BUCKET/FOLDER, got {text!r}, which names no bucket")
    if importlib.util.find_spec("gcsfs") is None:
        raise missing("gcsfs", f"{name} {text!r}", "gcs")
    _prepare()
    return epath.Path(text)


def _prepare() -> None:
    import fsspec.config

    # Do not cache listings, so that files of other processes are seen; and use one backend whether
    # or not TensorFlow is installed.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    os.environ.setdefault("EPATH_USE_TF", "false")


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket.

    >>> in_bucket("gs://bucket/run"), in_bucket("/tmp")
    (True, False)
    """
    return os.fspath(path).startswith(SCHEME)


_HELD: dict[str, tuple[int, int]] = {}
"""Folders that a run works in, with what tells them from others of the same path."""


@contextlib.contextmanager
def held(folder: epath.PathLike, marker: str = "") -> Iterator[None]:
    """Detects whether a run's local folder is moved or replaced; see `check_held`.

    Args:
        folder: Folder of the run.
        marker: Name of a file in it that goes with its content, where there is one.
    """
    if in_bucket(folder):
        yield
        return
    path = os.path.join(os.path.abspath(folder), marker)
    found = os.stat(path)
    _HELD[path] = found.st_dev, found.st_ino
    try:
        yield
    except Exception:
        check_held()  # whatever has failed in a folder that is gone, that is why
        raise
    finally:
        _HELD.pop(path, None)


def check_held() -> None:
    """Checks, before something is written, that nobody renamed or removed the folder of the run.

    A path that is gone would be made again, and hold half of a run.

    Raises:
        RunError: It is not there, or another folder is in its place.
    """
    for path, identity in _HELD.items():
        try:
            found = os.stat(path)
            same = (found.st_dev, found.st_ino) == identity
        except OSError:
            same = False
        if not same:
            raise RunError(
                f"workdir {os.path.dirname(path)!r} was renamed, removed or replaced while the run "
                "worked in it; rename it back, or give its new path as --workdir, and run the "
                "same command again; what is finished there is kept"
            )


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path."""
    return epath.Path(path) if in_bucket(path) else epath.Path(os.path.abspath(path))


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file atomically, creating its folders.

    Args:
        path: Path of the file.
        content: Text or bytes to write.

    Raises:
        OSError: If the file cannot be written.
        RunError: If the folder of the run is gone.
    """
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        path.write_bytes(data)
        return
    check_held()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write a temporary file and rename it, which is atomic on a local disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not say which file
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, too
            temporary.unlink(missing_ok=True)


def is_regular(path: epath.PathLike) -> bool:
    """Returns whether a path is that of a file that can be read to its end.

    Raises:
        OSError: There is none.
    """
    return in_bucket(path) or stat.S_ISREG(os.stat(path).st_mode)


def is_hollow(path: epath.PathLike) -> bool:
    """Returns whether a file is large and nearly all holes, as no file of ours is.

    Reading it to its end would take as long as its size says, which may be anything.
    """
    if in_bucket(path) or not os.path.isfile(path):
        return False
    found = os.stat(path)
    return found.st_size > LARGEST and found.st_blocks * 512 * 100 < found.st_size


def read_text(path: epath.PathLike, *, log: bool = False) -> str:
    """Returns the text of a file of a run, found to be a regular one before it is opened.

    Args:
        path: Path of the file.
        log: Whether the file grows with the run, so that it may be of any size without holes.

    Raises:
        ValueError: It is a folder, a pipe or a device, too large, or not UTF-8.
        OSError: It cannot be read.
    """
    if not is_regular(path):
        raise ValueError("it is not a regular file")
    if not in_bucket(path):
        found = os.stat(path)
        if found.st_size > LARGEST and not (log and found.st_blocks * 512 >= found.st_size):
            raise ValueError(f"it has {found.st_size:,} bytes, more than a file of its kind has")
        return epath.Path(path).read_text(encoding="utf-8")
    # In one request: opened, a file is read by the size that it had, while another process may put
    # a longer one in its place.
    import fsspec

    files, name = fsspec.core.url_to_fs(str(path))
    return files.cat_file(name).decode("utf-8")


def parse_json(text: str) -> dict[str, Any]:
    """Returns the object that a JSON text is, without its checksum, which is held against it.

    Raises:
        ValueError: The text is not a JSON object, has a key twice, or was changed since.
    """
    try:
        value = json.loads(text, object_pairs_hook=each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    wanted = value.pop(CHECKSUM, None)
    if wanted is not None and wanted != checksum(json.dumps(value)):
        raise ValueError("it was changed after it was written")
    return value


def read_log(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a log's lines, each of which has a `step`; skips blank lines.

    A last line without its newline is incomplete and left out: a run was killed as it wrote it.

    Raises:
        ValueError: The text cannot be read, or a line is malformed, which is named by its number.
        OSError: The file cannot be read.
    """
    for number, line in enumerate(read_text(path, log=True).split("\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if type(value.get("step")) is not int or not 0 <= value["step"] < 1 << 63:
            raise ValueError(f"line {number} has no whole number 'step'")
        yield value


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict.

    Raises:
        ValueError: A key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def read_json(path: epath.PathLike, *, sealed: bool = False) -> dict[str, Any]:
    """Returns the JSON object of a file that a run wrote.

    Args:
        path: Path of the file.
        sealed: Whether it must have its checksum.

    Raises:
        ValueError: Errors of `read_text` and `parse_json`, or the checksum is missing.
        OSError: The file cannot be read.
    """
    text = read_text(path)
    if sealed and f'"{CHECKSUM}"' not in text:
        raise ValueError("it has no checksum, so what wrote it is not known")
    return parse_json(text)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with its checksum, which `parse_json` looks at and leaves out."""
    return {**value, CHECKSUM: checksum(json.dumps(value))}


def checksum(text: str) -> int:
    """Returns the CRC-32 of a JSON text as `json.dumps` writes it."""
    return zlib.crc32(text.encode())


def checksum_of(arrays: Mapping[str, Any], text: str = "") -> int:
    """Returns the CRC-32 of a text, and of arrays with their dtypes in the order of their names."""
    found = zlib.crc32(text.encode())
    for name in sorted(arrays):
        flat = np.ascontiguousarray(arrays[name]).reshape(-1)
        found = zlib.crc32(flat.view(np.uint8).data, zlib.crc32(flat.dtype.name.encode(), found))
    return found


def remove(folder: epath.PathLike) -> None:
    """Deletes a folder and its contents if it exists."""
    epath.Path(folder).rmtree(missing_ok=True)


def discard(path: epath.PathLike) -> None:
    """Deletes a file, or what is in its place, if it exists."""
    path = epath.Path(path)
    if path.is_dir() and not os.path.islink(path):
        remove(path)
    else:
        path.unlink(missing_ok=True)


def move(folder: epath.PathLike, target: epath.PathLike) -> None:
    """Renames a folder, replacing the target if it exists; in a bucket, file by file."""
    remove(target)
    if not in_bucket(folder):
        epath.Path(folder).rename(target)
        return
    # Objects cannot be renamed, so copy them.
    for name in files(folder):
        (epath.Path(folder) / name).copy(epath.Path(target) / name)
    remove(folder)


def files(folder: epath.PathLike) -> list[str]:
    """Returns the sorted paths, relative to a folder, of all files in it and its subfolders."""
    top = os.fspath(folder).rstrip("/")
    found = []
    for where, _, names in epath.Path(top).walk():
        # gcsfs returns paths without the scheme.
        below = os.fspath(where).removeprefix(SCHEME).removeprefix(top.removeprefix(SCHEME))
        found += [f"{below}/{name}".strip("/") for name in names if name]
    return sorted(found)


def failed(error: Exception) -> bool:
    """Returns whether an error is a bucket or network error that is not an OSError."""
    return type(error).__module__.partition(".")[0] in {"gcsfs", "google", "aiohttp", "requests"}
