"""An experiment on eight devices: the loss curve, masks and checkpoints of one device."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from swe_prune import tree
from swe_prune.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    StudyConfig,
    TrajectoryConfig,
)
from swe_prune.study import Workdir, claim, phases, saved, setup
from swe_prune.training.metrics import read_lines
from swe_prune.training.progress import Progress

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
LAYOUTS = {
    "data": ParallelConfig(),
    "fsdp": ParallelConfig(fsdp=8),
    "fsdp and tensor": ParallelConfig(fsdp=4, tensor=2),
}
SWITCHED = {
    "accumulated over data": (ParallelConfig(data=4, tensor=2), {}, 2),
    "accumulated over fsdp": (ParallelConfig(fsdp=2, tensor=4), {}, 4),
    "all switches": (LAYOUTS["fsdp and tensor"], {"remat": True, "scan_layers": True}, 2),
}
"""Layout, switches of the model, parts of a batch: each part is a row or more for each device."""

SCRIPT = "from sharded_experiment_test import single; import sys; single(*sys.argv[1:])"


def settings(text, parallel=None):
    return Config(
        model=ModelConfig(layers=2, heads=2, width=16, context=16),
        data=DataConfig(dataset=str(text), batch=8, eval_windows=8, eval_batch=8),
        train=PhaseConfig(steps=12, warmup=2, learning_rate=3e-3, checkpoint_every=6),
        finetune=PhaseConfig(steps=2, warmup=1, eval_every=0, checkpoint_every=0),
        trajectory=TrajectoryConfig(every=3),
        study=StudyConfig(
            std_criteria=("swe",), std_rates=(1.0,), criteria=("swe", "magnitude_curvature"),
            sparsities=(0.5,), scopes=("tensor", "global"), seeds=(0,),
        ),
        parallel=parallel or ParallelConfig(),
        log_every=1,
    )  # fmt: skip


def run(config, path, *commands):
    experiment = setup(config, Path(path))
    with claim(experiment.workdir, config):
        for command in commands:
            command(experiment, Progress())
    return experiment


def single(text, path):
    run(settings(text), path, phases.train, phases.prune)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = np.random.default_rng(0).choice(["sparse", "dense", "mask", "weight"], 3000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    """A workdir that a process with one device trained and pruned in."""
    path = tmp_path_factory.mktemp("alone")
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(text), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Workdir(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_curve_is_that_of_one_device(layout, alone, text, tmp_path):
    experiment = run(settings(text, LAYOUTS[layout]), tmp_path, phases.train)
    assert_same_curve(experiment.workdir, alone)


@pytest.mark.parametrize("case", SWITCHED)
def test_with_switches_it_is_that_of_one_device_without(case, alone, text, tmp_path):
    layout, switches, accumulate = SWITCHED[case]
    config = settings(text, layout)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **switches),
        train=dataclasses.replace(config.train, accumulate=accumulate),
    )
    experiment = run(config, tmp_path, phases.train)
    assert_same_curve(experiment.workdir, alone)


def assert_same_curve(got, expected):
    curves = [
        [line["loss"] for line in read_lines(work.dense(0) / "metrics.jsonl") if "loss" in line]
        for work in (got, expected)
    ]
    assert len(curves[1]) == 12
    # rtol: the devices add in another order, and twelve steps carry the difference on.
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_one_devices_checkpoint_the_masks_are_the_same(layout, alone, text, tmp_path):
    shutil.copytree(alone.dense(0), Workdir(tmp_path).dense(0))
    shutil.copy(alone.path / "config.json", tmp_path)
    config = settings(text, LAYOUTS[layout])
    experiment = run(config, tmp_path, phases.prune)
    one = dataclasses.replace(experiment, workdir=alone)
    assert len(experiment.cells) == 5
    for cell in experiment.cells:
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(saved.load_masks(experiment, cell)),
            jax.device_get(saved.load_masks(one, cell)),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_lies_where_its_weight_lies(layout, text, tmp_path):
    experiment = setup(settings(text, LAYOUTS[layout]), tmp_path)
    state = experiment.fresh_state(0)
    batch = next(experiment.batches(0))
    assert len(batch["inputs"].sharding.device_set) == 8
    after, _ = experiment.train_step(experiment.fresh_state(0), batch)
    wanted = {name: leaf.sharding for name, leaf in tree.named_leaves(experiment.abstract_params)}
    moments = after.opt_state[1][0]
    assert after.stats is not None
    for part in (state.params, after.params, moments.mu, moments.nu):
        for name, leaf in tree.named_leaves(part):
            assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
    for buffer in after.stats.buffers.values():
        for name, leaf in tree.named_leaves(buffer):
            assert leaf is None or leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
    kernel = after.params["block_0"]["mlp"]["up"]["kernel"]
    shards = {"data": 1, "fsdp": 8, "fsdp and tensor": 8}[layout]
    assert kernel.addressable_shards[0].data.size == kernel.size // shards


def test_a_checkpoint_goes_on_with_another_layout(alone, text, tmp_path):
    """Eight devices by fsdp stop half way, as one device by data goes on."""
    shutil.copytree(alone.dense(0), Workdir(tmp_path).dense(0))
    shutil.copy(alone.path / "config.json", tmp_path)
    folder = Workdir(tmp_path).dense(0)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints/12")
    (folder / "checkpoints/12.checksums").unlink()
    run(settings(text, LAYOUTS["fsdp and tensor"]), tmp_path, phases.train)
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    expected = read_lines(alone.dense(0) / "metrics.jsonl")
    expected = [line["loss"] for line in expected if "loss" in line]
    assert losses[:6] == expected[:6]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
