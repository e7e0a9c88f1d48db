"""The schedule of movement pruning: of the share that is kept, or of a threshold."""

import dataclasses
from typing import Any

from swe_prune.errors import InputError
from swe_prune.schedules.steps import Step, check_share, check_step, due_every, ramp


@dataclasses.dataclass(frozen=True)
class MovementSchedule:
    """The ramp of movement pruning, between two warm-ups: of the kept share v, or of a threshold τ.

    value(t) = final + (initial − final) (1 − p)³, where p runs from 0 at the end of the first
    `initial_warmup` · `warmup` steps to 1 at the start of the last `final_warmup` · `warmup` ones.
    Hard movement: v from 1 to its final share. Soft: τ from 0 to 0.1. Sanh, Wolf and Rush (NeurIPS
    2020); Lagunas et al. (EMNLP 2021).

    Args:
        final: Value of v or τ at the end, in [0, 1].
        steps: Number of steps of the whole training.
        warmup: Learning rate's warm-up in steps, the unit of the two others.
        initial: Value of v or τ at first, in [0, 1].
        initial_warmup: Number of warm-ups for which the value stays `initial`.
        final_warmup: Number of warm-ups for which the value is `final` at the end.

    Raises:
        InputError: A value outside [0, 1], or warm-ups that leave no step between them.

    >>> schedule = MovementSchedule(final=0.15, steps=1000, warmup=100)
    >>> schedule.value(100), round(schedule.value(450), 6), schedule.value(800)
    (1.0, 0.25625, 0.15)
    """

    final: float
    steps: int
    warmup: int
    initial: float = 1.0
    initial_warmup: int = 1
    final_warmup: int = 2

    def __post_init__(self):
        check_share("final", self.final, closed=True)
        check_share("initial", self.initial, closed=True)
        for name in ("warmup", "initial_warmup", "final_warmup"):
            check_step(name, getattr(self, name))
        check_step("steps", self.steps, least=1)
        if self._begin >= self._end:
            raise InputError(
                f"warm-ups of {self._begin} and {self.steps - self._end} steps leave none of "
                f"{self.steps} for the ramp; shorten them or train longer"
            )

    @property
    def _begin(self) -> int:
        return self.initial_warmup * self.warmup

    @property
    def _end(self) -> int:
        return self.steps - self.final_warmup * self.warmup

    def value(self, step: Step) -> Any:
        """Returns v, or τ, at a step."""
        return ramp(step, self.initial, self.final, self._begin, self._end)

    def sparsity(self, step: Step) -> Any:
        """Returns 1 − v, of hard movement."""
        return ramp(step, 1 - self.initial, 1 - self.final, self._begin, self._end)

    def penalty(self, step: Step, final: float) -> Any:
        """Returns λ = `final` · τ / final τ, the weight of soft movement's penalty.

        Raises:
            InputError: The final τ is 0.
        """
        if self.final == 0:
            raise InputError("a final threshold of 0 gives the penalty no scale; raise it above 0")
        return self.value(step) * (final / self.final)

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is one of training: movement renews its masks at every one."""
        return due_every(step, 0, self.steps, 1)

    def due_steps(self) -> tuple[int, ...]:
        """Returns 0, 1, …, `steps`."""
        return tuple(range(self.steps + 1))
