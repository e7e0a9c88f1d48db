"""Sparsity schedules: one-shot, cubic, iterative and constant."""

import dataclasses
import math
from typing import Any, Protocol

from swe_prune.errors import InputError
from swe_prune.schedules.steps import (
    LAST_STEP,
    Step,
    as_float,
    check_share,
    check_step,
    due_every,
    numbers,
    ramp,
    result,
)


class Schedule(Protocol):
    """Interface of a schedule; custom classes with these methods can be used too."""

    def sparsity(self, step: Step, /) -> Any:
        """Returns the sparsity after the update at a step."""
        ...

    def is_due(self, step: Step, /) -> Any:
        """Returns whether masks are updated at a step."""
        ...

    def due_steps(self) -> tuple[int, ...]:
        """Returns the steps at which masks are updated, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class OneShot:
    """One-shot schedule: sparsity 0 before step `at`, and `final` from `at` on.

    Attributes:
        final: Final sparsity, in [0, 1).
        at: Step at which everything is pruned.

    Raises:
        InputError: If the sparsity is outside [0, 1), or the step is negative.

    >>> OneShot(0.5, at=100).sparsity(99), OneShot(0.5, at=100).sparsity(100)
    (0.0, 0.5)
    """

    final: float
    at: int

    def __post_init__(self):
        check_share("final", self.final)
        check_step("at", self.at)

    def sparsity(self, step: Step) -> Any:
        """Returns 0 before `at`, and `final` from `at` on."""
        xp, step = numbers(step)
        return result(xp, xp.where(step >= self.at, self.final, 0.0))

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is `at`."""
        xp, step = numbers(step)
        return result(xp, step == self.at)

    def due_steps(self) -> tuple[int, ...]:
        """Returns `(at,)`."""
        return (self.at,)


@dataclasses.dataclass(frozen=True)
class Cubic:
    """Cubic schedule: s(t) = final + (initial − final) (1 − p)³.

    p = clip((t − begin) / (end − begin), 0, 1). Masks are updated at `begin`, every `every` steps
    after it, and always at `end`, so that `final` is reached.
    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).

    Attributes:
        final: Final sparsity, in [0, 1).
        begin: First step of the ramp.
        end: Last step of the ramp.
        every: Number of steps between updates of the masks.
        initial: Initial sparsity, in [0, 1).

    Raises:
        InputError: If a sparsity is outside [0, 1), `final` is below `initial`, `end` is not after
            `begin`, or a step is not a valid integer.

    >>> Cubic(0.9, begin=0, end=1000, every=250).sparsity(250)
    0.5203125
    """

    final: float
    begin: int
    end: int
    every: int
    initial: float = 0.0

    def __post_init__(self):
        check_share("final", self.final)
        check_share("initial", self.initial)
        check_step("begin", self.begin)
        check_step("end", self.end, least=self.begin + 1, why=", after begin")
        check_step("every", self.every, least=1)
        if self.final < self.initial:
            raise InputError(
                f"final must be at least initial = {self.initial!r}, got {self.final!r}; a ramp "
                "never restores weights"
            )

    def sparsity(self, step: Step) -> Any:
        """Returns s(t), also at steps without an update of the masks."""
        return ramp(step, self.initial, self.final, self.begin, self.end)

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is one of `due_steps()`."""
        return due_every(step, self.begin, self.end, self.every)

    def due_steps(self) -> tuple[int, ...]:
        """Returns begin, begin + every, …, end."""
        return (*range(self.begin, self.end, self.every), self.end)


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Iterative schedule: each round prunes the same fraction of the remaining weights.

    After round r of n the sparsity is 1 − (1 − final)^(r/n). The first round is at step `begin` and
    the others follow every `every` steps; training or rewinding between them is up to the loop.
    Han et al. (NeurIPS 2015), Frankle and Carbin (ICLR 2019).

    Attributes:
        final: Final sparsity, in [0, 1).
        rounds: Number of rounds n.
        every: Number of steps between rounds.
        begin: Step of the first round.

    Raises:
        InputError: If the sparsity is outside [0, 1), there is no round, or a step is not a valid
            integer.

    >>> [round(Iterative(0.488, rounds=3, every=10).sparsity(t), 9) for t in (0, 10, 20)]
    [0.2, 0.36, 0.488]
    """

    final: float
    rounds: int
    every: int
    begin: int = 0

    def __post_init__(self):
        check_share("final", self.final)
        check_step("begin", self.begin)
        check_step("every", self.every, least=1)
        check_step("rounds", self.rounds, least=1)
        check_step("the step of the last round", self._end)

    @property
    def _end(self) -> int:
        return self.begin + (self.rounds - 1) * self.every

    def sparsity(self, step: Step) -> Any:
        """Returns 1 − (1 − final)^(r/n), r the number of rounds up to this step."""
        xp, step = numbers(step)
        since = xp.clip(step, self.begin, self._end) - self.begin
        done = xp.where(step < self.begin, 0, since // self.every + 1)
        # expm1 and log1p, because 1 − (1 − s) loses the digits of a small s in float32.
        share = -xp.expm1(as_float(xp, done) * (math.log1p(-self.final) / self.rounds))
        return result(xp, xp.where(done == self.rounds, self.final, share))

    def is_due(self, step: Step) -> Any:
        """Returns whether there is a round at this step."""
        return due_every(step, self.begin, self._end, self.every)

    def due_steps(self) -> tuple[int, ...]:
        """Returns the step of every round."""
        return tuple(range(self.begin, self._end + 1, self.every))


@dataclasses.dataclass(frozen=True)
class Constant:
    """Constant sparsity with masks updated every `every` steps, for RigL, SET and STE.

    Attributes:
        final: Sparsity at all steps, also before `begin`.
        every: Number of steps between updates of the masks.
        begin: First step at which masks are updated.
        end: Last step at which masks may be updated. If None, there is no last step.

    Raises:
        InputError: If the sparsity is outside [0, 1), or a step is not a valid integer.

    >>> Constant(0.9, every=100, end=300).due_steps()
    (0, 100, 200, 300)
    """

    final: float
    every: int = 1
    begin: int = 0
    end: int | None = None

    def __post_init__(self):
        check_share("final", self.final)
        check_step("begin", self.begin)
        check_step("every", self.every, least=1)
        if self.end is not None:
            check_step("end", self.end, least=self.begin, why=", not before begin")

    def sparsity(self, step: Step) -> Any:
        """Returns `final`."""
        xp, step = numbers(step)
        return result(xp, xp.full(xp.shape(step), self.final))

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is `begin` plus a multiple of `every`, up to `end`."""
        xp, step = numbers(step)
        end = LAST_STEP if self.end is None else self.end
        inside = (step >= self.begin) & (step <= end)
        return result(xp, inside & ((step - self.begin) % self.every == 0))

    def due_steps(self) -> tuple[int, ...]:
        """Returns the steps at which masks are updated.

        Raises:
            InputError: If `end` is None, so that there is no last step.
        """
        if self.end is None:
            raise InputError(
                "a Constant schedule without an end has infinitely many due steps; give end="
            )
        return tuple(range(self.begin, self.end + 1, self.every))
