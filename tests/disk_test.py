"""A disk without room: one sentence that names the folder, and the same command goes on."""

import contextlib
import csv
import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pretrained_tiny
import pytest
import tiny

from swe_prune import checkpoint, cli, errors

ROOM = "remount,size=64m,nr_inodes=9999"
QUICK = ["--window=32", "--eval-windows=8", "--new-tokens=4"]
CALIBRATION = ["--calibration-windows=8", "--calibration-window=32"]


@pytest.fixture
def small_disk(tmp_path):
    """Returns a function that mounts a folder of so many bytes or files, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(limit):
        command = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def command(folder, plays_dir, *more):
    small = tiny.config(plays_dir)
    train = dataclasses.replace(small.train, steps=8)
    study = dataclasses.replace(
        small.study, std_criteria=(), criteria=("magnitude",), seeds=(0,), scopes=("tensor",)
    )
    config = tiny.config_file(folder, dataclasses.replace(small, train=train, study=study))
    return [sys.executable, "-m", "swe_prune", "run", f"--config={config}", *more]


def fails(arguments, *said):
    begun = time.monotonic()
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("Tracking ")]
    lines = [line for line in lines if ": done before" not in line and "nats per" not in line]
    assert len(lines) == 1, ended.stderr
    for part in ("swe_prune: ", "no space is left", *said):
        assert part in lines[0]
    return time.monotonic() - begun


def remount(disk, options=ROOM):
    subprocess.run(["mount", "-o", options, str(disk)], check=True)


def one_sentence(capsys, arguments, *said):
    """Runs a command that a full disk ends: exit 1, one sentence, ten seconds of processor time."""
    begun = time.process_time()
    capsys.readouterr()
    assert cli.main([str(one) for one in arguments]) == 1
    assert time.process_time() - begun < 10
    found = [one for one in capsys.readouterr().err.splitlines() if "swe_prune: " in one]
    assert len(found) == 1
    for part in ("no space is left", *said):
        assert part in found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


COMMANDS = {
    "prune": ["--criterion=magnitude", "--sparsity=0.5", *CALIBRATION],
    "cut": ["--units=neurons", "--criterion=magnitude", "--sparsity=0.5", *CALIBRATION],
    "finetune": ["--steps=4", "--checkpoint-every=2", "--train-window=32", "--batch=4", "--track",
                 "--track-every=2"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
@pytest.mark.parametrize(
    ("name", "limit", "more"),
    [
        ("prune", "size=64k", ["--compress"]),
        ("cut", "nr_inodes=5", []),
        ("finetune", "size=64k", []),
    ],
)
def test_a_model_that_has_no_room_is_a_sentence_and_is_made_afterwards(
    tmp_path, place, small_disk, capsys, name, limit, more
):
    disk = small_disk(limit)
    text = "text" if name == "finetune" else "calibration"
    arguments = [name, f"--model={place.model}", *QUICK, *COMMANDS[name], *more]
    arguments += [f"--{text}={place.train}", f"--evaluation={place.held_out}"]
    full = [*arguments, f"--out={disk / 'out'}"]
    one_sentence(capsys, full, str(disk / "out"))
    assert not (disk / "out").exists()
    assert not list(disk.glob(".out*"))
    remount(disk)
    for one in (full, [*arguments, f"--out={tmp_path / 'whole'}"]):
        assert cli.main(one) == 0
    for path in (tmp_path / "whole").glob("[cm]o*.safetensors"):  # not the masks' header
        assert path.read_bytes() == (disk / "out" / path.name).read_bytes()
    assert not (disk / "out.work").exists()


@contextlib.contextmanager
def no_room(disk, kind):
    """Takes all that is left of a disk, in bytes or in files."""
    for begun in [*disk.rglob("*.orbax-checkpoint-tmp")]:  # the next write would have its room
        shutil.rmtree(begun, ignore_errors=True)
    fill = disk / "fill"
    fill.mkdir()
    with contextlib.suppress(OSError):
        for number in itertools.count():
            with open(fill / str(number), "wb", buffering=0) as file:
                while kind == "bytes":
                    file.write(bytes(4096))
    yield
    shutil.rmtree(fill)


def rows_of(work):
    with (work / "results.csv").open() as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
def test_every_phase_on_a_full_disk_is_a_sentence_and_goes_on(
    tmp_path, plays_dir, small_disk, capsys
):
    pytest.importorskip("matplotlib")
    disk = small_disk("size=64m,nr_inodes=9999")
    work, whole = (folder / "work" for folder in (disk, tmp_path))
    config = command(tmp_path, plays_dir)[-1]
    assert cli.main(["train", config, f"--workdir={work}"]) == 0
    for phase, kind, step in (
        ("prune", "bytes", "seed_0/cells/tensor-magnitude-0.5/masks"),
        ("prune", "files", "seed_0/cells/tensor-magnitude-0.5/masks"),
        ("finetune", "bytes", "checkpoint 2 in"),
        ("finetune", "files", "seed_0/control"),
        ("run", "files", "results.csv"),
        ("report", "bytes", "report/report.html"),
        ("evaluate", "bytes", "ledger.csv"),
    ):
        with no_room(disk, kind):
            one_sentence(capsys, [phase, f"--workdir={work}"], str(work), step)
        if kind == "files" and phase != "run":  # again, with room
            assert cli.main([phase, f"--workdir={work}"]) == 0
    for phase in ("train", "prune", "finetune"):
        assert cli.main([phase, config, f"--workdir={whole}"]) == 0
    assert rows_of(work) == rows_of(whole)
    assert len(rows_of(work)) == 1


def test_output_that_has_no_room_is_a_sentence(place, capsys, monkeypatch):
    arguments = ["plan", f"--model={place.model}", "--criterion=magnitude", "--sparsity=0.5"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        one_sentence(capsys, arguments, "'the output of this command'")
        monkeypatch.undo()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_space_and_quota_are_told_apart_however_they_are_said(code):
    raised = OSError(code, os.strerror(code))
    quoted = ValueError(f"RESOURCE_EXHAUSTED: writing failed: {os.strerror(code)} [os error]")
    for error in (raised, quoted):
        said = errors.why_unwritten(error)
        assert ("quota" in said, "no space" in said) == (
            code == errno.EDQUOT, code != errno.EDQUOT,
        )  # fmt: skip
    with pytest.raises(errors.RunError, match=r"x cannot be written: .*; make room"):  # noqa: SIM117
        with errors.writing("x", "make room"):
            raise raised


@pytest.mark.parametrize("files", range(2, 12))
def test_a_checkpoint_that_has_no_room_is_said_at_once(small_disk, files):
    disk = small_disk(f"nr_inodes={files}")
    begun = time.monotonic()
    with pytest.raises(errors.RunError, match=r"checkpoint 1 .* no space is left"):  # noqa: SIM117
        with contextlib.closing(checkpoint.Checkpoints(disk / "work")) as store:
            store.save(1, {"w": np.ones((2, 2))}, {})
    assert time.monotonic() - begun < 60  # orbax waits 300 seconds for folders


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=64k", "nr_inodes=40"])
def test_a_run_ends_in_one_sentence_and_goes_on(tmp_path, plays_dir, small_disk, limit):
    disk = small_disk(limit)
    arguments = command(tmp_path, plays_dir)
    fails([*arguments, f"--workdir={disk / 'work'}"], str(disk), "run the same command again")
    if limit != "size=64k":
        return
    remount(disk)
    for work in (disk / "work", tmp_path / "whole"):
        subprocess.run([*arguments, f"--workdir={work}"], check=True, capture_output=True)
    assert rows_of(disk / "work") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_dataset_that_cannot_be_prepared_is_one_sentence(tmp_path, plays_dir, small_disk):
    disk = small_disk("size=500k")
    more = (f"--workdir={tmp_path / 'work'}", f"--config.data.data_dir={disk}")
    fails(command(tmp_path, plays_dir, *more), str(disk))
