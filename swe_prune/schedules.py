"""When to prune and to what sparsity: pure functions of the step.

A schedule is a frozen dataclass with three methods:

    sparsity(step)   the share of weights that is gone after the update at `step`
    is_due(step)     whether masks are updated at `step`
    due_steps()      all the steps at which they are, in order

A Python or numpy integer gives an exact Python float or bool; an integer array of jax, traced or
not, gives float32 or bool of its shape, so that one compiled program serves a whole schedule.

Step t comes after t optimizer steps: an update at step 0 precedes all training, and the ramp of
`Cubic` starts at `begin` and ends at `end`. jaxpruner has the same ramp at a progress of
(t + 1 − begin) / (end − begin), one step ahead of ours.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swe_prune.errors import InputError, did_you_mean

Step = int | Int[Array, "..."]
_LAST_STEP = 2**31 - 1  # of an int32


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
        _check_share("final", self.final)
        _check_step("at", self.at)

    def sparsity(self, step: Step) -> Any:
        """Returns 0 before `at`, `final` from there on."""
        xp, step = _numbers(step)
        return _result(xp, xp.where(step >= self.at, self.final, 0.0))

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is `at`."""
        xp, step = _numbers(step)
        return _result(xp, step == self.at)

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
        _check_share("final", self.final)
        _check_share("initial", self.initial)
        _check_step("begin", self.begin)
        _check_step("end", self.end, least=self.begin + 1, why=", after begin")
        _check_step("every", self.every, least=1)
        if self.final < self.initial:
            raise InputError(
                f"final = {self.final!r} is below initial = {self.initial!r}, and a ramp never "
                "gives weights back; exchange the two"
            )

    def sparsity(self, step: Step) -> Any:
        """Returns s(t), also between the steps at which masks are updated."""
        return _ramp(step, self.initial, self.final, self.begin, self.end)

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is one of `due_steps()`."""
        return _is_due(step, self.begin, self.end, self.every)

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
        _check_share("final", self.final)
        _check_step("begin", self.begin)
        _check_step("every", self.every, least=1)
        _check_step("rounds", self.rounds, least=1)
        _check_step("the step of the last round", self._end)

    @property
    def _end(self) -> int:
        return self.begin + (self.rounds - 1) * self.every

    def sparsity(self, step: Step) -> Any:
        """Returns 1 − (1 − final)^(r/n) after the r rounds up to this step, exactly at r = n."""
        xp, step = _numbers(step)
        since = xp.clip(step, self.begin, self._end) - self.begin
        done = xp.where(step < self.begin, 0, since // self.every + 1)
        # expm1 and log1p, for 1 − (1 − s) loses the digits of a small s in float32.
        share = -xp.expm1(_float(xp, done) * (math.log1p(-self.final) / self.rounds))
        return _result(xp, xp.where(done == self.rounds, self.final, share))

    def is_due(self, step: Step) -> Any:
        """Returns whether a round is at this step."""
        return _is_due(step, self.begin, self._end, self.every)

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
        _check_share("final", self.final)
        _check_step("begin", self.begin)
        _check_step("every", self.every, least=1)
        if self.end is not None:
            _check_step("end", self.end, least=self.begin, why=", not before begin")

    def sparsity(self, step: Step) -> Any:
        """Returns `final`."""
        xp, step = _numbers(step)
        return _result(xp, xp.full(xp.shape(step), self.final))

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is a multiple of `every` after `begin`, up to `end`."""
        xp, step = _numbers(step)
        end = _LAST_STEP if self.end is None else self.end
        inside = (step >= self.begin) & (step <= end)
        return _result(xp, inside & ((step - self.begin) % self.every == 0))

    def due_steps(self) -> tuple[int, ...]:
        """Returns the steps; InputError where there is no end of them."""
        if self.end is None:
            raise InputError(
                "a Constant without an end is due for ever, which no list can hold; give end="
            )
        return tuple(range(self.begin, self.end + 1, self.every))


@dataclasses.dataclass(frozen=True)
class MovementSchedule:
    """The ramp of movement pruning, between two warm-ups: of the kept share v, or of a threshold τ.

    value(t) = final + (initial − final) (1 − p)³, where p runs from 0 at the end of the first
    `initial_warmup` · `warmup` steps to 1 at the start of the last `final_warmup` · `warmup` ones.
    Hard movement: v from 1 to its final share. Soft: τ from 0 to 0.1. Sanh, Wolf and Rush (NeurIPS
    2020); Lagunas et al. (EMNLP 2021).

    Args:
        final: v or τ at the end, in [0, 1].
        steps: of the whole training.
        warmup: the learning rate's warm-up in steps, the unit of the two others.
        initial: v or τ at first, in [0, 1].
        initial_warmup: for how many warm-ups the value stays `initial`.
        final_warmup: for how many it is `final` at the end.

    Raises:
        InputError: a value outside [0, 1], or warm-ups that leave no step between them.

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
        _check_share("final", self.final, closed=True)
        _check_share("initial", self.initial, closed=True)
        for name in ("warmup", "initial_warmup", "final_warmup"):
            _check_step(name, getattr(self, name))
        _check_step("steps", self.steps, least=1)
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
        return _ramp(step, self.initial, self.final, self._begin, self._end)

    def sparsity(self, step: Step) -> Any:
        """Returns 1 − v, of hard movement."""
        return _ramp(step, 1 - self.initial, 1 - self.final, self._begin, self._end)

    def penalty(self, step: Step, final: float) -> Any:
        """Returns λ = `final` · τ / final τ, the weight of soft movement's penalty.

        Raises:
            InputError: the final τ is 0.
        """
        if self.final == 0:
            raise InputError("a final threshold of 0 gives the penalty no scale; raise it above 0")
        return self.value(step) * (final / self.final)

    def is_due(self, step: Step) -> Any:
        """Returns whether the step is one of training: movement renews its masks at every one."""
        return _is_due(step, 0, self.steps, 1)

    def due_steps(self) -> tuple[int, ...]:
        """Returns 0, 1, …, `steps`."""
        return tuple(range(self.steps + 1))


def cosine_drop_fraction(step: Step, alpha: float, end: int) -> Any:
    """Returns RigL's share of active weights to exchange: α/2 (1 + cos(π t / end)), 0 from `end`.

    The paper has α = 0.3 and ends at three quarters of the training (Evci et al., ICML 2020); its
    code's default is a constant 0.1.

    Args:
        step: t, as for a schedule; the result is a Python float or float32 in the same way.
        alpha: the share at step 0, in [0, 1].
        end: the step from which nothing is exchanged any more.

    Raises:
        InputError: a share outside [0, 1], or an end that is no positive integer.

    >>> [cosine_drop_fraction(t, alpha=0.3, end=750) for t in (0, 375, 750)]
    [0.3, 0.15, 0.0]
    """
    _check_share("alpha", alpha, closed=True)
    _check_step("end", end, least=1)
    xp, step = _numbers(step)
    progress = _float(xp, xp.clip(step, 0, end)) / end
    return _result(xp, xp.where(step >= end, 0.0, alpha / 2 * (1 + xp.cos(math.pi * progress))))


_SCHEDULES: dict[str, Any] = {
    "constant": Constant,
    "cubic": Cubic,
    "iterative": Iterative,
    "movement": MovementSchedule,
    "one_shot": OneShot,
}


def names() -> tuple[str, ...]:
    """Returns the names of all the schedules, sorted."""
    return tuple(sorted(_SCHEDULES))


def get(name: str) -> Any:
    """Returns the class of a schedule.

    Raises:
        InputError: unknown name; the error lists the near ones.

    >>> get("cubic")(0.9, begin=0, end=100, every=10).sparsity(100)
    0.9
    """
    if name not in _SCHEDULES:
        raise InputError(f"unknown schedule {name!r}; {did_you_mean(name, _SCHEDULES)}")
    return _SCHEDULES[name]


def _numbers(step: Any) -> tuple[Any, Any]:
    """Returns the module to compute with, numpy for a plain integer or else jax, and the step."""
    if isinstance(step, int | np.integer) and not isinstance(step, bool):
        return np, int(step)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise InputError(f"step = {step!r} is no integer; give the number of the optimizer step")
    return jnp, jnp.asarray(step)


def _float(xp: Any, count: Any) -> Any:
    return float(count) if xp is np else count.astype(jnp.float32)


def _result(xp: Any, value: Any) -> Any:
    """Returns what was computed as Python's own float or bool, or as float32 or bool of jax."""
    if xp is np:
        return value.item() if isinstance(value, np.generic | np.ndarray) else value
    return value if value.dtype == bool else value.astype(jnp.float32)


def _ramp(step: Any, initial: float, final: float, begin: int, end: int) -> Float[Array, "..."]:
    xp, step = _numbers(step)
    # What is left of the ramp, from integers: 1 − p would lose digits near its end.
    left = _float(xp, end - xp.clip(step, begin, end)) / (end - begin)
    return _result(xp, final + (initial - final) * left**3)


def _is_due(step: Any, begin: int, end: int, every: int) -> Any:
    xp, step = _numbers(step)
    inside = (step >= begin) & (step <= end)
    return _result(xp, inside & (((step - begin) % every == 0) | (step == end)))


def _check_share(name: str, value: Any, *, closed: bool = False) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or (closed and value == 1)):
        raise InputError(
            f"{name} = {value!r} is no share in [0, 1{']' if closed else ')'}; give one as a number"
        )


def _check_step(name: str, value: Any, *, least: int = 0, why: str = "") -> None:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or not least <= value <= _LAST_STEP:
        raise InputError(
            f"{name} = {value!r} is no count of steps from {least} to {_LAST_STEP}{why}; "
            "give such an integer"
        )
