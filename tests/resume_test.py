"""kill -9 at any moment, the same command again: the numbers are those of an undisturbed run."""

import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny

from swe_prune import cli
from swe_prune.training.metrics import read_lines

TIMES = {"seconds", "tokens_per_second"}


def start(folder, config):
    command = [sys.executable, "-m", "swe_prune", "run"]
    command += [f"--config={config}", f"--workdir={folder}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(folder, config):
    """The same command in this process, which has imported everything already."""
    assert cli.main(["run", f"--config={config}", f"--workdir={folder}"]) == 0


def outcome(folder):
    """Returns everything that a run measured, but for the clock."""
    with (folder / "results.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    lines = {
        str(path.relative_to(folder)): [
            {k: v for k, v in line.items() if k not in TIMES} for line in read_lines(path)
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }
    return rows, lines


def wait_for(process, ready, seconds=300):
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_a_preempted_run_saves_once_more_says_so_and_ends_bit_identical(tmp_path, plays_dir):
    settings = tiny.config(plays_dir)
    train = dataclasses.replace(settings.train, steps=1200, checkpoint_every=600)
    study = dataclasses.replace(
        settings.study, std_criteria=(), criteria=("swe",), seeds=(0,), scopes=("global",)
    )
    config = tiny.config_file(tmp_path, dataclasses.replace(settings, train=train, study=study))
    undisturbed, preempted = tmp_path / "undisturbed", tmp_path / "preempted"
    run(undisturbed, config)

    process = start(preempted, config)
    metrics = preempted / "seed_0/dense/metrics.jsonl"
    wait_for(process, lambda: len(read_lines(metrics)) > 5)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith(
        "swe_prune: preempted (SIGTERM); run the same command"
    )
    (saved,) = (preempted / "seed_0/dense/checkpoints").glob("*.checksums")
    assert 20 <= int(saved.stem) < 600
    run(preempted, config)
    assert outcome(preempted) == outcome(undisturbed)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("std_criteria", "seeds"), [((), (0,)), (("swe",), (0, 1))])
def test_a_run_killed_at_three_moments_ends_bit_identical(std_criteria, seeds, tmp_path, plays_dir):
    settings = tiny.config(plays_dir)
    study = dataclasses.replace(
        settings.study,
        std_criteria=std_criteria,
        criteria=("swe", "random"),
        seeds=seeds,
        scopes=("global",),
    )
    config = tiny.config_file(tmp_path, dataclasses.replace(settings, study=study))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, config)

    moments = (
        lambda: (killed / "seed_0/dense/checkpoints/8.checksums").exists(),  # between checkpoints
        lambda: any(killed.glob("seed_0/dense/checkpoints/16*")),  # while one is written
        lambda: any(killed.glob("seed_0/cells/*/checkpoints/2*")),  # in the middle of a cell
    )
    rng = random.Random(0)
    for moment in moments:
        process = start(killed, config)
        wait_for(process, moment)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    run(killed, config)
    assert outcome(killed) == outcome(undisturbed)
