"""Text files as they lie on disk: plain text, JSON with a field of text, and either under gzip.

What a file is, is seen from its first bytes, and only then from its name, so that no archive and no
braces of JSON are taken for text.
"""

import gzip
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

from swe_prune.errors import InputError, first_line
from swe_prune.runtime.storage import is_hollow, is_regular

SEPARATOR = "\n\n"
"""Separator between the examples of a JSON file or a TFDS split: a blank line."""

LARGEST = 1 << 30
"""Bytes that a gzip file may expand to at most."""

_RATIO, _ALWAYS = 100, 1 << 24  # text compresses some 4 times; small files may be repetitive
_CHUNK = 1 << 20
_HEAD = 512  # bytes that say what a file is
_GZIP = b"\x1f\x8b"
_BINARY = {
    b"\x28\xb5\x2f\xfd": "zstandard archive",
    b"\xfd7zXZ\x00": "xz archive",
    b"BZh91AY&SY": "bzip2 archive",
    b"\x04\x22\x4d\x18": "lz4 archive",
    b"7z\xbc\xaf\x27\x1c": "7z archive",
    b"PK\x03\x04": "zip archive",
    b"PK\x05\x06": "zip archive",
    b"Rar!\x1a": "rar archive",
    b"PAR1\x15": "parquet file",
    b"ARROW1\x00": "arrow file",
    b"Obj\x01": "avro file",
    b"%PDF-": "PDF",
    b"{\\rtf": "RTF document",
    b"\xd0\xcf\x11\xe0": "Word document",
    b"SQLite format 3\x00": "SQLite database",
    b"\x89HDF": "HDF5 file",
    b"\x93NUMPY": "numpy array",
    b"GGUF\x02": "GGUF model",
    b"GGUF\x03": "GGUF model",
}
"""Kinds of files without plain text in them, by their first bytes."""

_JSON_LINES, _JSON = (".jsonl", ".ndjson", ".jsonlines"), (".json",)
_SHOWN = 5  # fields in an error message


def read_text(path: Path, key: str = "text", correct: str = "data.dataset to the path") -> str:
    r"""Returns the text of a file, with line ends as "\n".

    The texts of a JSON file are joined by blank lines: those of an array or of the lines, each a
    string or an object whose field `key` is one.

    Args:
        path: Path of the file.
        key: Field of the text in JSON objects.
        correct: What to correct if there is no such file, for the message.

    Raises:
        InputError: If the file cannot be read, is empty, is not UTF-8, is of another kind, expands
            to too much, or is JSON without texts.
    """
    where = f"text file {str(path)!r}"
    try:
        if not is_regular(path):
            raise InputError(
                f"{where} cannot be read (it is a directory, a pipe or a device); correct "
                f"{correct} of a text file"
            )
        if is_hollow(path):
            size = os.stat(path).st_size
            raise InputError(f"{where} has {size:,} bytes, nearly all holes; get it again")
        with open(path, "rb") as file:
            content = file.read(_HEAD)
            if not content.startswith(_GZIP):
                _check_kind(content, where)  # before memory is taken for all of it
            content += file.read()
    except (OSError, MemoryError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not fit into memory"
        raise InputError(
            f"{where} cannot be read ({why}); correct {correct} of a text file"
        ) from None
    name = path.name.lower()
    if content.startswith(_GZIP):
        content = _expanded(content, where)
        name = name.removesuffix(".gz").removesuffix(".gzip")
        _check_kind(content, where)
    if not content.strip():
        raise InputError(f"{where} is empty; give one with text in it")
    try:
        # Accept UTF-8 with or without a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 (byte {error.start}); convert it to UTF-8 first"
        ) from None
    texts = _texts(text, name, key, where)
    if texts is not None:
        text = SEPARATOR.join(texts)
        if not text.strip():
            raise InputError(f"{where} has no text in its {key!r}; give one with text in it")
    if "\0" in text:
        raise InputError(
            f"{where} is binary (a NUL at character {text.index(chr(0))}); give a plain text file"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _expanded(content: bytes, where: str) -> bytes:
    """Returns what a gzip file holds, in chunks, so that memory is never taken for too much."""
    most = min(LARGEST, _ALWAYS + _RATIO * len(content))
    parts, size = [], 0
    try:
        with gzip.open(io.BytesIO(content)) as file:
            while part := file.read(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise InputError(
                        f"{where} has {len(content):,} bytes and expands to more than {most:,}, "
                        "which is too much for it to be expanded here; expand it and give a part"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{where} is a gzip file that is damaged ({first_line(error)}); get it again"
        ) from None
    return b"".join(parts)


def _check_kind(content: bytes, where: str) -> None:
    kinds = [kind for magic, kind in _BINARY.items() if content.startswith(magic)]
    if content[257:262] == b"ustar":
        kinds = ["tar archive"]
    if content.startswith(_GZIP):
        kinds = ["gzip file within another"]
    if kinds:
        raise InputError(
            f"{where} is a {kinds[0]}, not text; extract its text to a plain file, to JSON lines, "
            "or to either under gzip"
        )


def _texts(text: str, name: str, key: str, where: str) -> list[str] | None:
    """Returns the texts of JSON, or None for a plain text."""
    named = name.endswith(_JSON_LINES + _JSON)
    start = text.lstrip()
    if not named and not start.startswith(("{", "[")):
        return None
    lines = [(at, line) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = _parsed(lines[0][1])
    by_line = first is not None if named else isinstance(first, dict) and bool(first)
    if by_line and len(lines) > 1:
        return [_text(_line(at, line, where), key, f"{where}, line {at},") for at, line in lines]
    # The file is one value, over one line or several.
    whole = _parsed(text)
    if named and whole is None:
        raise InputError(
            f"{where} is not JSON, although its name says so; correct it, or give it the name of a "
            "plain text"
        )
    if named or _holds_texts(whole):
        rows = whole if isinstance(whole, list) else [whole]
        return [_text(row, key, f"{where}, entry {at},") for at, row in enumerate(rows, 1)]
    return None


def _holds_texts(value: Any) -> bool:
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(isinstance(row, dict | str) and bool(row) for row in rows)


def _parsed(text: str) -> Any:
    """Returns the JSON value of a text, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _line(at: int, line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} has JSON lines, of which line {at} is none ({first_line(error)}); correct it"
        ) from None


def _text(row: Any, key: str, where: str) -> str:
    found = row.get(key) if isinstance(row, dict) else row
    if not isinstance(found, str):
        fields = list(row)[:_SHOWN] if isinstance(row, dict) else []
        has = f"fields {', '.join(map(repr, fields))}" if fields else f"{type(row).__name__}"
        raise InputError(
            f"{where} must be a string or an object whose {key!r} is one, got {has}; write the "
            f"text of every entry into {key!r}, or into a plain file"
        )
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half of a character in its {key!r} ({error.reason}); correct it"
        ) from None
    return found
