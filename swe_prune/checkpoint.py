"""Checkpoints: the only file that imports orbax.

Every checkpoint is a pytree of arrays and a JSON object, written to a temporary folder and renamed,
so a process killed in the middle leaves the one before. Beside each lies a list of checksums:
what was not written completely, or changed since, is found when it is read and never trusted.
"""

import hashlib
import itertools
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as preservation

from swe_prune.errors import DamagedError, InputError, RunError
from swe_prune.tree import named_leaves

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save


class Checkpoints:
    """The numbered checkpoints of one phase in one folder.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0):
        """Opens the folder, making it when there is none, and clears what a kill left half done.

        Args:
            folder: one per phase.
            keep: how many of the latest to keep.
            keep_every: keep those of every so many steps for good too; 0: none.
        """
        self.folder = folder.absolute()
        policies: list[Any] = [preservation.LatestN(keep)]
        if keep_every:
            policies.append(preservation.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        for step in self._manager.all_steps():
            if not self._checksum_file(step).exists():  # killed between the rename and this file
                self._manager.delete(step)

    def latest(self) -> int | None:
        """Returns the number of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        """Writes a checkpoint; keys of jax's random numbers are stored as their data.

        Raises:
            RunError: the folder cannot be written.
        """
        plain = _without_keys(tree)
        described = {"leaves": _describe(plain), "extra": extra}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(plain), extra=ocp.args.JsonSave(described)
                ),
            )
            self._manager.wait_until_finished()
            self._write_checksums(step)
        except (OSError, ValueError) as error:
            raise RunError(
                f"checkpoint {step} in {self.folder} cannot be written: {_first_line(error)}; make "
                "room or choose another workdir and run the same command again, earlier "
                "checkpoints are kept"
            ) from error

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Returns (tree, extra) of a checkpoint, by default the newest that is not damaged.

        A damaged one is passed over with a warning, for the one before it, unless it is asked for.

        Args:
            like: a pytree of the same structure, concrete or from `jax.eval_shape`.
            step: which one.

        Raises:
            InputError: it, or each there is, is damaged, or it holds another structure or other
                shapes.
        """
        if step is not None:
            return self._restore(like, step)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise InputError(
                f"{self.folder} holds no checkpoint; run the phase that makes it first"
            )
        for number, earlier in itertools.pairwise(steps):
            try:
                return self._restore(like, number)
            except DamagedError as error:
                reason = str(error).partition("; ")[0]
                warnings.warn(f"{reason}; going on from {earlier}", stacklevel=2)
                self._set_aside(number)
        return self._restore(like, steps[-1])

    def _restore(self, like: PyTree, step: int) -> tuple[PyTree, dict[str, Any]]:
        self._verify(step)
        described = self._manager.restore(
            step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
        )["extra"]
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_keys(like))
        self._check_fits(step, described["leaves"], _describe(abstract))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        )
        return _with_keys(restored["tree"], like), described["extra"]

    def close(self) -> None:
        """Releases the manager."""
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Renames a damaged one, lest it stand in the way of a new one of its number."""
        target = self.folder / f"damaged_{step}"
        if target.exists():
            shutil.rmtree(target)
        (self.folder / str(step)).rename(target)
        self._checksum_file(step).unlink(missing_ok=True)
        self._manager.reload()

    def _write_checksums(self, step: int) -> None:
        for stale in self.folder.glob("*.checksums"):
            if not (self.folder / stale.stem).exists():
                stale.unlink()
        target = self._checksum_file(step)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(_checksums(self.folder / str(step))))
        temporary.replace(target)

    def _verify(self, step: int) -> None:
        try:
            written = json.loads(self._checksum_file(step).read_text())
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"checkpoint {step} in {self.folder} is damaged: its checksums cannot be read "
                f"({_first_line(error)}); {self._mend(step)}"
            ) from error
        found = _checksums(self.folder / str(step))
        for name in sorted(written.keys() | found.keys()):
            if written.get(name) != found.get(name):
                reason = "is missing" if name not in found else "is not as it was written"
                raise DamagedError(
                    f"checkpoint {step} in {self.folder} is damaged: {name} {reason}; "
                    f"{self._mend(step)}"
                )

    def _check_fits(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
        for name in [*wanted, *stored]:
            if stored.get(name) != wanted.get(name):
                raise InputError(
                    f"checkpoint {step} in {self.folder} is of another model: {name!r} is "
                    f"{stored.get(name, 'not in it')} and should be "
                    f"{wanted.get(name, 'absent')}; choose the workdir or the config it belongs to"
                )

    def _checksum_file(self, step: int) -> Path:
        return self.folder / f"{step}.checksums"

    def _mend(self, step: int) -> str:
        earlier = [s for s in self._manager.all_steps() if s < step]
        resume = f"resume from step {max(earlier)}" if earlier else "start that phase again"
        return f"delete {self.folder / str(step)} and run the same command to {resume}"


def _checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
