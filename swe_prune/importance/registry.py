"""The table of criteria.

A criterion is a function of arrays of one tensor, named by what it needs, and one decorator:

    @register("magnitude")
    def magnitude(weight):
        return jnp.abs(weight)

Needs: `weight`; `key`, a random key of its own; `inputs`, the axes along which its inputs run;
every measure of `trajectory.BUFFERS`; and what `MEASURED` lists. An argument with a default is an
option.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.trajectory import BUFFERS

MEASURED: Mapping[str, str] = {
    "second_moment": "pass opt_state= of an optimizer that keeps squared gradients, such as Adam",
    "gradient": "pass measured=calibration.gradients(loss, params, batches)",
    "gradient_square": "pass measured=calibration.gradients(loss, params, batches)",
    "input_norm": "pass measured=calibration.inputs(model, variables, batches)",
    "hessian": "pass measured=calibration.inputs(model, variables, batches, hessian=True)",
    "learned": "pass measured={'learned': …}, the scores that movement pruning learned",
}
"""What a criterion may need beside the weights and their trajectory, and how to come by it."""

_OWN = ("weight", "key", "inputs")  # what `importance.score` knows by itself


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes:
        name: Name of the criterion.
        function: Function from the needed arrays of one tensor to its scores.
        needs: Names of the function's arguments without a default.
        options: Names of the function's arguments with a default.
        spread: Spread that the paper's std rule compares the scores with: None, the standard
            deviation of the tensor's own scores; a number, when the scores come in units of their
            threshold.
        sorts: Whether it sorts within a tensor, so that a tensor divided over devices is gathered.
    """

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    options: tuple[str, ...]
    spread: float | None
    sorts: bool

    @property
    def measures(self) -> tuple[str, ...]:
        """The trajectory measures among the needs."""
        return tuple(need for need in self.needs if need in BUFFERS)

    @property
    def measured(self) -> tuple[str, ...]:
        """The needs that calibration or the optimizer provides."""
        return tuple(need for need in self.needs if need in MEASURED)

    def check_options(self, options: Iterable[str]) -> None:
        """Raises InputError for an option that the criterion does not have, or a value of one.

        Values are checked where the options are a mapping; arrays may be traced, and are not.
        """
        for option in options:
            if option not in self.options:
                has = ", ".join(self.options) or "none"
                raise InputError(
                    f"criterion {self.name!r} has no option {option!r}; its options: {has}"
                )
            if isinstance(options, Mapping) and not hasattr(options[option], "dtype"):
                default = inspect.signature(self.function).parameters[option].default
                check_value(f"option {option} of {self.name!r}", options[option], default)


def check_value(what: str, value: Any, default: Any) -> None:
    """Refuses a value of another kind than the default; an option without one may be anything."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "an integer"
    elif isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, kind = number and math.isfinite(value), "a finite number"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a name"
    elif isinstance(default, tuple):
        numbers = isinstance(value, Sequence) and not isinstance(value, str)
        fits = numbers and all(isinstance(one, int | float) for one in value)
        kind = f"{len(default)} numbers"
    else:
        fits, kind = isinstance(value, int | float | str | None), "a number or a name"
    if not fits:
        raise InputError(f"{what} must be {kind}, got {shown(value)}; its default is {default!r}")


_CRITERIA: dict[str, Criterion] = {}


@checked
def register(
    name: str, *, spread: float | None = None, sorts: bool = False
) -> Callable[[Any], Any]:
    """Returns the decorator that registers a criterion under a name; a name twice is an error."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _CRITERIA:
            raise ValueError(f"criterion {name!r} is registered already; choose another name")
        arguments = inspect.signature(function).parameters.values()
        needs = tuple(a.name for a in arguments if a.default is a.empty)
        options = tuple(a.name for a in arguments if a.default is not a.empty)
        for need in needs:
            if need not in _OWN and need not in BUFFERS and need not in MEASURED:
                raise ValueError(f"criterion {name!r} needs {need!r}, which nothing provides")
        _CRITERIA[name] = Criterion(name, function, needs, options, spread, sorts)
        return function

    return decorate


def names() -> tuple[str, ...]:
    """Returns every registered criterion, sorted."""
    return tuple(sorted(_CRITERIA))


@checked
def get(name: str) -> Criterion:
    """Returns a criterion.

    Raises:
        InputError: The name is not a registered criterion.
    """
    check_choice(name, names(), "criterion")
    return _CRITERIA[name]
