"""Scores to bool masks, and what masks are for: apply, count, and keep zeros zero.

A mask is a bool pytree like the parameters, True where a weight stays, None where the tensor is
dense. Masks made eagerly are checked (NaN, ranges); inside a jit the same code runs unchecked.

rules     masks from scores: the paper's rule, and an exact sparsity by scope and pattern
holding   apply a mask to weights; an optimizer that keeps pruned weights at 0
counts    how many weights a mask keeps
removed   zeros that a model has already
saving    one file for masks and statistics
ties      warnings of masks that the scores do not decide
fitting   the check that a mask is one, and fits its weight
"""

from swe_prune.masks.counts import Summary, Tally, revived, summary, zeros
from swe_prune.masks.holding import apply, hold_moments, keep
from swe_prune.masks.removed import of_zeros
from swe_prune.masks.rules import ROUNDINGS, SCOPES, by_sparsity, by_std
from swe_prune.masks.saving import Saved, load, save

__all__ = [
    "ROUNDINGS",
    "SCOPES",
    "Saved",
    "Summary",
    "Tally",
    "apply",
    "by_sparsity",
    "by_std",
    "hold_moments",
    "keep",
    "load",
    "of_zeros",
    "revived",
    "save",
    "summary",
    "zeros",
]
