"""Host side of training: feeds the compiled step, logs, evaluates, saves and resumes.

The host waits for the device only to evaluate and to save; metrics are fetched one step late. A
phase that finds its own checkpoint continues from it as if it had never stopped.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from swe_prune.errors import Preempted
from swe_prune.runtime.preemption import PREEMPTION, PreemptionHandler
from swe_prune.training import metrics as metrics_lib
from swe_prune.training.phase import Phase
from swe_prune.training.state import TrainState
from swe_prune.training.step import Batch, Metrics


class BatchIterator(Protocol):
    """Endless iterator over batches whose position can be saved, such as Grain's iterators."""

    def __next__(self) -> Batch:
        """Returns the next batch."""
        ...

    def get_state(self) -> Any:
        """Returns the position as a JSON-serializable value."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a position."""
        ...


class Saver(Protocol):
    """Storage for the states of one phase, such as `checkpoint.Checkpoints`."""

    def latest(self) -> int | None:
        """Returns the number of the newest checkpoint, or None."""
        ...

    def save(self, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        """Writes a checkpoint atomically."""
        ...

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Returns the newest checkpoint."""
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
    preemption: PreemptionHandler = PREEMPTION,
) -> tuple[TrainState, float]:
    """Runs a phase of training.

    Args:
        phase: Settings of the phase.
        state: State at step 0, which is donated. A checkpoint of the phase replaces it.
        step: Compiled train step.
        batches: Iterator at its start. A checkpoint of the phase sets its position.
        checkpoints: Storage for the checkpoints of this phase. If None, a phase that is killed
            starts again.
        evaluate: Function from parameters to the validation loss.
        sample: Function from parameters to a few weights of every tensor, for the report's
            trajectories.
        progress: Callback that receives every step and its values.
        preemption: Handler that says whether to stop; one more checkpoint is written before
            stopping.

    Returns:
        The state after the last step, and the seconds of this phase over all its sessions.

    Raises:
        Preempted: If the process was preempted; the state after the last step is saved.
        RunError: If the loss or gradient was not finite for too many consecutive steps; the newest
            checkpoint is the last finite one.
    """
    # Resume from the newest checkpoint of this phase, if there is one.
    before = 0.0
    if checkpoints is not None and checkpoints.latest() is not None:
        state, extra = checkpoints.restore(state)
        batches.set_state(extra["batches"])
        before = extra["seconds"]
    # Lines after the step to resume from are dropped when the files are opened.
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
        # Stop here if preempted, after saving the previous step unless it is saved already.
        if preemption.given():
            meter.flush()
            saved = checkpoints is None or number - 1 == (checkpoints.latest() or 0)
            if not saved and not meter.last_step_skipped:
                save(number - 1)
            raise Preempted(preemption.why)
        # Dispatch the step; the metrics of the previous one are fetched while it computes.
        batch = next(batches)
        state, computed = step(state, batch)
        meter.enqueue(number, computed, tokens=batch["targets"].size)
        # Sample, evaluate and save when due; the last two wait for the device.
        if sample and samples is not None and number % phase.sample_every == 0:
            samples.write(number, {"values": jax.device_get(sample(state.params))})
        if evaluate is not None and due(phase.eval_every, number):
            meter.flush()
            meter.evaluated(number, evaluate(state.params))
        if checkpoints is not None and due(phase.checkpoint_every, number):
            meter.flush()
            if meter.last_step_skipped and number != phase.steps:
                continue  # a state that may be diverging must not be saved
            save(number)
    meter.flush()
    for lines in filter(None, (log, samples)):
        lines.flush()
    jax.block_until_ready(state)
    return state, before + time.perf_counter() - begun
