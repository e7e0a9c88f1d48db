"""Checkpoints: the only file that imports orbax.

A checkpoint is a pytree of arrays and a JSON object. It is written in the background to a temporary
folder and then renamed, so a process killed during the write leaves the previous checkpoint intact.
Each process that took part writes a list of checksums next to the checkpoint; a checkpoint that is
incomplete or was changed later is detected when it is read. A checkpoint can be restored with a
different number of processes and onto a different mesh.
"""

import contextlib
import hashlib
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as preservation

from swe_prune.early_signals import PROGRAM
from swe_prune.errors import (
    DamagedError,
    InputError,
    RunError,
    UnwrittenError,
    first_line,
    why_unwritten,
)
from swe_prune.runtime import processes, storage
from swe_prune.tree import named_leaves

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every save, and every failure


def _quiet_loops() -> None:
    """Leaves out what asyncio and tensorstore print of each write after one that has failed."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Steps of a write that were not begun any more.
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = hook


if PROGRAM:  # the failure itself is raised, and becomes a sentence
    _quiet_loops()

WRITE_ERRORS = (OSError, ValueError, RuntimeError)
"""What orbax and tensorstore raise when a file cannot be written; a timeout is an OSError."""

METADATA = "_CHECKPOINT_METADATA"
"""File of a checkpoint that orbax reads to list it."""

AGAIN = "run the command that made it again, which starts from the newest one that is whole"
"""Advice for a damaged checkpoint."""


class Checkpoints:
    """The numbered checkpoints of one phase in one folder.

    Attributes:
        folder: Folder that contains the checkpoints.
    """

    def __init__(
        self, folder: epath.PathLike, keep: int = 2, keep_every: int = 0, *, reading: bool = False
    ):
        """Opens the folder, creating it if necessary, and removes incomplete checkpoints.

        Args:
            folder: Folder for the checkpoints of one phase.
            keep: Number of latest checkpoints to retain.
            keep_every: Number of steps between checkpoints that are retained permanently; 0 for
                none.
            reading: Whether the folder is only read, and stays as it is.

        Raises:
            InputError: There is no such folder to read.
        """
        self.folder = storage.absolute(folder)
        self._manager: Any = None
        storage.check_held()
        if reading and not processes.first(self.folder.exists):
            raise DamagedError(f"{self.folder} does not exist; {AGAIN}")
        # Retain the newest checkpoints and, permanently, one every `keep_every` steps.
        policies: list[Any] = [preservation.LatestN(keep)]
        if keep_every:
            policies.append(preservation.EveryNSteps(keep_every))
        self._reading = reading
        self._set_aside_unlisted()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            # Made asynchronously, a folder that cannot be made is waited for 300 seconds.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            cleanup_tmp_directories=not reading,
            read_only=reading,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._step = 0  # of the last save
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        if not reading:
            self._drop_incomplete()

    def latest(self) -> int | None:
        """Returns the number of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        """Starts writing a checkpoint in the background, after the previous one is written.

        The arrays may be donated as soon as this returns. JAX random keys are stored as their data.

        Args:
            step: Number of the checkpoint.
            tree: Pytree of arrays to save.
            extra: JSON-serializable values to save with it.

        Raises:
            RunError: If the folder cannot be written. Errors that occur later are raised by
                `wait`, the next `save`, or `close`.
        """
        self.wait()
        self._step = step
        storage.check_held()
        plain = _without_keys(tree)
        described = {"leaves": _describe(plain), "extra": extra}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(plain), extra=ocp.args.JsonSave(described)
                ),
            )
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone, which its own sentence says
        except WRITE_ERRORS as error:
            raise self._unwritten(step, error) from None
        # Checksums need complete files, so another thread waits for them.
        self._writing = threading.Thread(target=self._finish, args=(step,), daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Waits until the last checkpoint and its checksums are written.

        Raises:
            RunError: If they cannot be written.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure from None

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            self._write_checksums(step)
        except (jax.errors.JaxRuntimeError, RunError) as error:
            self._failure = error
        except Exception as error:  # in a thread; `wait` raises it in the main one
            self._failure = self._unwritten(step, error)

    def _unwritten(self, step: int, error: Exception) -> RunError:
        what = f"checkpoint {step} in {self.folder}"
        if isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error):
            why = "it took longer than orbax allows, as on a suspended machine or a disk that hangs"
            return UnwrittenError(
                f"{what} cannot be written: {why}; run the same command again; earlier "
                "checkpoints are kept",
                why,
            )
        why = why_unwritten(error)
        return UnwrittenError(
            f"{what} cannot be written: {why}; make room or choose another folder, and run the "
            "same command again; earlier checkpoints are kept",
            why,
        )

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Returns (tree, extra) of a checkpoint, by default the newest undamaged one.

        Unless `step` is given, damaged checkpoints are skipped with a warning.

        Args:
            like: Pytree with the structure, shapes and shardings to restore, concrete or from
                `jax.eval_shape`.
            step: Number of the checkpoint. If None, the newest undamaged one.

        Raises:
            InputError: If the checkpoint, or every checkpoint, is damaged, or if its structure or
                shapes differ from `like`.
        """
        self.wait()
        if step is not None:
            return self._restore(like, step)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise DamagedError(f"{self.folder} holds no checkpoint; {AGAIN}")
        # Newest first: rename a damaged checkpoint, and try the previous one; with none left, the
        # same command starts again.
        for number, earlier in zip(steps, [*steps[1:], None], strict=True):
            try:
                return self._restore(like, number)
            except DamagedError as error:
                if not self._reading:
                    self._set_aside(number)
                if earlier is None:
                    raise
                warnings.warn(f"{error.fault}; continuing from {earlier}", stacklevel=2)
        raise AssertionError

    def _restore(self, like: PyTree, step: int) -> tuple[PyTree, dict[str, Any]]:
        self._verify(step)
        described = self._manager.restore(
            step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
        )["extra"]
        # Compare names, dtypes and shapes first, for a clearer error than that of orbax.
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_keys(like))
        self._check_fits(step, described["leaves"], _describe(abstract))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        )
        return _with_keys(restored["tree"], like), described["extra"]

    def close(self) -> None:
        """Waits for pending writes and closes the manager.

        Raises:
            RunError: If a pending checkpoint cannot be written.
        """
        try:
            self.wait()
        except RunError:
            with contextlib.suppress(*WRITE_ERRORS):  # the same failure again
                self._manager.close()
            raise
        try:
            self._manager.close()
        except jax.errors.JaxRuntimeError:
            raise
        except WRITE_ERRORS as error:
            raise self._unwritten(self._step, error) from None

    def fault(self, step: int | None = None) -> str | None:
        """Returns what is wrong with a checkpoint, by default the newest; None: nothing."""
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            return "it is missing" if step is None else f"checkpoint {step} is missing"
        return next((one for one in processes.gather(self._fault(step)) if one is not None), None)

    def set_aside_from(self, step: int) -> int | None:
        """Renames a checkpoint and all later ones; returns the newest that is left, or None."""
        for number in self._manager.all_steps():
            if number >= step:
                self._set_aside(number)
        return self.latest()

    def _drop_incomplete(self) -> None:
        """Removes checkpoints whose process was killed before their checksums were written."""
        steps = sorted(self._manager.all_steps())

        def drop() -> list[int]:
            cut = [step for step in steps if self._checksum_files(step) is None]
            for step in cut:
                storage.remove(self.folder / str(step))
            return cut

        # Process 0 removes them, and all processes learn which.
        cut = processes.first(drop)
        for step in cut:
            warnings.warn(
                f"checkpoint {step} in {self.folder} is incomplete; continuing from the one before",
                stacklevel=3,
            )
        if cut:
            self._manager.reload()

    def _set_aside_unlisted(self) -> None:
        """Renames checkpoints whose own metadata were changed, which orbax fails to list."""

        def faults() -> dict[int, str]:
            steps = [int(one.name) for one in self.folder.glob("*") if one.name.isdecimal()]
            found = {n: self._fault(n, [METADATA]) for n in steps if self._checksum_files(n)}
            return {step: why for step, why in sorted(found.items()) if why is not None}

        for step, why in processes.first(faults).items():
            said = f"checkpoint {step} in {self.folder} is damaged: {why}"
            if self._reading:
                raise DamagedError(f"{said}; {AGAIN}")
            self._set_aside(step)
            warnings.warn(f"{said}; continuing without it", stacklevel=3)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, to free its number for a new one."""

        def rename() -> None:
            storage.move(self.folder / str(step), self.folder / f"damaged_{step}")
            for file in self.folder.glob(f"{step}.*checksums"):
                file.unlink()

        processes.first(rename)
        if self._manager is not None:
            self._manager.reload()

    def _write_checksums(self, step: int) -> None:
        """Writes the checksums of every n-th file, n being the number of processes."""
        index, count = processes.index(), processes.count()
        if index == 0:
            # Remove the checksums of checkpoints that orbax has deleted.
            for stale in self.folder.glob("*.checksums"):
                if not (self.folder / stale.name.partition(".")[0]).exists():
                    stale.unlink(missing_ok=True)
        part = f".{index}_of_{count}" if count > 1 else ""
        names = storage.files(self.folder / str(step))[index::count]
        sums = _checksums(self.folder / str(step), names)
        storage.write(self.folder / f"{step}{part}.checksums", json.dumps(sums))

    def _checksum_files(self, step: int) -> list[epath.Path] | None:
        """Returns the checksum files of a checkpoint, or None if one is missing."""
        found = {file.name: file for file in self.folder.glob(f"{step}.*checksums")}
        # A complete set is one file, or one from each process that wrote the checkpoint.
        if f"{step}.checksums" in found:
            return [found[f"{step}.checksums"]]
        counts = {int(m[1]) for name in found if (m := re.search(r"_of_(\d+)\.", name))}
        for count in counts:
            names = [f"{step}.{index}_of_{count}.checksums" for index in range(count)]
            if all(name in found for name in names):
                return [found[name] for name in names]
        return None

    def _verify(self, step: int) -> None:
        """Checks the files, divided over the processes; all raise if one finds a fault."""
        fault = self.fault(step)
        if fault is not None:
            raise DamagedError(f"checkpoint {step} in {self.folder} is damaged: {fault}; {AGAIN}")

    def _fault(self, step: int, names: Sequence[str] | None = None) -> str | None:
        """Returns what is wrong with this process's share of the files, by default of all."""
        written: dict[str, Any] = {}
        try:
            for file in self._checksum_files(step) or [self.folder / f"{step}.checksums"]:
                written |= storage.read_json(file)
        except (OSError, ValueError) as error:
            return f"its checksums cannot be read ({first_line(error)})"
        # A file may be missing, unexpected, or changed.
        if names is None:
            names = sorted(written.keys() | set(storage.files(self.folder / str(step))))
        for name in names[processes.index() :: processes.count()]:
            if storage.is_hollow(self.folder / str(step) / name):
                return f"{name} is nearly all holes"
            found = _checksums(self.folder / str(step), [name]).get(name)
            if written.get(name) != found:
                return f"{name} {'is missing' if found is None else 'was changed after writing'}"
        return None

    def _check_fits(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
        for name in [*wanted, *stored]:
            if stored.get(name) != wanted.get(name):
                raise InputError(
                    f"checkpoint {step} in {self.folder} belongs to another model: {name!r} is "
                    f"{stored.get(name, 'not in it')} and should be "
                    f"{wanted.get(name, 'absent')}; choose the workdir or the config it belongs to"
                )


def _checksums(folder: epath.Path, names: Sequence[str]) -> dict[str, str]:
    sums = {}
    for name in names:
        if (folder / name).is_file() and storage.is_regular(folder / name):
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while part := file.read(1 << 22):
                    digest.update(part)
            sums[name] = digest.hexdigest()
    return sums


def _describe(tree: PyTree) -> dict[str, str]:
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}"
        for name, leaf in named_leaves(tree)
        if leaf is not None
    }


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    def data(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.random.key_data(leaf)
        bare = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        numbers = jax.eval_shape(jax.random.key_data, bare)
        return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=leaf.sharding)

    return jax.tree.map(data, tree)


def _with_keys(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(
        lambda old, leaf: jax.random.wrap_key_data(leaf) if _is_key(old) else leaf, like, tree
    )
