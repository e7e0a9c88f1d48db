"""The files of a working directory, which lies in a local folder or in a bucket of Google's.

A path is an `etils.epath.Path` either way. In a bucket (`gs://NAME/...`) an object appears whole
or not at all, and is replaced as a whole: there is nothing to append to, no folder that could be
renamed at once, and no lock. Files are read and written by gcsfs, arrays by tensorstore.
"""

import importlib.util
import os

from etils import epath

from swe_prune.errors import InputError

SCHEME = "gs://"


def parse_path(path: epath.PathLike, name: str = "workdir") -> epath.Path:
    """Returns a path by which the files of a folder or bucket can be reached.

    Args:
        path: of the folder, or its address in a bucket.
        name: what it is, for the message.

    Raises:
        InputError: it is an address of something else than a bucket of Google's, or what reads and
            writes one is not installed.

    >>> parse_path("runs/demo").name
    'demo'
    """
    text = os.fspath(path)
    if not text.startswith(SCHEME):
        if "://" in text:
            # A Path would make a folder named "s3:" here, which goes with the machine.
            raise InputError(
                f"{name} {text!r} is an address that checkpoints cannot be written to, since orbax "
                "knows gs://BUCKET/... alone; give one of those, or mount the bucket as a folder"
            )
        return epath.Path(text)
    if not text.removeprefix(SCHEME).strip("/"):
        raise InputError(f"{name} {text!r} names no bucket; write it as gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{name} {text!r} needs gcsfs, which is not installed; pip install 'swe-prune[gcs]'"
        )
    _prepare()
    return epath.Path(text)


def _prepare() -> None:
    import fsspec.config

    # What other processes write must be seen, so listings are not kept; and one way to read and
    # write, whether or not TensorFlow is there too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    os.environ.setdefault("EPATH_USE_TF", "false")


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path lies in a bucket.

    >>> in_bucket("gs://bucket/run"), in_bucket("/tmp")
    (True, False)
    """
    return os.fspath(path).startswith(SCHEME)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the path that is the same from every folder."""
    return epath.Path(path) if in_bucket(path) else epath.Path(os.path.abspath(path))


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file, making its folders; it is there whole or not at all, whenever we die.

    Raises:
        OSError: it cannot be written.
    """
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(folder: epath.PathLike) -> None:
    """Deletes a folder and all in it, if it is there."""
    epath.Path(folder).rmtree(missing_ok=True)


def move(folder: epath.PathLike, target: epath.PathLike) -> None:
    """Gives a folder another name, in the place of what has it; in a bucket file by file."""
    remove(target)
    if not in_bucket(folder):
        epath.Path(folder).rename(target)
        return
    for name in files(folder):
        (epath.Path(folder) / name).copy(epath.Path(target) / name)
    remove(folder)


def files(folder: epath.PathLike) -> list[str]:
    """Returns the names, below a folder, of all files in it and in its folders, sorted."""
    top = os.fspath(folder).rstrip("/")
    found = []
    for where, _, names in epath.Path(top).walk():
        # gcsfs names what it walks without the scheme.
        below = os.fspath(where).removeprefix(SCHEME).removeprefix(top.removeprefix(SCHEME))
        found += [f"{below}/{name}".strip("/") for name in names if name]
    return sorted(found)


def failed(error: Exception) -> bool:
    """Returns whether an error is one of a bucket's that is no OSError: a refusal, the network."""
    return type(error).__module__.partition(".")[0] in {"gcsfs", "google", "aiohttp", "requests"}
