"""One phase of training that resumes from its own checkpoints."""

import contextlib
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from swe_prune.checkpoint import Checkpoints
from swe_prune.runtime.preemption import PREEMPTION
from swe_prune.training import loop
from swe_prune.training.phase import Phase
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState


def fit(
    phase: Phase,
    state: TrainState,
    step: Callable[..., Any],
    batches: loop.BatchIterator,
    progress: Progress,
    *,
    evaluate: Callable[[PyTree], float] | None = None,
    sample: Callable[[PyTree], dict[str, Any]] | None = None,
) -> tuple[TrainState, float]:
    """Returns the state after a phase, and its seconds over all the sessions it took.

    Checkpoints are in the phase's folder. A phase without a checkpoint cadence starts again when
    it is killed.

    Args:
        phase: Length, cadences and folder of the phase.
        state: State at step 0; donated.
        step: Compiled train step of (state, batch).
        batches: Batches from their start; a checkpoint's position takes its place.
        progress: Display of the steps.
        evaluate: Function from parameters to the validation loss.
        sample: Function from parameters to the weights whose trajectories are written.

    Raises:
        Preempted: The machine is taken away; the state is saved.
        RunError: The loss or gradient was not finite for too many steps in a row.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if phase.checkpoint_every:
            folder = phase.folder / "checkpoints"
            store = Checkpoints(folder, phase.keep_latest, phase.keep_every)
            checkpoints = stack.enter_context(contextlib.closing(store))
        advance = stack.enter_context(progress.phase(phase.name, phase.steps))
        # A SIGTERM waits for the step in hand; the loop saves and raises.
        stack.enter_context(PREEMPTION.defer())
        return loop.fit(
            phase,
            state,
            step,
            batches,
            checkpoints=checkpoints,
            evaluate=evaluate,
            sample=sample,
            progress=advance,
        )
