"""Optional packages: imported when they are used, with one sentence where one is missing."""

import importlib
import importlib.metadata
from typing import Any

from swe_prune.errors import InputError


def require(module: str, what: str, extra: str) -> Any:
    """Imports a module and returns it.

    Args:
        module: Name of the module, such as `"safetensors.numpy"`.
        what: Operation that needs the module, such as `"reading a GGUF file"`.
        extra: Name of the extra that installs its package.

    Raises:
        InputError: If the package is not installed.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise missing(package, what, extra) from None


def files_of(package: str, what: str, extra: str) -> list[importlib.metadata.PackagePath]:
    """Returns the files of a package without importing it; see `require` for the arguments.

    Raises:
        InputError: If the package is not installed.
    """
    try:
        return importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise missing(package, what, extra) from None


def missing(package: str, what: str, extra: str) -> InputError:
    """Returns the error of a package that is not installed, with the command that installs it."""
    return InputError(
        f"{what} needs the package {package!r}, which is not installed; "
        f"pip install 'swe-prune[{extra}]'"
    )
