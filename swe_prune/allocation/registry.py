"""Registry of the allocation rules, and `allocate`, which runs any of them.

A rule is a function and an entry here. Its arguments with names in `NEEDS` are its needs; all other
arguments are options.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.allocation.alpha_pruning import alpha_pruning
from swe_prune.allocation.by_score import by_curvature, by_scores
from swe_prune.allocation.by_shape import erk, progression, table, uniform
from swe_prune.allocation.ecoflap import ecoflap
from swe_prune.allocation.owl import owl
from swe_prune.allocation.rounding import Allocation
from swe_prune.allocation.std_rule import std
from swe_prune.errors import InputError, check_choice
from swe_prune.layout import InputAxes, axes_of, copies_of, copy_labels, split

NEEDS: Mapping[str, str] = {
    "shapes": "pass scores=, or params= with the weights",
    "scores": "pass scores=importance.score(name, params, …)",
    "curvature": "pass curvature=importance.score('fisher', params, …), or another with curvature",
    "params": "pass params=, the weights",
    "loss": "pass loss=, a function (params, batch) → scalar",
    "batches": "pass batches=, calibration batches for the loss",
}
"""Everything that a rule may need, and how to provide it."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        name: Name of the rule.
        function: Function from the needs and a sparsity to an `Allocation`.
        needs: Names in `NEEDS` that the function takes.
        options: Names of the function's other arguments, except `sparsity` and `prunable`.
        required: Names of the options without a default.
    """

    name: str
    function: Callable[..., Allocation]
    needs: tuple[str, ...]
    options: tuple[str, ...]
    required: tuple[str, ...]

    def check_options(self, options: Iterable[str]) -> None:
        """Raises InputError if an option is unknown or a required one is missing."""
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
        "curvature": by_curvature,
        "ecoflap": ecoflap,
        "erk": erk,
        "global": by_scores,
        "owl": owl,
        "progression": progression,
        "std": std,
        "table": table,
        "uniform": uniform,
    }.items()
}


def names() -> tuple[str, ...]:
    """Returns the sorted names of all rules.

    >>> names()[:5]
    ('alpha_pruning', 'curvature', 'ecoflap', 'erk', 'global')
    """
    return tuple(sorted(_RULES))


def get(name: str) -> Rule:
    """Returns the rule with a name.

    Raises:
        InputError: If the name is unknown; the error suggests similar names.

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
    curvature: PyTree | None = None,
    params: PyTree | None = None,
    loss: Callable[[PyTree, PyTree], Any] | None = None,
    batches: Iterable[PyTree] | None = None,
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
    **options: Any,
) -> Allocation:
    """Returns the allocation of a rule; arguments that the rule does not need are ignored.

    Args:
        name: Name of the rule, one of `names()`.
        sparsity: Fraction of all the weights to remove, in [0, 1). None is allowed only for a
            "table" whose sparsities are used unchanged.
        scores: Pytree of scores, None where dense.
        curvature: Pytree of scores that say what a weight costs the loss, None where dense.
        params: Pytree of weights.
        loss: Function (params, batch) that returns a scalar.
        batches: Calibration batches for the loss.
        prunable: Bool pytree like the parameters. If None, the tensors that have scores, or
            `tree.prunable(params)` if there are no scores.
        layout: Pytree of `layout.Axes` like the parameters. Each copy of a stacked tensor is then
            a tensor of its own, named "name[i]"; give `masks.by_sparsity` the same layout.
        **options: Options of the rule, such as `lam`.

    Raises:
        InputError: If the name or an option is unknown, a need is missing, or the rule raises it.

    >>> allocate("uniform", 0.5, scores={"up": {"kernel": (4, 5), "bias": None}}).removed
    {'up/kernel': 10}
    """
    rule = get(name)
    rule.check_options(options)
    if layout is not None:
        # Every rule sees the copies as tensors; the loss sees the parameters as they are.
        if prunable is None and params is not None and scores is None:
            prunable = tree.prunable(params, layout=layout)
        if "input_axes" in rule.options:
            options.setdefault("input_axes", _inputs_of_copies(layout))
        if curvature is not None:
            named = tree.present(curvature)
            curvature = split(named, layout)
        scores, params, prunable, loss = _in_copies(scores, params, prunable, loss, layout)
    given = {"scores": scores, "curvature": curvature, "params": params, "loss": loss,
             "batches": batches}  # fmt: skip
    # Shapes come from the scores, or from the prunable weights if there are none.
    given["shapes"] = scores
    if scores is None and params is not None:
        given["shapes"] = (
            tree.prunable_leaves(params, prunable, "allocate") if "shapes" in rule.needs else None
        )
    for need in rule.needs:
        if given[need] is None:
            raise InputError(f"allocation {name!r} needs {need}; {NEEDS[need]}")
    # By default, a rule on weights prunes the tensors that have scores.
    if "params" in rule.needs:
        if prunable is None and scores is not None:
            prunable = tree.map_leaves(lambda _, weight, score: score is not None, params, scores)
        options["prunable"] = prunable
    return rule.function(**{need: given[need] for need in rule.needs}, sparsity=sparsity, **options)


def _inputs_of_copies(layout: PyTree) -> InputAxes:
    """Returns the function from the name and shape of a copy to its input axes."""
    named = dict(tree.named_leaves(layout))
    of = axes_of(layout)

    def inputs(label: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        own = named.get(label, named.get(label.rpartition("[")[0]))
        if own is not None and own.inputs:
            return own.one_copy.inputs
        # Of a matrix, the rules that ask read what its transpose has too.
        return (0,) if len(shape) == 2 else of(label, shape).inputs

    return inputs


def _in_copies(
    scores: PyTree | None,
    params: PyTree | None,
    prunable: PyTree | None,
    loss: Callable[[PyTree, PyTree], Any] | None,
    layout: PyTree,
) -> tuple[Any, Any, Any, Any]:
    """Returns the arguments of a rule as dicts by name, with each copy as a tensor of its own."""
    copies = copies_of(layout)
    parts = None if params is None else split(dict(tree.named_leaves(params)), layout)
    marks = None
    if prunable is not None and parts is not None:
        marked = dict(tree.named_leaves(prunable))
        marks = {
            label: bool(marked[label if label in marked else label.rpartition("[")[0]])
            for label in parts
        }
    split_scores = None
    if scores is not None:
        named = tree.present(scores)
        split_scores = split(named, layout)
        if parts is not None:
            split_scores = {label: split_scores.get(label) for label in parts}
    of_parts: Callable[[Any, Any], Any] | None = None
    if loss is not None and params is not None:

        def joined_loss(given: Any, batch: Any) -> Any:
            def joined(name: str, leaf: Any) -> Any:
                axes = copies(name, leaf.shape) if hasattr(leaf, "shape") else ()
                if not axes:
                    return given[name]
                labels = copy_labels(name, leaf.shape, axes)
                sizes = [leaf.shape[axis] for axis in axes]
                stacked = jnp.stack([given[label] for _, label in labels])
                stacked = stacked.reshape(*sizes, *stacked.shape[1:])
                return jnp.moveaxis(stacked, range(len(axes)), axes)

            return loss(tree.map_named(joined, params), batch)

        of_parts = joined_loss
    return split_scores, parts, marks, of_parts
