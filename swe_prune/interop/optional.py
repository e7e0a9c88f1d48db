"""Import of optional packages for pretrained models when they are used."""

import importlib
from typing import Any

from swe_prune.errors import InputError

EXTRA = "pretrained"
"""Name of the extra that installs all of these packages."""


def require(module: str, what: str) -> Any:
    """Imports a module and returns it.

    Args:
        module: Name of the module, such as `"safetensors.numpy"`.
        what: Operation that needs the module, such as `"reading a GGUF file"`.

    Raises:
        InputError: If the package is not installed.
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
