"""The host's side of training: feed the compiled step, watch, evaluate, save, resume.

The device is never waited for except to evaluate and to save: metrics are fetched one step late.
A phase that finds a checkpoint of its own goes on from it as if it had never stopped.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from swe_prune.errors import Preempted
from swe_prune.runtime.preemption import MESSAGE, PREEMPTION, PreemptionHandler
from swe_prune.training import metrics as metrics_lib
from swe_prune.training.phase import Phase
from swe_prune.training.state import TrainState
from swe_prune.training.step import Batch, Metrics


class BatchIterator(Protocol):
    """Batches without end whose position can be saved: what Grain's iterators are."""

    def __next__(self) -> Batch:
        """Returns the next batch."""
        ...

    def get_state(self) -> Any:
        """Returns the position as something JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        ...


class Saver(Protocol):
    """Where the states of one phase are kept: what `checkpoint.Checkpoints` is."""

    def latest(self) -> int | None:
        """Returns the number of the newest checkpoint, or None."""
        ...

    def save(self, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all."""
        ...

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Returns the newest."""
        ...


def fit(
    phase: Phase,
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: BatchIterator,
    *,
    checkpoints: Saver | None = None,
    evaluate: Callable[[PyTree], float] | None = None,
    sample: Callable[[PyTree], dict[str, Any]] | None = None,
    progress: Callable[[int, dict[str, float]], None] = lambda step, shown: None,
    notice: PreemptionHandler = PREEMPTION,
) -> tuple[TrainState, float]:
    """Returns (state after the last step, seconds of this phase over all its sessions).

    Args:
        phase: what to run and where to keep it.
        state: at step 0; it is donated. A checkpoint of the phase takes its place.
        step: the compiled train step.
        batches: positioned at its start; a checkpoint's position takes its place.
        checkpoints: of this phase; None: a phase that is killed starts again.
        evaluate: validation loss of parameters.
        sample: a few weights of every tensor, for the report's trajectories.
        progress: called with the step and what is known of it.
        notice: of preemption; when it is given, one more checkpoint is written.

    Raises:
        Preempted: notice was given, and the state after the step in hand is saved.
        RunError: the loss or gradient was not finite for too many steps in a row; no later
            checkpoint than the last good one exists.
    """
    before = 0.0
    if checkpoints is not None and checkpoints.latest() is not None:
        state, extra = checkpoints.restore(state)
        batches.set_state(extra["batches"])
        before = extra["seconds"]
    first = int(state.step)
    log = metrics_lib.JsonLines(phase.folder / "metrics.jsonl", first)
    samples = metrics_lib.JsonLines(phase.folder / "trajectory.jsonl", first) if sample else None
    if sample and samples is not None and first == 0:
        samples.write(0, {"values": jax.device_get(sample(state.params))})
    meter = metrics_lib.MetricsLogger(phase, first, log, progress)
    begun = time.perf_counter()

    def due(every: int, number: int) -> bool:
        return bool(every) and (number % every == 0 or number == phase.steps)

    def save(number: int) -> None:
        assert checkpoints is not None
        for lines in filter(None, (log, samples)):
            lines.flush()
        seconds = before + time.perf_counter() - begun
        checkpoints.save(number, state, {"batches": batches.get_state(), "seconds": seconds})

    for number in range(first + 1, phase.steps + 1):
        if notice.given():  # since the step before, which is saved unless it has just been
            meter.flush()
            saved = checkpoints is None or number - 1 == (checkpoints.latest() or 0)
            if not saved and not meter.last_step_skipped:
                save(number - 1)
            raise Preempted(MESSAGE)
        batch = next(batches)
        state, computed = step(state, batch)
        meter.enqueue(number, computed, tokens=batch["targets"].size)
        if sample and samples is not None and number % phase.sample_every == 0:
            samples.write(number, {"values": jax.device_get(sample(state.params))})
        if evaluate is not None and due(phase.eval_every, number):
            meter.flush()
            meter.evaluated(number, evaluate(state.params))
        if checkpoints is not None and due(phase.checkpoint_every, number):
            meter.flush()
            if meter.last_step_skipped and number != phase.steps:
                continue  # what it may be in trouble for must not be saved
            save(number)
    meter.flush()
    for lines in filter(None, (log, samples)):
        lines.flush()
    jax.block_until_ready(state)
    return state, before + time.perf_counter() - begun
