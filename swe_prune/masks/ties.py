"""Warnings of masks that the scores do not decide: ties, and tensors that lose everything."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swe_prune import tree
from swe_prune.errors import UndecidedWarning, listed

_SHARE = 0.01
"""Share of what goes that ties may decide without a warning."""

_ON_HOST = 1 << 20
"""Weights up to which a tensor is looked at by numpy, which has nothing to compile."""


class _Facts(NamedTuple):
    """Facts of one tensor, or of its rows.

    Attributes:
        top: Largest score among what is removed; −inf where nothing is.
        bottom: Smallest score among what stays; +inf where nothing does.
        tied: Removed weights whose score is that of one that stays.
        removed: Removed weights, but those that were gone before.
        any_left: Whether a weight stays.
    """

    top: Any
    bottom: Any
    tied: Any
    removed: Any
    any_left: Any


def warn(
    scores: Mapping[str, Any],
    masks: Mapping[str, Any],
    *,
    axes: Callable[[str], tuple[int, ...] | None] = lambda name: None,
    together: bool = False,
    ranked: bool = True,
) -> None:
    """Warns when ties decide more than 1 % of what goes, or when a tensor is emptied.

    A score of −inf, of a weight that was removed before, decides nothing.

    Args:
        scores: Concrete scores by tensor name.
        masks: Concrete masks by tensor name, None where a rule leaves a tensor dense.
        axes: Function from a name to the axes along which weights were ranked; None: all.
        together: Whether all tensors were ranked together.
        ranked: Whether single weights were ranked, so that ties at the threshold decide; else only
            a tensor of equal scores is one of ties.
    """
    chosen = {name: mask for name, mask in masks.items() if mask is not None and mask.size}
    facts = {name: _facts(scores[name], mask, axes(name), ranked) for name, mask in chosen.items()}
    if together and facts:
        top = max(float(one.top) for one in facts.values())
        bottom = min(float(one.bottom) for one in facts.values())
        facts = {
            name: _facts(scores[name], mask, None, ranked, top, bottom)
            for name, mask in chosen.items()
        }
    emptied = [name for name, one in facts.items() if not one.any_left]
    if emptied:
        warnings.warn(
            f"every weight of {listed(map(tree.short, emptied))} is removed; exclude it, lower the "
            "sparsity, or choose another criterion or scope",
            UndecidedWarning,
            stacklevel=4,
        )
    tied = math.fsum(float(one.tied) for one in facts.values())
    removed = math.fsum(float(one.removed) for one in facts.values())
    if tied > _SHARE * removed:
        names = [name for name, one in facts.items() if one.tied]
        warnings.warn(
            f"scores tie: the order of the weights decides {tied:,.0f} of the {removed:,.0f} that "
            f"go, in {listed(map(tree.short, names))}; choose a criterion that tells them apart",
            UndecidedWarning,
            stacklevel=4,
        )


def _facts(
    score: Any, mask: Any, axes: Any, ranked: bool, top: Any = None, bottom: Any = None
) -> _Facts:
    local = getattr(score, "is_fully_addressable", True)
    if score.size <= _ON_HOST and local:
        with np.errstate(invalid="ignore"):
            given = np.asarray(score, np.float32), np.asarray(mask)
            return _of_tensor(*given, axes, ranked, top, bottom, np)
    return jax.device_get(_compiled(score, mask, axes, ranked, top, bottom))


def _of_tensor(
    score: Any, mask: Any, axes: Any, ranked: bool, top: Any, bottom: Any, xp: Any
) -> _Facts:
    gone = ~mask & (score > -np.inf)
    if top is None:
        keep = axes is not None
        top = xp.max(xp.where(gone, score, -np.inf), axis=axes, keepdims=keep)
        bottom = xp.min(xp.where(mask, score, np.inf), axis=axes, keepdims=keep)
    tied = gone & (score == top) & (score == bottom)
    if not ranked:
        there = score > -np.inf
        equal = xp.max(xp.where(there, score, -np.inf)) == xp.min(xp.where(there, score, np.inf))
        tied = gone & equal & xp.any(mask)
    # Shares of weights: float32 counts well enough. Scalars, which every process has whole.
    return _Facts(
        xp.max(top),
        xp.min(bottom),
        xp.sum(tied, dtype=np.float32),
        xp.sum(gone, dtype=np.float32),
        xp.any(mask),
    )


@functools.partial(jax.jit, static_argnames=("axes", "ranked"))
def _compiled(score: Any, mask: Any, axes: Any, ranked: bool, top: Any, bottom: Any) -> _Facts:
    return _of_tensor(score.astype(jnp.float32), mask, axes, ranked, top, bottom, jnp)
