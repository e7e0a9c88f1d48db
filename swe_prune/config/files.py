"""Config files: Python that defines `get_config()`, with overrides from a command line."""

import contextlib
import importlib.machinery
import importlib.util
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from swe_prune.config.checks import validate
from swe_prune.config.conversion import Text, from_dict
from swe_prune.config.experiment import Config
from swe_prune.errors import InputError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the Config that the file's `get_config()` gives, with `a.b=value` overrides applied.

    Raises:
        InputError: The file gives no config (see `read`), a key is unknown, or a value cannot be
            used.
    """
    read_values = read(path)
    with _running(path):  # references to other settings are computed now
        values = read_values.to_dict()
    for override in overrides:
        _apply_override(values, override)
    config = from_dict(values)
    validate(config)
    return config


class _AsItIs(importlib.machinery.SourceFileLoader):
    """Loads a file without bytecode, which passes for the file when both are of one second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def read(path: str | Path, start: str | Path | None = None) -> ConfigDict:
    """Returns what the file's `get_config()` gives, for another config file to start from.

        config = read("../shakespeare_char.py", __file__)

    Args:
        path: Path of a Python file.
        start: File that a relative path is relative to; None: the working directory.

    Raises:
        InputError: There is no such file, it fails to run, or its `get_config` is missing, fails,
            or does not return a ConfigDict.
    """
    path = Path(path) if start is None else Path(start).parent / path
    if not path.is_file():
        raise InputError(
            f"config {str(path)!r} is not a file; give the path of a get_config() file"
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {str(path)!r} is not Python; give a .py file with get_config()")
    spec.loader = _AsItIs(spec.name, str(path))
    module = importlib.util.module_from_spec(spec)
    with _running(path):
        spec.loader.exec_module(module)
        values = module.get_config() if hasattr(module, "get_config") else None
    if not hasattr(module, "get_config"):
        raise InputError(f"config {str(path)!r} defines no get_config(); add it")
    if not isinstance(values, Mapping | ConfigDict):
        raise InputError(
            f"get_config() of {str(path)!r} returns {type(values).__name__}; return a ConfigDict"
        )
    with _running(path):
        return values if isinstance(values, ConfigDict) else ConfigDict(values)


@contextlib.contextmanager
def _running(path: str | Path) -> Iterator[None]:
    """Turns whatever a config file raises, sys.exit() included, into one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InputError(
            f"config {str(path)!r} fails to run: {type(error).__name__}: {error}; fix the file"
        ) from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r} has no '='; write --config.train.steps=100")
    *groups, leaf = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise InputError(f"override {override!r}: {group!r} is not a group of settings")
    values[leaf] = Text(text)
