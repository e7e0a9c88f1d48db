"""What ranking all the weights together gives each tensor."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import counting, select, tree
from swe_prune.allocation.groups import scored
from swe_prune.allocation.rounding import Allocation, check_sparsity, removed_count


def by_scores(scores: PyTree, sparsity: float) -> Allocation:
    """Returns how much of each tensor global selection removes.

    The lowest scores of all the tensors together go, ties by the order of the tensors and the flat
    index, as in `masks.by_sparsity(scores, sparsity, "global")`. With the scores of one criterion
    to allocate and those of another to rank within each tensor, the two can be told apart. A
    larger sparsity takes no less of any tensor. Scores of −inf, of weights that were removed
    before, all go.

    Args:
        scores: floating-point pytree, None where dense; comparable over the tensors.
        sparsity: share to remove of all the scored weights, in [0, 1).

    Raises:
        InputError: sparsity outside [0, 1), no scores, or NaN among them.

    >>> by_scores({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 0.0])}, 0.5).removed
    {'a': 1, 'b': 1}
    """
    check_sparsity(sparsity)
    named = scored(scores)
    sizes = {name: tree.size(leaf) for name, leaf in named.items()}
    total = sum(sizes.values())
    keep = counting.count(total - removed_count(total, sparsity))
    kept, nans = jax.device_get(_kept_each(list(named.values()), keep))
    select.reject_nan(list(named), nans)
    gone = {name: sizes[name] - int(n) for name, n in zip(named, kept, strict=True)}
    return Allocation(gone, sizes)


@jax.jit
def _kept_each(
    scores: list[Array], keep: counting.Count
) -> tuple[list[counting.Count], list[Array]]:
    masks = select.top_k_masks(scores, keep)
    masks = [mask & (score != -jnp.inf) for mask, score in zip(masks, scores, strict=True)]
    nans = [counting.count_each([jnp.isnan(score)])[0] for score in scores]
    return [counting.count_true([mask]) for mask in masks], nans
