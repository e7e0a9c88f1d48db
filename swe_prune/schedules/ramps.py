"""Schedules of the sparsity: at once, along a cubic, in rounds, or one throughout."""

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
    """What the rest of the library asks of a schedule; one of your own may be given too."""

    def sparsity(self, step: Step, /) -> Any:
        """Returns the share of weights that is gone after the update at a step."""
        ...

    def is_due(self, step: Step, /) -> Any:
        """Returns whether masks are updated at a step."""
        ...

    def due_steps(self) -> tuple[int, ...]:
        """Returns the steps at which they are, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class OneShot:
    """Everything at once: `final` from step `at` on, 0 before.

    Raises:
        InputError: a sparsity outside [0, 1) or a negative step.

    >>> OneShot(0.5, at=100).sparsity(99), OneShot(0.5, at=100).sparsity(100)
    (0.0, 0.5)
    """

    final: float
    at: int

    def __post_init__(self):
        check_share("final", self.final)
        check_step("at", self.at)

    def sparsity(self, step: Step) -> Any:
        """Returns 0 before `at`, `final` from there on."""
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
    """A ramp that is steep at first: s(t) = final + (initial − final) (1 − p)³.

    p = clip((t − begin) / (end − begin), 0, 1). Masks are updated at `begin`, every `every` steps
    from there, and at `end`, also where `every` does not lead to it, so that `final` is reached.
    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).

    Raises:
        InputError: a sparsity outside [0, 1), a final one below the initial one, an end that is
            not after the beginning, or steps that are no positive integers.

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
                f"final = {self.final!r} is below initial = {self.initial!r}, and a ramp never "
                "gives weights back; exchange the two"
            )

    def sparsity(self, step: Step) -> Any:
        """Returns s(t), also between the steps at which masks are updated."""
        return ramp(step, self.initial, self.final, self.begin, self.end)

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is one of `due_steps()`."""
        return due_every(step, self.begin, self.end, self.every)

    def due_steps(self) -> tuple[int, ...]:
        """Returns begin, begin + every, …, end."""
        return (*range(self.begin, self.end, self.every), self.end)


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Rounds that each remove the same share of what is left: s after r is 1 − (1 − final)^(r/n).

    The first of the n `rounds` is at step `begin` and the others follow `every` steps apart; what
    one trains or rewinds between them is up to the loop. Han et al. (NeurIPS 2015), Frankle and
    Carbin (ICLR 2019).

    Raises:
        InputError: a sparsity outside [0, 1), no round, or steps that are no positive integers.

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
        """Returns 1 − (1 − final)^(r/n) after the r rounds up to this step, exactly at r = n."""
        xp, step = numbers(step)
        since = xp.clip(step, self.begin, self._end) - self.begin
        done = xp.where(step < self.begin, 0, since // self.every + 1)
        # expm1 and log1p, for 1 − (1 − s) loses the digits of a small s in float32.
        share = -xp.expm1(as_float(xp, done) * (math.log1p(-self.final) / self.rounds))
        return result(xp, xp.where(done == self.rounds, self.final, share))

    def is_due(self, step: Step) -> Any:
        """Returns whether a round is at this step."""
        return due_every(step, self.begin, self._end, self.every)

    def due_steps(self) -> tuple[int, ...]:
        """Returns the step of every round."""
        return tuple(range(self.begin, self._end + 1, self.every))


@dataclasses.dataclass(frozen=True)
class Constant:
    """One sparsity throughout, with masks renewed every `every` steps: for RigL, SET and STE.

    Args:
        final: the sparsity, also before `begin`.
        every: how many steps apart masks are updated.
        begin: the first step at which they are.
        end: the last one; None: it goes on for as long as training does.

    Raises:
        InputError: a sparsity outside [0, 1), or steps that are no positive integers.

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
        """Returns whether the step is a multiple of `every` after `begin`, up to `end`."""
        xp, step = numbers(step)
        end = LAST_STEP if self.end is None else self.end
        inside = (step >= self.begin) & (step <= end)
        return result(xp, inside & ((step - self.begin) % self.every == 0))

    def due_steps(self) -> tuple[int, ...]:
        """Returns the steps; InputError where there is no end of them."""
        if self.end is None:
            raise InputError(
                "a Constant without an end is due for ever, which no list can hold; give end="
            )
        return tuple(range(self.begin, self.end + 1, self.every))
