"""What would be done, and what it would cost: printed before any training."""

import collections
import time
from typing import Any

import jax
from rich.console import Console

from swe_prune import parallel, trajectory, tree
from swe_prune.models import phi3v
from swe_prune.study import grid
from swe_prune.study.experiment import Experiment, prune_rules
from swe_prune.training.progress import duration, print_line, tensor_table

TIMED_STEPS = 3
TIMED_TOKENS = 2048


def plan(experiment: Experiment, console: Console) -> None:
    """Prints the tensors and why they stay dense, the memory, the cells and an estimate of time."""
    config = experiment.config
    params = experiment.abstract_params
    tensors = [
        (name, leaf, _dense_reason(experiment, name, leaf))
        for name, leaf in tree.named_leaves(params)
    ]
    console.print(tensor_table(config.name, tensors))
    total = tree.size(params)
    prunable = experiment.prunable_weights()
    cells = grid.cells(config)
    rules = collections.Counter(
        cell.recipe.scope if cell.recipe.rate is None else "std" for cell in cells
    )
    lines = [
        f"{prunable:,} of {total:,} weights are prunable ({prunable / total:.1%}).",
        f"{memory_line(experiment)}; the weights themselves take {_bytes(4 * total)}.",
        f"Snapshots every {experiment.track_every} of {experiment.train_steps} steps, late mean "
        f"over snapshots {config.trajectory.window_start} to "
        f"{experiment.train_steps // experiment.track_every} with power {config.trajectory.power}.",
        f"{len(cells)} cells over seeds {', '.join(map(str, grid.seeds(config)))}: "
        + ", ".join(f"{n} by {rule!r}" for rule, n in rules.items())
        + f"; {_recoveries(experiment)}.",
        f"Devices: {', '.join(f'{axis} {n}' for axis, n in experiment.mesh.shape.items())}.",
        *experiment.undivided,
        "A mask makes weights zero, no file smaller and no dense matrix product faster; for that, "
        "whole rows, columns or neurons must be cut out.",
    ]
    for line in lines:
        print_line(console, line)
    print_line(console, _estimate(experiment))


def as_json(experiment: Experiment) -> dict[str, Any]:
    """Returns what `plan` prints as something JSON can hold; sizes in bytes, times in seconds."""
    config, params = experiment.config, experiment.abstract_params
    steps, per_step, _ = _timed(experiment)
    return {
        "name": config.name,
        "weights": tree.size(params),
        "prunable": experiment.prunable_weights(),
        "tensors": {
            name: {
                "shape": list(leaf.shape),
                "dense": _dense_reason(experiment, name, leaf) or None,
            }
            for name, leaf in tree.named_leaves(params)
        },
        "tracking": trajectory.memory(params, experiment.measures, experiment.prunable),
        "track_every": experiment.track_every,
        "train_steps": experiment.train_steps,
        "steps": steps,
        "seconds": per_step * steps,
        "seeds": list(grid.seeds(config)),
        "cells": [{"seed": cell.seed, "name": cell.name} for cell in grid.cells(config)],
        "devices": dict(experiment.mesh.shape),
        "undivided": experiment.undivided,
    }


def _recoveries(experiment: Experiment) -> str:
    """Returns how long the cells train after pruning, by kind of recovery."""
    tunings = experiment.tunings.values()
    usual = [f"{t.steps} fine-tuning steps each" for t in tunings if not t.recovery.name]
    return ", ".join(
        [*usual, *(f"{t.steps} steps of {t.recovery.name}" for t in tunings if t.recovery.name)]
    )


def memory_line(experiment: Experiment) -> str:
    """Returns one sentence on what tracking costs in memory, per measure."""
    memory = trajectory.memory(experiment.abstract_params, experiment.measures, experiment.prunable)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items())
    return (
        f"Tracking {', '.join(experiment.measures)} takes {_bytes(sum(memory.values()))}: {parts}"
    )


def _dense_reason(experiment: Experiment, name: str, leaf: Any) -> str:
    """Returns why a weight stays dense in every cell, or "" where it may be pruned."""
    reason = tree.dense_reason(name, leaf, *prune_rules(experiment.config))
    if not reason and phi3v.unused(experiment.config.model, name):
        return "in no computation"
    return reason


def _estimate(experiment: Experiment) -> str:
    """Returns a sentence on the time."""
    steps, per_step, batch = _timed(experiment)
    return (
        f"About {duration(per_step * steps)} on this machine for {steps:,} steps, evaluations and "
        f"compilation apart: {TIMED_STEPS} steps timed at batch {batch}, scaled to "
        f"{experiment.config.data.batch}; a full batch is often faster per token."
    )


def _timed(experiment: Experiment) -> tuple[int, float, int]:
    """Returns (steps in all, seconds of one, the batch it was timed at).

    The time is that of a few real steps at a batch of some 2,048 tokens.
    """
    config = experiment.config
    batch = min(config.data.batch, max(1, TIMED_TOKENS // config.window))
    ways = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    batch = -(-batch // ways) * ways  # the devices share it
    batch = min(batch, config.data.eval_batch)
    host = jax.device_get(experiment.validation[0])
    windows = parallel.shard_batch(jax.tree.map(lambda x: x[:batch], host), experiment.mesh)
    step = experiment.dense_step()
    state, _ = step(experiment.fresh_state(0), windows)
    jax.block_until_ready(state)
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        state, _ = step(state, windows)
    jax.block_until_ready(state)
    per_step = (time.perf_counter() - begun) / TIMED_STEPS * config.data.batch / batch
    cells = experiment.cells
    controls = {(c.seed, c.recovery): experiment.tuning_steps(c) for c in cells}
    steps = len(experiment.seeds) * experiment.train_steps + sum(controls.values())
    steps += sum(map(experiment.tuning_steps, cells))
    return steps, per_step, batch


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
