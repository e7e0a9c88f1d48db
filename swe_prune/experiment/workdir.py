"""The working directory: where things lie, whose they are, and that no two runs share them."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from swe_prune import processes
from swe_prune.config import Config, flat, from_dict
from swe_prune.errors import InputError
from swe_prune.experiment.grid import Cell, Recovery
from swe_prune.experiment.shard import Shard, locked
from swe_prune.training.metrics import write_json


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths of one experiment.

    Attributes:
        path: the folder.
    """

    path: Path

    def dense(self, seed: int) -> Path:
        """Folder of the dense phase."""
        return self.path / f"seed_{seed}" / "dense"

    def control(self, seed: int, recovery: Recovery = Recovery()) -> Path:  # noqa: B008, frozen
        """Folder of a recovery's control: the dense model trained on."""
        return self.path / f"seed_{seed}" / "-".join(filter(None, ("control", recovery.name)))

    def cell(self, cell: Cell) -> Path:
        """Folder of one cell."""
        return self.path / f"seed_{cell.seed}" / "cells" / cell.name

    @property
    def results(self) -> Path:
        """The table with one row per cell."""
        return self.path / "results.csv"


@contextlib.contextmanager
def claim(workdir: Workdir, config: Config, shard: Shard | None = None) -> Iterator[None]:
    """Makes or reopens the workdir for this config, and holds it against other runs.

    The processes of one run hold it together, by the first of them. Shards share it among
    themselves; a run of the whole study has it alone. The lock is the
    operating system's: it is gone with the process, however that ends.

    Args:
        workdir: which.
        config: settings.
        shard: of a process that shares the work; None: the whole.

    Raises:
        InputError: it cannot be written, belongs to another config, or another run is using it.
    """
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(_claimed(workdir, config, shard)))
        yield


@contextlib.contextmanager
def _claimed(workdir: Workdir, config: Config, shard: Shard | None) -> Iterator[None]:
    path = workdir.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"workdir {str(path)!r} cannot be written ({error.strerror}); choose another --workdir"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        _take(lock, fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH, f"workdir {str(path)!r}")
        if shard is not None:
            name = f"shard_{shard.index}_of_{shard.count}"
            own = stack.enter_context((path / f".lock_{name}").open("a"))
            _take(own, fcntl.LOCK_EX, f"shard {shard.index}/{shard.count} of {str(path)!r}")
        with locked(path / ".config", "settings of the workdir", lambda _: None):
            _settle(workdir, config)
        yield


def _take(lock: IO[str], kind: int, what: str) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{what} is in use by another run; wait for it or choose another"
        ) from error


def _settle(workdir: Workdir, config: Config) -> None:
    made_by = workdir.path / "config.json"
    if made_by.exists():
        _check_same(workdir, config, read_json(made_by))
    else:
        values = dataclasses.asdict(config)
        write_json(made_by, {"fingerprint": config.fingerprint(), "config": values})


def config_of(path: Path) -> Config:
    """Returns the config that a workdir was made by.

    Raises:
        InputError: it is no workdir of ours, or its config is damaged.
    """
    made_by = path / "config.json"
    if not made_by.is_file():
        raise InputError(
            f"workdir {str(path)!r} has no config.json; give the --workdir of an earlier run, or "
            "--config to make a new one"
        )
    config = from_dict(read_json(made_by)["config"])
    assert isinstance(config, Config)
    return config


def _check_same(workdir: Workdir, config: Config, stored: dict[str, Any]) -> None:
    # Compared as they are understood now, since a setting may be younger than the workdir.
    now = from_dict(stored.get("config", {}))
    ours, theirs = (flat(one.without_switches()) for one in (config, now))
    if ours == theirs:
        return
    differing = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    shown = ", ".join(
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)" for key in differing[:3]
    )
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise InputError(
        f"workdir {str(workdir.path)!r} was made by another config: {shown}{more}; "
        "choose another --workdir or go back to that config"
    )


def read_json(path: Path) -> Any:
    """Returns the JSON of a file that a run wrote.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it and run the same command to make it again"
        ) from error


def exists(path: Path) -> bool:
    """Returns whether a file or folder is there, the same to all processes of the run."""
    return processes.first(path.exists)


def results_of(paths: Sequence[Path]) -> list[Any]:
    """Returns the JSON of files as `read_json`, None where there is none, to all processes."""
    return processes.first(lambda: [read_json(p) if p.exists() else None for p in paths])


def result_of(path: Path) -> Any:
    """Returns the JSON of a file as `read_json`, to all processes of the run."""
    return processes.first(lambda: read_json(path))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes JSON for all processes of the run; it is there, whole, when this returns."""
    processes.first(lambda: write_json(path, result))
    processes.progress()


def remove(folder: Path) -> None:
    """Deletes a folder of intermediate files, if it is there, for all processes of the run."""

    def delete() -> None:
        if folder.exists():
            shutil.rmtree(folder)

    processes.first(delete)
