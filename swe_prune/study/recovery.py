"""The training after pruning, and that of its control: which learning rates, for how long."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import linen as nn

from swe_prune.config import Config, PhaseConfig, to_steps
from swe_prune.errors import InputError
from swe_prune.study.grid import Recovery
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import step as step_lib
from swe_prune.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A recovery, ready to run; the optimizer's moments start at 0 in all of them.

    Attributes:
        recovery: Kind and length of the recovery.
        settings: Settings of the phase whose learning rates it takes.
        steps: Number of steps.
        optimizer: Optax chain.
        step: Compiled train step.
        compile: Function that makes the train step of another optimizer, forward function or
            sharding; see `training.step.compile_train_step`.
    """

    recovery: Recovery
    settings: PhaseConfig
    steps: int
    optimizer: optax.GradientTransformation
    step: Callable[..., Any]
    compile: Callable[..., Callable[..., Any]]


def build(
    config: Config,
    recovery: Recovery,
    model: nn.Module,
    *,
    train_steps: int,
    epoch: int,
    place: Callable[[TrainState], TrainState] = lambda state: state,
    frozen_in: Callable[[PhaseConfig], Callable[[str], bool] | None] = lambda phase: None,
) -> Tuning:
    """Returns a recovery's optimizer and compiled step; see `config.CellConfig` for the kinds.

    Args:
        config: Settings of the experiment.
        recovery: Any recovery but "none".
        model: Model to train.
        train_steps: Number of steps of the dense phase.
        epoch: Number of steps in one pass over the training text.
        place: Function that lays a state out over the devices.
        frozen_in: Function from a phase to a rule that says, by name, whether a weight stays
            unchanged in it. None as the rule: all weights change.

    Raises:
        InputError: No step, or a rewinding to before the dense phase began.
    """
    given = config.finetune.steps if recovery.steps is None else recovery.steps
    steps = to_steps(given, epoch=epoch)
    if steps < 1:
        raise InputError(f"recovery {recovery.kind!r} has {steps} steps; give at least one")
    settings = config.finetune
    if recovery.kind == "rewarm":
        settings = dataclasses.replace(settings, learning_rate=config.train.learning_rate)
    early = train_steps - steps
    if recovery.kind in ("rewind", "rewind_weights"):
        if early < 0:
            raise InputError(
                f"recovery {recovery.kind!r} goes back {steps} steps and the dense phase has "
                f"{train_steps}; give recovery_steps of at most as many"
            )
        if recovery.kind == "rewind_weights":
            _check_retained(config, early, train_steps)
        cadence = {key: getattr(settings, key) for key in ("eval_every", "checkpoint_every")}
        settings = dataclasses.replace(config.train, **cadence)
        frozen = frozen_in(settings)
        optimizer = optimizer_lib.build(settings, train_steps, start=early, frozen=frozen)
    else:
        frozen = frozen_in(settings)
        optimizer = optimizer_lib.build(settings, steps, frozen=frozen)
    forward = None if frozen is None else optimizer_lib.stop_frozen(frozen)

    def compile(other: optax.GradientTransformation, **how: Any) -> Callable[..., Any]:
        how = {"place": place, "forward": forward} | how
        return step_lib.compile_train_step(model, other, accumulate=settings.accumulate, **how)

    return Tuning(recovery, settings, steps, optimizer, compile(optimizer), compile)


def _check_retained(config: Config, early: int, train_steps: int) -> None:
    """Raises InputError where the checkpoint to rewind the weights to is not retained."""
    saved = to_steps(config.train.checkpoint_every, total=train_steps)
    kept = to_steps(config.train.keep_every, total=train_steps)
    if not kept or early == 0 or early % saved or early % kept:
        raise InputError(
            f"recovery 'rewind_weights' starts from the dense checkpoint of step {early}, which is "
            f"not retained; give train.checkpoint_every and train.keep_every that divide {early}"
            if early
            else "recovery 'rewind_weights' cannot go back to step 0; give fewer recovery_steps"
        )


def check_long_enough(schedule: str, steps: int) -> None:
    """Raises InputError for a recovery too short to prune during it."""
    if steps < 2:
        raise InputError(
            f"schedule {schedule!r} prunes during a recovery, of which {steps} step is too short; "
            "give 2 or more"
        )
