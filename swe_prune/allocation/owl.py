"""OWL: a block with more outliers among its scores keeps more weights.

Outlier weighed layerwise sparsity (Yin et al., ICML 2024; luuyin/OWL). Meant for Wanda's scores,
|w| · ‖x‖; any scores that are not negative will do.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import counting, select, tree
from swe_prune.allocation import rounding
from swe_prune.allocation.groups import Groups, grouped, scored
from swe_prune.allocation.rounding import Allocation
from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
def owl(
    scores: PyTree,
    sparsity: float,
    *,
    lam: float = 0.08,
    m: float = 5.0,
    groups: Groups = "block",
) -> Allocation:
    """Returns OWL's allocation: the sparsity of a block falls linearly with its outlier ratio.

    D_g = 100 · mean(A > m · mean(A)) over all the scores A of block g; the sparsities of
    `owl_sparsities` follow, spread over 2 · lam around the one asked for. Where blocks differ in
    size or a sparsity would leave [0, 1], all are shifted alike and clipped, so that the total is
    exact. (The reference leaves the total as it comes, and sets what is below 0 to 0.01.) Every
    tensor of a block loses the same share.

    Args:
        scores: Float32 pytree, None where dense; not negative, such as Wanda's.
        sparsity: Share to remove of all the scored weights, in [0, 1).
        lam: Half the spread of the blocks' sparsities.
        m: Multiple of the mean of its block that an outlier exceeds.
        groups: Which tensors share a sparsity; see `grouped`.

    Raises:
        InputError: Sparsity outside [0, 1), lam or m negative or not finite, groups that do not
            cover the tensors, no scores, or NaN, infinite or negative ones.
    """
    rounding.check_sparsity(sparsity)
    _check_positive("lam", lam)
    ratios, members = _outlier_ratios(scores, m, groups)
    wanted = owl_sparsities(list(ratios.values()), sparsity, lam)
    sizes = {name: tree.size(leaf) for name, leaf in scored(scores).items()}
    return rounding.shift_groups_to_total(wanted, members, sizes, sparsity)


@checked
def owl_sparsities(outliers: Sequence[float], sparsity: float, lam: float = 0.08) -> list[float]:
    """Returns the sparsities of blocks by their outlier ratios; they may leave [0, 1].

    r_g = (D_g − min D) / (max D − min D) · 2 lam, and s_g = s − r_g + mean(r), whose mean is s.
    Blocks of equal ratios all get s.

    Args:
        outliers: D of each block, in any unit.
        sparsity: Mean of the result.
        lam: Half the spread of the result.

    >>> [round(s, 6) for s in owl_sparsities([1, 2, 4], 0.7)]
    [0.771111, 0.717778, 0.611111]
    """
    return [sparsity - r for r in _centred(outliers, 2 * lam)]


def _centred(outliers: Sequence[float], spread: float) -> list[float]:
    """Returns the ratios moved linearly onto a spread around 0."""
    ratios = np.asarray(outliers, np.float64)
    if not ratios.size:
        raise InputError("outliers must have the ratio of at least one block, got none")
    width = ratios.max() - ratios.min()
    if width == 0:
        return [0.0] * len(ratios)
    moved = (ratios - ratios.min()) / width * spread
    return list(map(float, moved - moved.mean()))


def _outlier_ratios(
    scores: PyTree, m: float, groups: Groups
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Returns D of each group in percent, and the names of its tensors."""
    _check_positive("m", m)
    named = scored(scores)
    members = grouped([name for name, leaf in named.items() if tree.size(leaf)], groups)
    found = {g: _outliers([named[name] for name in names], m) for g, names in members.items()}
    ratios = {}
    for g, (outliers, mean, negatives, nans) in jax.device_get(found).items():
        select.reject_nan(members[g], nans)
        if any(negatives):
            raise InputError(
                f"the scores of group {g!r} have negative values, among which no mean tells an "
                "outlier; allocate by Wanda's scores, or by absolute values"
            )
        if not math.isfinite(mean):
            raise InputError(
                f"the scores of group {g!r} are infinite or their sum overflows; find out where "
                "the weights diverged, or scale the scores"
            )
        ratios[g] = 100 * int(outliers) / sum(tree.size(named[name]) for name in members[g])
    return ratios, members


@jax.jit
def _outliers(
    scores: list[Array], m: float
) -> tuple[counting.Count, Array, list[Array], list[Array]]:
    """Returns a group's number of outliers, mean, and numbers of negative and NaN scores."""
    # The score of a weight that was removed before is −inf; it counts as 0, as Wanda's would be.
    scores = [score.astype(jnp.float32) for score in scores]
    scores = [jnp.where(score == -jnp.inf, 0, score) for score in scores]
    mean = sum(map(jnp.sum, scores), jnp.float32(0)) / tree.size(scores)
    outliers = counting.count_true([score > m * mean for score in scores])
    negatives = [counting.count_each([score < 0])[0] for score in scores]
    nans = [counting.count_each([jnp.isnan(score)])[0] for score in scores]
    return outliers, mean, negatives, nans


def _check_positive(what: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{what} = {value} is negative or not finite; give a number of 0 or more")
