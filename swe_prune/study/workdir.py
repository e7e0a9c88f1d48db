"""The working directory: where things lie, whose they are, and that no two runs share them."""

import contextlib
import dataclasses
import fcntl
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from etils import epath

from swe_prune.config import Config, flat, from_dict
from swe_prune.errors import InputError, differences, first_line
from swe_prune.runtime import lease, processes, storage
from swe_prune.runtime.locks import lock
from swe_prune.study.grid import Cell, Recovery, seeds
from swe_prune.study.shard import Shard
from swe_prune.training.metrics import write_json

CONFIG = "config.json"
"""File that says what made a workdir: there, and in the folder of every seed."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths of one experiment.

    Attributes:
        path: Folder, or an address in a bucket.
    """

    path: epath.Path

    def __post_init__(self) -> None:
        """Takes any kind of path."""
        object.__setattr__(self, "path", epath.Path(self.path))

    def dense(self, seed: int) -> epath.Path:
        """Folder of the dense phase."""
        return self.path / f"seed_{seed}" / "dense"

    def control(self, seed: int, recovery: Recovery = Recovery()) -> epath.Path:  # noqa: B008, frozen
        """Folder of a recovery's control: the dense model trained on."""
        return self.path / f"seed_{seed}" / "-".join(filter(None, ("control", recovery.name)))

    def cell(self, cell: Cell) -> epath.Path:
        """Folder of one cell."""
        return self.path / f"seed_{cell.seed}" / "cells" / cell.name

    @property
    def results(self) -> epath.Path:
        """The table with one row per cell."""
        return self.path / "results.csv"


@contextlib.contextmanager
def claim(
    workdir: Workdir,
    config: Config,
    shard: Shard | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Creates or reopens the workdir for this config, and locks it against other runs.

    The processes of one run share the lock of the first of them, and so do shards; a run of the
    whole study has it alone. The lock is the operating system's and ends with the process. In a
    bucket it is a lease, which expires SWE_PRUNE_LOST_TIMEOUT seconds after its holder dies.

    Args:
        workdir: Workdir to hold.
        config: Settings of the experiment.
        shard: Shard of a process that shares the work; None: the whole.
        say: Callback for a message while waiting to see whether a lease holder is alive.

    Raises:
        InputError: It cannot be written, belongs to another config, or another run is using it.
    """
    with contextlib.ExitStack() as stack:
        hold = _leased if storage.in_bucket(workdir.path) else _locked

        def claimed() -> None:
            stack.enter_context(hold(workdir.path, shard, say))
            with lock(workdir.path / ".config", "settings of the workdir", lambda _: None):
                _settle(workdir, config)

        processes.first(claimed)
        yield


@contextlib.contextmanager
def _locked(path: epath.Path, shard: Shard | None, _: Callable[[str], None]) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a")  # noqa: SIM115, closed below
    except OSError as error:
        raise InputError(
            f"workdir {str(path)!r} cannot be written ({error.strerror}); choose another --workdir"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        stack.enter_context(storage.held(path, ".lock"))
        _take(file, fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH, f"workdir {str(path)!r}")
        if shard is not None:
            name = f"shard_{shard.index}_of_{shard.count}"
            own = stack.enter_context(open(path / f".lock_{name}", "a"))
            _take(own, fcntl.LOCK_EX, f"shard {shard.index}/{shard.count} of {str(path)!r}")
        yield


@contextlib.contextmanager
def _leased(path: epath.Path, shard: Shard | None, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a workdir in a bucket: its own lease first, then a look at those it excludes.

    Two that begin at once both see the other, and both are refused at worst.
    """
    whole, what = ".lock", f"workdir {str(path)!r}"
    name, mine = whole, what
    if shard is not None:
        name = f".lock_shard_{shard.index}_of_{shard.count}"
        mine = f"shard {shard.index}/{shard.count} of {str(path)!r}"
    with contextlib.ExitStack() as stack:
        try:
            objects = lease.store(path)
            stack.enter_context(lease.acquire(objects, name, mine, on_watch=say))
            others = [whole] if shard is not None else _shard_leases(path)
            holder = lease.alive(objects, others)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{what} cannot be written ({first_line(error)}); see that the bucket is there "
                "and that this machine's credentials may write to it, or choose another --workdir"
            ) from error
        if holder is not None:
            raise InputError(lease.in_use(what, holder))
        yield


def _shard_leases(path: epath.Path) -> list[str]:
    return [file.name for file in path.glob(".lock_shard_*")]


def _take(file: IO[str], kind: int, what: str) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{what} is in use by another run; wait for it or choose another"
        ) from error


def _settle(workdir: Workdir, config: Config) -> None:
    stored = _made_by(workdir.path)
    if stored is not None:
        _check_same(workdir.path, config, from_dict(stored["config"]))
    elif any(workdir.path.glob("seed_*/*/result.json")) or (workdir.path / CONFIG).exists():
        raise InputError(
            f"workdir {str(workdir.path)!r} has no {CONFIG} that can be read, so what made its "
            "results is not known; put the file back or choose another --workdir"
        )
    # A copy beside the results of every seed, so that they are known when the first is lost.
    values = {"fingerprint": config.fingerprint(), "config": dataclasses.asdict(config)}
    for path in (workdir.path, *(workdir.path / f"seed_{seed}" for seed in seeds(config))):
        if _stored(path / CONFIG) is None:
            write_json(path / CONFIG, stored or values)


def _made_by(path: epath.Path) -> dict[str, Any] | None:
    """Returns what made a workdir, by the first file that says so and can be read; else None."""
    files = (path / CONFIG, *sorted(path.glob(f"seed_*/{CONFIG}")))
    return next((found for file in files if (found := _stored(file)) is not None), None)


def _stored(file: epath.Path) -> dict[str, Any] | None:
    try:
        found = storage.read_json(file) if file.exists() else None
    except (OSError, ValueError):
        return None
    return found if found and isinstance(found.get("config"), dict) else None


def config_of(path: epath.Path) -> Config:
    """Returns the config that a workdir was made by.

    Raises:
        InputError: It is not a workdir of ours, or its config is damaged.
    """
    stored = _made_by(path)
    if stored is None:
        raise InputError(
            f"workdir {str(path)!r} has no config.json; give the --workdir of an earlier run, or "
            "--config to make a new one"
        )
    config = from_dict(stored["config"])
    assert isinstance(config, Config)
    return config


def check_config(path: epath.Path, config: Config) -> None:
    """Raises InputError if a workdir was made by another config, or it is not known by which."""
    _check_same(path, config, config_of(path))


def _check_same(path: epath.Path, config: Config, made_by: Config) -> None:
    # Compared as they are understood now, since a setting may be younger than the workdir.
    ours, theirs = (flat(one.without_switches()) for one in (config, made_by))
    if differing := differences(theirs, ours):
        raise InputError(
            f"workdir {str(path)!r} was made by another config: {differing}; "
            "choose another --workdir or go back to that config"
        )


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the JSON object of a file that a run wrote.

    Raises:
        InputError: It is damaged.
    """
    try:
        return storage.read_json(path, sealed=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}); run the command 'run', which makes it again"
        ) from error


def exists(path: epath.Path) -> bool:
    """Returns whether a file or folder is there, the same to all processes of the run."""
    return processes.first(path.exists)


def results_of(paths: Sequence[epath.Path]) -> list[Any]:
    """Returns the JSON of files as `read_json`, None where there is none, to all processes."""
    return processes.first(lambda: [read_json(p) if p.exists() else None for p in paths])


def result_of(path: epath.Path) -> Any:
    """Returns the JSON of a file as `read_json`, to all processes of the run."""
    return processes.first(lambda: read_json(path))


def write_result(path: epath.Path, result: dict[str, Any]) -> None:
    """Writes JSON for all processes of the run; it is there, whole, when this returns."""
    processes.first(lambda: write_json(path, result))
    processes.progress()


def remove(folder: epath.Path) -> None:
    """Deletes a folder of intermediate files, if it is there, for all processes of the run."""
    processes.first(lambda: storage.remove(folder))
