"""What a request leaves out: criterion, scope, bound and restoring, decided here alone.

`swe_prune.prune` and `prune --model` both call `complete` with what was asked for and what is
available, so that they do the same. `importance.best` chooses the criterion.
"""

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxtyping import PyTree

from swe_prune import importance, patterns
from swe_prune.recipe.evidence import Evidence
from swe_prune.recipe.request import Recipe


class Completed(NamedTuple):
    """A request with nothing left out.

    Attributes:
        recipe: Request, which `check` has not seen.
        evidence: Given evidence, with constants where the criterion needs them for tensors of
            which the optimizer has no second moment.
        why: Reason for the criterion, in words.
    """

    recipe: Recipe
    evidence: Evidence
    why: str


def complete(
    asked: Mapping[str, Any],
    params: PyTree | None = None,
    evidence: Evidence | None = None,
    prunable: PyTree | None = None,
    *,
    measurable: Iterable[str] = (),
    restorable: bool = False,
    methods: bool = False,
) -> Completed:
    """Returns the request with what was left out, by what is available.

    Without a criterion the best that is available is taken, or ADMM block by block in its place
    where that is allowed: for n:m, and without curvature. A chosen criterion ranks all tensors
    together where it has curvature, with a bound on what each loses, and the weights that stay are
    restored. A criterion that was asked for gets no more than its scope.

    Args:
        asked: Fields of `Recipe`, None where left out; `restore` is left out if the key is missing.
        params: Weights. None: not read yet, and without an optimizer.
        evidence: What a criterion may read besides the weights.
        prunable: Bool pytree like the parameters, as for `importance.best`.
        measurable: Names of what can be measured on calibration data.
        restorable: Whether the blocks of the model can be restored one after the other.
        methods: Whether a method may take the place of a criterion.

    Raises:
        InputError: An unknown criterion, or all second moments of the prunable weights are 0.

    >>> complete({"sparsity": 0.6}, measurable=("gradient_square",)).recipe.max_sparsity
    0.8
    """
    evidence = Evidence() if evidence is None else evidence
    given = dict(asked)
    for field in ("criterion", "method", "allocation", "sparsity", "rate", "scope", "pattern"):
        given.setdefault(field, None)
    pattern = given["pattern"]
    n_of_m = pattern is not None and patterns.is_n_of_m(pattern)
    why, chosen = "it was asked for", given["criterion"] is None and given["method"] is None
    # 1. What ranks the weights.
    if chosen:
        scope, known = given["scope"], {*evidence.measured, *measurable}
        best = importance.best(
            params, evidence.opt_state, evidence.stats, prunable, scope=scope, measured=known
        )
        if methods and (n_of_m or best.criterion == "magnitude"):
            given["method"], why = "admm", "the weights that stay make up for its masks"
        else:
            why = best.why
            given |= {"criterion": best.criterion, "scope": best.scope}
            given["options"] = {**best.options, **(given.get("options") or {})}
            measured = {**evidence.measured, **best.measured}
            evidence = dataclasses.replace(evidence, measured=measured)
    # 2. Where the sparsity is met: curvature has one unit in all tensors.
    name = given["criterion"]
    other = isinstance(name, str) and name.startswith("blockwise:")  # which `check` answers
    needs = () if name is None or other else importance.get(name).needs
    ranked = given["method"] is None and given["rate"] is None
    if given["scope"] is None:
        curved = "second_moment" in needs or (chosen and "gradient_square" in needs)
        alone = pattern is None and given["allocation"] is None
        given["scope"] = "global" if curved and ranked and alone else "tensor"
    # 3. What bounds and follows a ranking that was chosen here.
    if chosen and ranked:
        bounded = n_of_m or given.get("max_sparsity") is not None
        if given["scope"] == "global" and not bounded and _sound(given["sparsity"]):
            given["max_sparsity"] = default_max_sparsity(str(name), given["sparsity"])
        if restorable:
            given.setdefault("restore", "admm")
    return Completed(Recipe(**given), evidence, why)


def _sound(sparsity: Any) -> bool:
    """Returns whether a sparsity is one; `check` refuses others, by its own name."""
    return sparsity is None or (isinstance(sparsity, numbers.Real) and 0 <= float(sparsity) < 1)


def default_max_sparsity(criterion: str, sparsity: float | None) -> float:
    """Returns the largest share that a tensor loses in a global ranking without another bound.

    With `fisher`, whose curvature is that of a few calibration examples, every tensor keeps at
    least half of what it would keep if all lost the same share. With the curvature that an
    optimizer has of a whole training none loses more than 95 %.

    Source: this project; measured in docs/results.md.

    >>> default_max_sparsity("fisher", 0.7), default_max_sparsity("forecast_curvature", 0.7)
    (0.85, 0.95)
    """
    share = sparsity or 0.0
    return (1 + share) / 2 if criterion == "fisher" else max(0.95, share)
