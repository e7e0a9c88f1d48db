"""pruning.json: how a model was pruned, how much of each tensor, and what came of it."""

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from swe_prune import masks
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.interop.stranger_files import read_json
from swe_prune.recipe import Recipe
from swe_prune.version import __version__

FILE = "pruning.json"


@dataclasses.dataclass(frozen=True)
class PruningRecord:
    """What pruning.json says besides the counts, which are taken from the mask.

    Attributes:
        recipe: How the model was pruned.
        calibration: Text that was used and how. None: none was.
        evaluation: Measurements, by names of the caller's choice.
        commit: Commit of the code. None: not known.
        rules: Rules "include" and "exclude" and the range "blocks" that chose the weights, those
            that were given. None: the default choice.
    """

    recipe: Recipe
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    commit: str | None = None
    rules: Mapping[str, Any] | None = None


@checked
def read_record(folder: str | Path) -> dict[str, Any]:
    """Returns what pruning.json of an exported folder says.

    Raises:
        InputError: There is none, or it is damaged.
    """
    return read_json(Path(folder) / FILE)


def record_file(record: PruningRecord, mask: PyTree) -> dict[str, Any]:
    """Returns what pruning.json says: the record, and the counts of the mask.

    Raises:
        InputError: The record has what JSON cannot say.
    """
    counted = masks.summary(mask)
    content = {
        **dataclasses.asdict(record),
        "version": __version__,
        "sparsity": counted.sparsity,
        "pruned": counted.pruned,
        "prunable": counted.total,
        "tensors": {
            name: {"sparsity": one.sparsity, "pruned": one.pruned, "of": one.total}
            for name, one in counted.tensors.items()
        },
    }
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the PruningRecord is not JSON: {error}; give plain values") from None
    return content


def commit_of_code() -> str | None:
    """Returns the commit that this code is of, with a "+" where it was changed since.

    None where it is installed and no checkout, or git is not there.
    """
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
