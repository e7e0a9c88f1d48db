"""Joules per token of the models of a cut, measured in turns, and what tracking takes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from swe_prune import ledger
from swe_prune.evaluation import latency
from swe_prune.models import gpt
from swe_prune.study.cut_shapes import workload
from swe_prune.study.experiment import Experiment
from swe_prune.training.progress import Progress


def rival(
    losses: Mapping[str, Sequence[float]], shapes: Mapping[str, float], margin: float
) -> float | None:
    """Returns how many units the smallest rival of the pruned model lacks, as a share.

    A rival is trained from random weights and its loss is within `margin` of the pruned model's;
    None if there is none.

    Args:
        losses: Loss of each batch, by model; "recovered" is the pruned one.
        shapes: Share of the units that each shape lacks, by name.
        margin: Loss by which it may be worse, in nats per token.

    >>> rival({"recovered": [2.0], "a": [2.1], "b": [2.0]}, {"a": 0.5, "b": 0.25}, 0.01)
    0.25
    """
    limit = float(np.mean(losses["recovered"])) + margin
    able = [share for name, share in shapes.items() if float(np.mean(losses[name])) <= limit]
    return max(able, default=None)


def measure(
    experiment: Experiment, models: Mapping[str, tuple[Any, Any]], progress: Progress
) -> dict[str, Any]:
    """Returns the windows of each model, the workload, the meters and the idle power, as JSON."""
    settings, load = experiment.config.ledger, workload(experiment.config)
    meters = ledger.Ledger().meters
    works = {
        name: latency.compiled(model, gpt.fuse(params), load, name).tokens
        for name, (model, params) in models.items()
    }
    found = _windows(experiment, works, meters, settings.windows, progress)
    idle = ledger.idle_watts(meters, min(1.0, settings.window_seconds) or 0.1)
    return {
        **dataclasses.asdict(load),
        "context": experiment.config.model.context,
        "device": jax.devices()[0].device_kind,
        "source": "+".join(dict.fromkeys(meter.source for meter in meters)),
        "seconds": settings.window_seconds,
        "idle_watts": dataclasses.asdict(idle),
        "windows": {
            name: [dataclasses.asdict(one) for one in some] for name, some in found.items()
        },
    }


def tracking(experiment: Experiment, seed: int) -> list[float]:
    """Returns the energy of training with tracking over that without, in windows of each in turns.

    A window has whole cadences of snapshots, each with one; a quarter of the windows of a model,
    at least two.
    """
    settings, batch = experiment.config.ledger, next(experiment.batches(seed))
    state = experiment.fresh_state(seed)
    states = {"tracked": state, "untracked": dataclasses.replace(_copied(state), stats=None)}
    step = {"tracked": experiment.dense_step(), "untracked": experiment.train_step}

    def work(name: str) -> Callable[[], int]:
        def run() -> int:
            for _ in range(experiment.track_every):
                states[name], metrics = step[name](states[name], batch)
            jax.block_until_ready((states[name], metrics))
            return experiment.tokens(experiment.track_every)

        return run

    count = max(2, settings.windows // 4)
    found = _windows(
        experiment, {name: work(name) for name in states}, ledger.Ledger().meters, count, None
    )
    pairs = zip(found["tracked"], found["untracked"], strict=True)
    return [one.per_token.value / other.per_token.value for one, other in pairs]


def _copied(state: Any) -> Any:
    # The step takes over its state, so the two may share no array.
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def _windows(
    experiment: Experiment,
    works: Mapping[str, Callable[[], int]],
    meters: Sequence[Any],
    count: int,
    progress: Progress | None,
) -> dict[str, list[ledger.Window]]:
    if progress is not None:
        seconds = count * len(works) * experiment.config.ledger.window_seconds
        progress.say(f"{count} windows of {', '.join(works)} in turns, {seconds:,.0f} s")
    return ledger.windows(
        works, meters, count=count, seconds=experiment.config.ledger.window_seconds
    )
