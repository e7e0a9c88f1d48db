"""Cuts compared after a short recovery, since the best right after the cut may not stay the best.

Cuts of one budget by different units or criteria differ most before they are trained on: a model
without layers is far off and learns fast, one without neurons is near and gains little (Minitron,
Muralidharan et al., arXiv 2407.14679, ranks the candidates of its search after a light recovery).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError, shown
from swe_prune.structured.choice import Keep
from swe_prune.structured.cutting import cut
from swe_prune.structured.group import Groups


class Candidate(NamedTuple):
    """A cut.

    Attributes:
        groups: Groups of the model by name.
        keep: Indices of kept units by group, as `choose` returns them.
    """

    groups: Groups
    keep: Keep


class Ranked(NamedTuple):
    """A candidate with what it costs.

    Attributes:
        name: Name of the candidate.
        before: Loss right after the cut.
        after: Loss after the recovery. None: not on the shortlist.
        params: Parameters after the recovery, or None.
    """

    name: str
    before: float
    after: float | None
    params: PyTree


@checked
def rerank(
    candidates: Mapping[str, Candidate],
    params: PyTree,
    *,
    loss: Callable[[Candidate, PyTree], Any],
    recover: Callable[[Candidate, PyTree], PyTree],
    shortlist: int = 3,
) -> list[Ranked]:
    """Returns the candidates, the best after a short recovery first.

    Args:
        candidates: Cuts by name, which should meet the same budget.
        params: Parameters before the cut.
        loss: Function of a candidate and its parameters to the loss on held-out data; a loss that
            is not finite ranks last.
        recover: Function of a candidate and its parameters to parameters that were trained on, by
            the same number of tokens for all.
        shortlist: Number of candidates, the best right after the cut, that are recovered.

    Returns:
        The recovered candidates by their loss after the recovery, then the others by their loss
        before it.

    Raises:
        InputError: If there is no candidate, shortlist is below 1, or a loss is not a number.

    >>> import jax.numpy as jnp
    >>> from swe_prune.structured import Group
    >>> groups = {"mlp": Group(3, {"w": 0})}
    >>> cuts = {f"without {i}": Candidate(groups, {"mlp": [i - 1, (i + 1) % 3]}) for i in (1, 2)}
    >>> found = rerank(
    ...     cuts, {"w": jnp.array([1.0, 2.0, 5.0])},
    ...     loss=lambda _, params: jnp.abs(params["w"].sum() - 7),
    ...     recover=lambda candidate, params: {"w": params["w"] + 2 * candidate.keep["mlp"][0]},
    ... )
    >>> [(one.name, one.before, one.after) for one in found]
    [('without 2', 4.0, 0.0), ('without 1', 1.0, 1.0)]
    """
    if not candidates:
        raise InputError("there are no candidates; give at least one cut")
    if shortlist < 1:
        raise InputError(f"shortlist must be 1 or more, got {shortlist}")
    before = {}
    for name, one in candidates.items():
        before[name] = _number(loss(one, cut(params, one.groups, one.keep)), name)
    order = sorted(candidates, key=before.__getitem__)
    recovered = []
    for name in order[:shortlist]:
        one = candidates[name]
        trained = recover(one, cut(params, one.groups, one.keep))
        recovered.append(Ranked(name, before[name], _number(loss(one, trained), name), trained))
    recovered.sort(key=lambda one: math.inf if one.after is None else one.after)
    return recovered + [Ranked(name, before[name], None, None) for name in order[shortlist:]]


def _number(value: Any, name: str) -> float:
    """Returns a loss, and infinity in place of NaN."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise InputError(f"the loss of {name!r} must be a number, got {shown(value)}") from None
    return math.inf if math.isnan(found) else found
