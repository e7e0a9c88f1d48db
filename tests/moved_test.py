"""A folder that is renamed, removed or full under a run: one sentence, and nothing made again."""

import contextlib
import dataclasses
import errno
import functools
import os
import resource
import shutil

import interop_tiny
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pretrained_tiny
import pytest
from etils import epath
from orbax.checkpoint._src.serialization import jax_array_handlers

from swe_prune import interop, ledger, masks
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import InputError, RunError
from swe_prune.runtime import storage
from swe_prune.runtime.locks import lock
from swe_prune.training.metrics import JsonLines


def moved(work):
    work.rename(work.with_name("moved"))


def replaced(work):
    moved(work)
    work.mkdir()


WRITERS = {
    "file": lambda work: lambda: storage.write(work / "deep/er/file", "x"),
    "lock": lambda work: lambda: lock(work / ".results", "x", print).__enter__(),
    "lines": lambda work: (lambda log: lambda: log.write(1, {"loss": 1.0}))(
        JsonLines(epath.Path(work / "lines"), 0)
    ),
    "checkpoint": lambda work: (lambda store: lambda: store.save(1, {"a": jnp.ones(2)}, {}))(
        Checkpoints(work / "checkpoints")
    ),
    "new checkpoints": lambda work: lambda: Checkpoints(work / "others"),
}


@pytest.mark.parametrize("away", [shutil.rmtree, moved, replaced])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_gone_is_not_made_again(tmp_path, away, writer):
    work = tmp_path / "work"
    work.mkdir()

    def run():
        with storage.held(work):
            write = WRITERS[writer](work)
            away(work)
            write()

    with pytest.raises(RunError, match="renamed, removed or replaced") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not work.exists() or not list(work.iterdir())


def test_what_fails_in_a_folder_that_is_gone_fails_for_that(tmp_path):
    def run():
        with storage.held(tmp_path):
            shutil.rmtree(tmp_path)
            raise InputError("result.json is damaged")

    with pytest.raises(RunError, match="renamed"):
        run()
    storage.check_held()  # it is over


@contextlib.contextmanager
def small_files(size):
    """Lets no file grow beyond a size, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def exports(folder):
    model = interop_tiny.model("llama")
    words = pretrained_tiny.tokenizer("a few words, a few words more")
    whole = dataclasses.replace(model, tokenizer=words)
    return [functools.partial(interop.export, folder, one) for one in (model, whole)] + [
        lambda: interop.export(folder, model, compress=True)
    ]


def test_a_model_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path):
    said = f"the model {tmp_path / 'out'} cannot be written: no space is left"
    for size in (0, 100, 700, 2000, 5000):
        for export in exports(tmp_path / "out"):
            with small_files(size), pytest.raises(RunError) as caught:
                export()
            assert str(caught.value).startswith(said)
            assert not list(tmp_path.iterdir())


def test_other_files_that_cannot_be_written(tmp_path):
    mask = {"a": jnp.ones(900, bool)}
    with small_files(500), pytest.raises(InputError, match="no space is left"):
        masks.save(tmp_path / "masks", masks=mask)
    log = JsonLines(epath.Path(tmp_path / "lines"), 0)
    with small_files(500), pytest.raises(RunError, match=r"step 1 cannot be logged.*no space"):
        log.write(1, {"loss": [1.0] * 900})
    with small_files(500), pytest.raises(OSError, match="file") as caught:
        storage.write(tmp_path / "file", "x" * 900)
    assert caught.value.errno == errno.EFBIG
    assert sorted(os.listdir(tmp_path)) == ["lines"]


def test_the_failure_of_a_phase_is_not_hidden_by_that_of_its_ledger(tmp_path):
    book = ledger.Ledger(tmp_path / "ledger", meters=[])
    with pytest.raises(RunError, match="the first"), small_files(10), book.measure("train"):
        raise RunError("the first")
    said = pytest.warns(UserWarning, match="the ledger cannot write")
    with said, small_files(10), book.measure("train"):
        pass


def test_a_save_that_takes_too_long_is_a_sentence(tmp_path, monkeypatch):
    """Orbax's own limit of minutes is one of a second here, and writing takes longer."""
    write, options = (
        jax_array_handlers._async_serialize_replica_slices,
        ocp.CheckpointManagerOptions,
    )

    async def slow(*args, **kwargs):
        import asyncio

        await asyncio.sleep(3)
        return await write(*args, **kwargs)

    def limited(async_options, **how):
        limit = dataclasses.replace(async_options, timeout_secs=1)
        return options(async_options=limit, **how)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_replica_slices", slow)
    monkeypatch.setattr(ocp, "CheckpointManagerOptions", limited)
    monkeypatch.setattr("orbax.checkpoint._src.multihost.multihost.coordination_timeout", lambda: 1)
    with pytest.raises(RunError, match="took longer than orbax allows") as caught:  # noqa: SIM117
        with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as store:
            store.save(1, {"a": jnp.ones(2)}, {})
    assert "\n" not in str(caught.value)
