"""One phase of training with its checkpoints, its progress and its order of the text."""

import contextlib
from collections.abc import Callable
from typing import Any

from etils import epath
from jaxtyping import PyTree

from swe_prune.checkpoint import Checkpoints
from swe_prune.runtime.preemption import PREEMPTION
from swe_prune.study.experiment import Experiment
from swe_prune.study.recovery import Tuning
from swe_prune.training import loop
from swe_prune.training.phase import Phase
from swe_prune.training.progress import Progress
from swe_prune.training.state import TrainState

FINETUNE_DATA = 1 << 16  # added to the seed, so that fine-tuning sees the text in another order


def tune(
    experiment: Experiment,
    progress: Progress,
    tuning: Tuning,
    name: str,
    folder: epath.Path,
    state: TrainState,
    seed: int,
    step: Callable[..., Any] | None = None,
) -> tuple[TrainState, float]:
    """Returns the state after a recovery, or its control, and the seconds it took.

    Args:
        experiment: settings and data.
        progress: told of every step.
        tuning: the recovery.
        name: shown.
        folder: where its metrics and checkpoints go.
        state: at step 0; donated.
        seed: of the dense model.
        step: in place of the recovery's own, one that prunes too.
    """
    phase = experiment.phase(name, folder, tuning.settings, tuning.steps)
    return fit(
        experiment, progress, phase, state, step or tuning.step, data_seed=seed + FINETUNE_DATA
    )


def fit(
    experiment: Experiment,
    progress: Progress,
    phase: Phase,
    state: TrainState,
    step: Callable[..., Any],
    *,
    data_seed: int,
    sample: Callable[[PyTree], dict[str, Any]] | None = None,
) -> tuple[TrainState, float]:
    """Returns the state after a phase and its seconds, resuming from its own checkpoints."""
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if phase.checkpoint_every:
            checkpoints = stack.enter_context(
                contextlib.closing(
                    Checkpoints(phase.folder / "checkpoints", phase.keep_latest, phase.keep_every)
                )
            )
        advance = stack.enter_context(progress.phase(phase.name, phase.steps))
        stack.enter_context(PREEMPTION.defer())
        return loop.fit(
            phase,
            state,
            step,
            experiment.batches(data_seed),
            checkpoints=checkpoints,
            evaluate=experiment.validation_loss,
            sample=sample,
            progress=advance,
        )
