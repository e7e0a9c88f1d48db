"""Two real processes of two devices each: the numbers of one, and what happens when one is lost."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from swe_prune import cli, study
from swe_prune.config import CalibrationConfig, CellConfig, PhaseConfig, StudyConfig
from swe_prune.runtime import storage
from swe_prune.study import saved
from swe_prune.training.metrics import read_lines

PROBE = Path(__file__).parent / "distributed_probe.py"
LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
TIMES = {"seconds", "tokens_per_second"}


def started(commands, **environment):
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "SWE_PRUNE_LOST_TIMEOUT": "8",
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(config, workdir, command="run", more=((), ()), which=(0, 1), **environment):
    """Starts process 0 and 1 of a run, or one of them."""
    shared = ["-m", "swe_prune", command, f"--config={config}", f"--workdir={workdir}"]
    shared.append(f"--coordinator=127.0.0.1:{free_port()}")
    commands = [[*shared, f"--process={i}/2", *more[i]] for i in which]
    return started(commands, **environment)


def finish(running, seconds=300):
    """Returns the exit code and what was said on standard error, of each."""
    ended = []
    for process in running:
        _, errors = process.communicate(timeout=seconds)
        ended.append((process.returncode, errors))
    return ended


def sentences(errors):
    return [line for line in errors.splitlines() if line.startswith("swe_prune: ")]


def lines_of(folder):
    return [
        {k: v for k, v in line.items() if k not in TIMES}
        for line in read_lines(folder / "seed_0/dense/metrics.jsonl")
    ]


def losses(folder):
    return [line["loss"] for line in lines_of(folder) if "loss" in line]


def settings(plays_dir, **changes):
    base = tiny.config(plays_dir)
    grid = StudyConfig(
        std_criteria=(), criteria=("swe", "random"), sparsities=(0.5,), scopes=("global",),
        seeds=(0,),
        cells=(
            CellConfig("wanda", sparsity=0.5, scope="row", recovery="none"),
            CellConfig("magnitude", sparsity=0.5, schedule="cubic", recovery_steps=6),
        ),
    )  # fmt: skip
    data = dataclasses.replace(base.data, batch=8)
    calibration = CalibrationConfig(windows=16, batch=8)
    return dataclasses.replace(
        base, study=grid, data=data, calibration=calibration, log_every=1, **changes
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory, plays_dir):
    return tiny.config_file(tmp_path_factory.mktemp("config"), settings(plays_dir))


@pytest.fixture(scope="module")
def together(tmp_path_factory, config):
    """The workdir of a whole run by two processes."""
    path = tmp_path_factory.mktemp("together")
    run = [LOCAL, "2", "--devices=2", "--", "run", f"--config={config}", f"--workdir={path}"]
    done = subprocess.run(
        ["bash", *run],
        env=os.environ | {"LAUNCH_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, config):
    """The same by this process, which has one device."""
    path = tmp_path_factory.mktemp("alone")
    for command in ("train", "prune", "finetune"):
        assert cli.main([command, f"--config={config}", f"--workdir={path}"]) == 0
    return path


def test_the_processes_know_each_other_and_share_the_rows():
    port = free_port()
    running = started([[PROBE, f"127.0.0.1:{port}", f"{i}/2"] for i in (0, 1)])
    said = []
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append(json.loads(output.splitlines()[-1]))
    for index, one in enumerate(said):
        assert one["index"] == index
        assert one["told"] == ["said by", 0]
        assert one["gathered"] == [0, 10]
        assert one["error"] == "no such thing"
        assert "process 1 has b = 1 and process 0 0" in one["differs"]
    assert sorted(said[0]["rows"] + said[1]["rows"]) == list(range(8))
    assert len(said[0]["rows"]) == 4


def test_two_processes_train_and_prune_as_one(plays_dir, tmp_path):
    made = settings(plays_dir)
    one_cell = dataclasses.replace(made.study, criteria=("swe",), cells=())
    config = tiny.config_file(tmp_path, dataclasses.replace(made, study=one_cell))
    together, alone = tmp_path / "together", tmp_path / "alone"
    for command in ("train", "prune"):
        for code, errors in finish(start(config, together, command)):
            assert code == 0, errors
        assert cli.main([command, f"--config={config}", f"--workdir={alone}"]) == 0
    assert_same_numbers(alone, together, 1)


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(alone, together):
    assert_same_numbers(alone, together, 4)
    assert (together / "report/report.html").exists()


def assert_same_numbers(alone, together, cells):
    assert len(losses(alone)) == 24
    # rtol: the devices add in another order, and the steps carry the difference on.
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    names = sorted(path.parent.name for path in alone.glob("seed_0/cells/*/result.json"))
    assert len(names) == cells
    for name in names:
        one, two = (
            json.loads((folder / f"seed_0/cells/{name}/result.json").read_text())
            for folder in (alone, together)
        )
        assert two["sparsity_prunable"] == one["sparsity_prunable"]
        for key in ("pruned_loss", "finetuned_loss"):
            assert (key in two) == (key in one)
            # A weight at the threshold may fall to either side of it.
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.slow
def test_their_checkpoint_gives_one_process_their_masks(together, config, tmp_path):
    shutil.copytree(together / "seed_0/dense", tmp_path / "seed_0/dense")
    shutil.copy(together / "config.json", tmp_path)
    assert cli.main(["prune", f"--config={config}", f"--workdir={tmp_path}"]) == 0
    one, two = (
        study.setup(study.workdir.config_of(folder), folder) for folder in (tmp_path, together)
    )
    compared = [cell for cell in one.cells if not cell.gradual]
    assert len(compared) == 3
    for cell in compared:
        masks = [jax.device_get(saved.load_masks(made, cell)) for made in (one, two)]
        if cell.recipe.criterion in ("swe", "random"):
            jax.tree.map(np.testing.assert_array_equal, *masks)
        else:  # calibrated in another order of addition
            kept = [np.concatenate([m.ravel() for m in jax.tree.leaves(one)]) for one in masks]
            assert np.mean(kept[0] != kept[1]) < 0.01


@pytest.mark.slow
def test_one_processs_checkpoint_goes_on_by_two(alone, config, tmp_path):
    shutil.copytree(alone / "seed_0/dense", tmp_path / "seed_0/dense")
    shutil.copy(alone / "config.json", tmp_path)
    folder = tmp_path / "seed_0/dense"
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints/24")
    (folder / "checkpoints/24.checksums").unlink()
    for code, errors in finish(start(config, tmp_path, "train")):
        assert code == 0, errors
    assert losses(tmp_path)[:20] == losses(alone)[:20]
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)


@pytest.fixture(scope="module")
def longer(tmp_path_factory, plays_dir):
    """A config whose dense phase is long enough to be disturbed."""
    train = PhaseConfig(steps=240, warmup=2, learning_rate=3e-3, eval_every=0, checkpoint_every=16)
    made = settings(plays_dir, train=train)
    shorter = dataclasses.replace(made.study, criteria=("swe",), cells=())
    made = dataclasses.replace(made, study=shorter)
    return tiny.config_file(tmp_path_factory.mktemp("config"), made)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, longer):
    path = tmp_path_factory.mktemp("undisturbed")
    for code, errors in finish(start(longer, path)):
        assert code == 0, errors
    return path


def outcome(folder):
    cells = {}
    for path in sorted(folder.glob("seed_0/cells/*/result.json")):
        result = storage.read_json(path)
        del result["seconds"]
        cells[path.parent.name] = result
    return lines_of(folder), cells


def child_of(process):
    """The process that works, of which the one started is the parent."""
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(tasks.read_text().split()[0])


def wait_until(ready, running, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert all(process.poll() is None for process in running), finish(running)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_a_step(folder):
    """Ready in the fifth step beyond those that were written before the start."""
    before = len(lines_of(folder))
    return lambda: len(lines_of(folder)) > before + 4


def in_a_checkpoint(folder):
    checkpoints = folder / "seed_0/dense/checkpoints"
    before = set(checkpoints.glob("*tmp*"))
    return lambda: set(checkpoints.glob("*tmp*")) - before


LOSSES = [
    (1, signal.SIGKILL, in_a_step, "process 1 on {host} has given no sign of life for 8 s"),
    (0, signal.SIGKILL, in_a_step, "process 0 is gone"),
    (1, signal.SIGKILL, in_a_checkpoint, "process 1 on {host} has given no sign of life"),
    (1, signal.SIGSTOP, in_a_step, "process 1 on {host} has given no sign of life for 8 s"),
    (0, signal.SIGSTOP, in_a_step, "process 0 has not answered for"),
]


@pytest.mark.slow
def test_when_one_is_lost_the_other_says_so_in_time_and_the_next_start_goes_on(
    longer, undisturbed, tmp_path
):
    """Of one run, process 1 dies, 0 dies, 1 dies in a checkpoint, 1 hangs and 0 hangs.

    Then it is preempted, and the last start ends it.
    """
    for lost, number, moment, said in LOSSES:
        ready = moment(tmp_path)
        running = start(longer, tmp_path, "train")
        wait_until(ready, running)
        worker = child_of(running[lost])
        os.kill(worker, number)
        (code, errors) = finish([running[1 - lost]], seconds=40)[0]
        assert code == 1, errors
        assert said.format(host=socket.gethostname()) in sentences(errors)[-1]
        if number == signal.SIGSTOP:
            os.kill(worker, signal.SIGKILL)
        assert finish([running[lost]])[0][0] == 128 + signal.SIGKILL
        assert lines_of(tmp_path) == lines_of(undisturbed)[: len(lines_of(tmp_path))]

    ready = in_a_step(tmp_path)
    running = start(longer, tmp_path, "train")
    wait_until(ready, running)
    running[1].terminate()  # the notice may come to any of them
    ended = finish(running)
    assert [code for code, _ in ended] == [75, 75]
    assert "preempted (SIGTERM)" in sentences(ended[0][1])[-1]
    for code, errors in finish(start(longer, tmp_path, "train")):
        assert code == 0, errors
    assert lines_of(tmp_path) == lines_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_one_that_never_comes_up_is_named(absent, longer, tmp_path):
    running = start(longer, tmp_path, which=(1 - absent,), SWE_PRUNE_JOIN_TIMEOUT="6")
    ((code, errors),) = finish(running, seconds=60)
    assert code == 1
    assert f"process {absent} of 2 did not come up within 6 s" in sentences(errors)[-1]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((("--config.log_every=3",), ()), "process 1 has log_every = 1 and process 0 3"),
        ((("--config.parallel.fsdp=3",),) * 2, "a mesh of 4 devices, got data 1 x fsdp 3"),
        ((("--config.data.batch=6",),) * 2, "config.data.batch = 6 cannot be divided"),
        (((), ("--config.train.stepz=6",)), "process 1: config.train has no setting 'stepz'"),
    ],
    ids=["config", "mesh", "batch", "one wrong"],
)
def test_bad_input_is_one_sentence_of_the_first_and_ends_all(more, said, config, tmp_path):
    ended = finish(start(config, tmp_path, more=more), seconds=60)
    assert [code for code, _ in ended] == [2, 2]
    (sentence,) = sentences(ended[0][1])
    assert said in sentence
    assert sentences(ended[1][1]) == []
    assert "Traceback" not in ended[0][1] + ended[1][1]


@pytest.mark.slow
def test_ten_random_kills_end_with_the_uninterrupted_runs_numbers(longer, undisturbed, tmp_path):
    rng = random.Random(0)
    for _ in range(10):
        waits = {"SWE_PRUNE_LOST_TIMEOUT": "3", "SWE_PRUNE_JOIN_TIMEOUT": "8"}
        running = start(longer, tmp_path, **waits)
        time.sleep(rng.uniform(1, 9))
        victim = running[rng.randrange(2)]
        victim.kill()  # the worker ends with its parent
        finish(running, seconds=60)
    for code, errors in finish(start(longer, tmp_path)):
        assert code == 0, errors
    assert outcome(tmp_path) == outcome(undisturbed)
