"""The table of criteria.

A criterion is a function of arrays of one tensor, named by what it needs, and one decorator:

    @register("magnitude")
    def magnitude(weight):
        return jnp.abs(weight)

Needs: `weight`, `key` (a random key of its own), and every measure of `trajectory.BUFFERS`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from swe_prune.errors import InputError, did_you_mean
from swe_prune.trajectory import BUFFERS


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes:
        name: what it is asked for by.
        function: from the needed arrays of one tensor to its scores.
        needs: the names of the function's arguments without a default.
        options: the names of those with one.
        spread: what the paper's std rule compares the scores with: None, the standard deviation
            of the tensor's own scores; a number, when the scores come in units of their threshold.
    """

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    options: tuple[str, ...]
    spread: float | None

    @property
    def measures(self) -> tuple[str, ...]:
        """The trajectory measures among the needs."""
        return tuple(need for need in self.needs if need in BUFFERS)


_CRITERIA: dict[str, Criterion] = {}


def register(name: str, *, spread: float | None = None) -> Callable[[Any], Any]:
    """Returns the decorator that registers a criterion under a name; a name twice is an error."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _CRITERIA:
            raise ValueError(f"criterion {name!r} is registered already; choose another name")
        arguments = inspect.signature(function).parameters.values()
        needs = tuple(a.name for a in arguments if a.default is a.empty)
        options = tuple(a.name for a in arguments if a.default is not a.empty)
        for need in needs:
            if need not in ("weight", "key") and need not in BUFFERS:
                raise ValueError(f"criterion {name!r} needs {need!r}, which nothing provides")
        _CRITERIA[name] = Criterion(name, function, needs, options, spread)
        return function

    return decorate


def names() -> tuple[str, ...]:
    """Returns every registered criterion, sorted."""
    return tuple(sorted(_CRITERIA))


def get(name: str) -> Criterion:
    """Returns a criterion.

    Raises:
        InputError: unknown name; the error lists the near ones.
    """
    if name not in _CRITERIA:
        raise InputError(f"unknown criterion {name!r}; {did_you_mean(name, _CRITERIA)}")
    return _CRITERIA[name]
