"""The table of allocation rules, and the one call that runs any of them.

A rule is a function and a row here: what it needs are its arguments by the names of `NEEDS`, an
argument with a default, and any other, is an option.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.allocation.alpha_pruning import alpha_pruning
from swe_prune.allocation.by_score import by_scores
from swe_prune.allocation.by_shape import erk, table, uniform
from swe_prune.allocation.ecoflap import ecoflap
from swe_prune.allocation.groups import chosen
from swe_prune.allocation.owl import owl
from swe_prune.allocation.rounding import Allocation
from swe_prune.allocation.std_rule import std
from swe_prune.errors import InputError, check_choice

NEEDS: Mapping[str, str] = {
    "shapes": "pass scores=, or params= whose prunable weights are shared out",
    "scores": "pass scores=importance.score(name, params, …)",
    "params": "pass params=, the weights",
    "loss": "pass loss=, a function (params, batch) → scalar",
    "batches": "pass batches=, calibration batches for the loss",
}
"""What a rule may need, and how to come by it."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        name: what it is asked for by.
        function: from what it needs and a sparsity to an `Allocation`.
        needs: those of `NEEDS` that it takes.
        options: the names of its other arguments but the sparsity and `prunable`.
        required: those of the options that have no default.
    """

    name: str
    function: Callable[..., Allocation]
    needs: tuple[str, ...]
    options: tuple[str, ...]
    required: tuple[str, ...]

    def check_options(self, options: Iterable[str]) -> None:
        """Raises InputError for an option that the rule does not have, or one that is missing."""
        options = tuple(options)
        for option in options:
            if option not in self.options:
                has = ", ".join(self.options) or "none"
                raise InputError(
                    f"allocation {self.name!r} has no option {option!r}; its options: {has}"
                )
        for option in self.required:
            if option not in options:
                raise InputError(f"allocation {self.name!r} needs the option {option!r}; give it")


def _rule(name: str, function: Callable[..., Allocation]) -> Rule:
    arguments = inspect.signature(function).parameters
    options = [a for a in arguments if a not in (*NEEDS, "sparsity", "prunable")]
    return Rule(
        name=name,
        function=function,
        needs=tuple(a for a in arguments if a in NEEDS),
        options=tuple(options),
        required=tuple(a for a in options if arguments[a].default is inspect.Parameter.empty),
    )


_RULES = {
    name: _rule(name, function)
    for name, function in {
        "alpha_pruning": alpha_pruning,
        "ecoflap": ecoflap,
        "erk": erk,
        "global": by_scores,
        "owl": owl,
        "std": std,
        "table": table,
        "uniform": uniform,
    }.items()
}


def names() -> tuple[str, ...]:
    """Returns every registered rule, sorted.

    >>> names()
    ('alpha_pruning', 'ecoflap', 'erk', 'global', 'owl', 'std', 'table', 'uniform')
    """
    return tuple(sorted(_RULES))


def get(name: str) -> Rule:
    """Returns a rule.

    Raises:
        InputError: The name is not a registered allocation.

    >>> get("ecoflap").needs
    ('loss', 'params', 'batches')
    """
    check_choice(name, names(), "allocation")
    return _RULES[name]


def allocate(
    name: str,
    sparsity: float | None,
    *,
    scores: PyTree | None = None,
    params: PyTree | None = None,
    loss: Callable[[PyTree, PyTree], Any] | None = None,
    batches: Iterable[PyTree] | None = None,
    prunable: PyTree | None = None,
    **options: Any,
) -> Allocation:
    """Returns what a rule takes of each tensor; what it does not need may be given all the same.

    Args:
        name: one of `names()`.
        sparsity: share to remove of all the weights, in [0, 1); None only for a "table" whose
            sparsities stand as they are.
        scores: pytree, None where dense.
        params: pytree of weights.
        loss: (params, batch) → scalar.
        batches: calibration batches for the loss.
        prunable: bool pytree like the parameters; None: the tensors that `scores` has, or without
            scores `tree.prunable(params)`.
        **options: of the rule, such as `lam`.

    Raises:
        InputError: an unknown name or option, a need that was not given, or as the rule itself.

    >>> allocate("uniform", 0.5, scores={"up": {"kernel": (4, 5), "bias": None}}).removed
    {'up/kernel': 10}
    """
    rule = get(name)
    rule.check_options(options)
    given = {"scores": scores, "params": params, "loss": loss, "batches": batches}
    given["shapes"] = scores
    if scores is None and params is not None:
        given["shapes"] = chosen(params, prunable) if "shapes" in rule.needs else None
    for need in rule.needs:
        if given[need] is None:
            raise InputError(f"allocation {name!r} needs {need}; {NEEDS[need]}")
    if "params" in rule.needs:
        if prunable is None and scores is not None:
            prunable = tree.map_leaves(lambda _, weight, score: score is not None, params, scores)
        options["prunable"] = prunable
    return rule.function(**{need: given[need] for need in rule.needs}, sparsity=sparsity, **options)
