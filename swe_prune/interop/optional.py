"""Packages that only reading and writing pretrained models needs, imported when they are used."""

import importlib
from typing import Any

from swe_prune.errors import InputError

EXTRA = "llm"
"""The extra of this package that installs them all."""


def require(module: str, what: str) -> Any:
    """Returns the imported module.

    Args:
        module: its name, such as `"safetensors.numpy"`.
        what: what needs it, the subject of the sentence: `"reading a GGUF file"`.

    Raises:
        InputError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(
            f"{what} needs the package {module.split('.')[0]!r}, which is not installed; "
            f"install it with: pip install 'swe-prune[{EXTRA}]'"
        ) from None
