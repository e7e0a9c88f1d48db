"""A disk without room: one sentence that names the folder, and the same command goes on."""

import csv
import dataclasses
import subprocess
import sys
import time

import pytest
import tiny


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


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=64k", "nr_inodes=40"])
def test_a_run_ends_in_one_sentence_and_goes_on(tmp_path, plays_dir, small_disk, limit):
    disk = small_disk(limit)
    arguments = command(tmp_path, plays_dir)
    fails([*arguments, f"--workdir={disk / 'work'}"], str(disk), "run the same command again")
    if limit != "size=64k":
        return
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    for work in (disk / "work", tmp_path / "whole"):
        subprocess.run([*arguments, f"--workdir={work}"], check=True, capture_output=True)
    rows = []
    for work in (disk / "work", tmp_path / "whole"):
        with (work / "results.csv").open() as file:
            rows.append([{**row, "seconds": None} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_dataset_that_cannot_be_prepared_is_one_sentence(tmp_path, plays_dir, small_disk):
    disk = small_disk("size=500k")
    more = (f"--workdir={tmp_path / 'work'}", f"--config.data.data_dir={disk}")
    fails(command(tmp_path, plays_dir, *more), str(disk))
