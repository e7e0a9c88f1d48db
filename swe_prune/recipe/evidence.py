"""What criteria read besides the weights, and its measuring."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import PyTree

from swe_prune import calibration, importance
from swe_prune.arguments import checked
from swe_prune.calibration.measures import MEASURES
from swe_prune.errors import InputError, shown
from swe_prune.recipe.request import Recipe
from swe_prune.trajectory import TrajectoryStats

Loss = Callable[[PyTree, PyTree], Any]
"""(params, batch) -> scalar."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a criterion may read besides the weights.

    Attributes:
        stats: Trajectory statistics of the training run.
        opt_state: State of the optimizer that trained the weights.
        measured: Pytrees like the parameters by need, as `calibration` returns them.
    """

    stats: TrajectoryStats | None = None
    opt_state: PyTree | None = None
    measured: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)


@checked
def measure(
    recipes: Iterable[Recipe],
    model: Any,
    params: PyTree,
    batches: Sequence[PyTree],
    *,
    loss: Loss,
    prunable: PyTree | None = None,
    stats: TrajectoryStats | None = None,
    opt_state: PyTree | None = None,
    measured: Mapping[str, PyTree] | None = None,
    at_once: int | None = None,
) -> Evidence:
    """Returns everything that the recipes read, measured in as few passes as possible.

    Args:
        recipes: Requests that share the calibration.
        model: Linen module, NNX module or function of (params, batch), run on the batches where
            inputs are measured.
        params: Weights that are scored.
        batches: Calibration batches; not touched when no recipe reads them.
        loss: Function of (params, batch), for criteria that read gradients.
        prunable: Bool pytree like the parameters. None: `tree.prunable(params)`.
        stats: Trajectory statistics, passed on.
        opt_state: Optimizer state, passed on.
        measured: Pytrees by need that are there already: passed on and not measured again.
        at_once: Sequences per gradient; see `calibration.gradients`.

    Raises:
        InputError: Batches or parameters that cannot be measured, as in `calibration.inputs` and
            `calibration.gradients`.
    """
    known = {} if measured is None else measured
    needs = frozenset().union(*(recipe.needs for recipe in _recipes(recipes)))
    found = calibration.measure(
        (needs & MEASURES) - set(known),
        model,
        params,
        batches,
        loss=loss,
        prunable=prunable,
        at_once=at_once,
    )
    return Evidence(stats, opt_state, {**found, **known})


def _recipes(given: Iterable[Any]) -> list[Recipe]:
    found = list(given)
    for one in found:
        if not isinstance(one, Recipe):
            raise InputError(f"recipes must be recipe.Recipe each, got {shown(one)}; make one")
    return found


@checked
def measures(recipes: Iterable[Recipe]) -> tuple[str, ...]:
    """Returns the trajectory measures that the recipes read, each once, in their order.

    >>> measures([Recipe("swe", sparsity=0.5), Recipe("magnitude", sparsity=0.5)])
    ('late_mean',)
    """
    criteria = (importance.get(str(one.criterion)) for one in recipes if one.method is None)
    return tuple(dict.fromkeys(m for criterion in criteria for m in criterion.measures))
