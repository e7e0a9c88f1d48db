"""What ranking all the weights together gives each tensor."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import counting, select, tree
from swe_prune.allocation.groups import scored
from swe_prune.allocation.rounding import (
    Allocation,
    check_room,
    check_sparsity,
    least_kept,
    removed_count,
)
from swe_prune.arguments import checked


@checked
def by_scores(scores: PyTree, sparsity: float, *, max_sparsity: float | None = None) -> Allocation:
    """Returns how much of each tensor global selection removes.

    The lowest scores of all the tensors together go, ties by the order of the tensors and the flat
    index, as in `masks.by_sparsity(scores, sparsity, "global")`. With the scores of one criterion
    to allocate and those of another to rank within each tensor, the two can be told apart. A
    larger sparsity takes no less of any tensor. Scores of −inf, of weights that were removed
    before, all go.

    Args:
        scores: Floating-point pytree, None where dense; comparable over the tensors.
        sparsity: Share to remove of all the scored weights, in [0, 1).
        max_sparsity: Largest share that any tensor loses, in (0, 1]; None: everything.

    Raises:
        InputError: Sparsity outside [0, 1), a largest one below it, no scores, or NaN among them.

    >>> by_scores({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 0.0])}, 0.5).removed
    {'a': 1, 'b': 1}
    """
    check_sparsity(sparsity)
    named = scored(scores)
    sizes = {name: tree.size(leaf) for name, leaf in named.items()}
    total = sum(sizes.values())
    keep = total - removed_count(total, sparsity)
    least = None
    if max_sparsity is not None:
        least = tuple(least_kept(size, max_sparsity) for size in sizes.values())
        check_room(total, keep, sum(least), max_sparsity)
    kept, nans = jax.device_get(_kept_each(list(named.values()), counting.count(keep), least))
    select.reject_nan(list(named), nans)
    gone = {name: sizes[name] - int(n) for name, n in zip(named, kept, strict=True)}
    return Allocation(gone, sizes)


@checked
def by_curvature(
    curvature: PyTree, sparsity: float, *, max_sparsity: float | None = None
) -> Allocation:
    """Returns how much of each tensor a global ranking by the loss's curvature removes.

    The sparsities of `by_scores`, with scores that say what a weight costs the loss: w² E[g²]^power
    (`fisher`) or w² v^power (`magnitude_curvature`). Methods that rank within a kernel by other
    scores, as SparseGPT, Wanda and ADMM do, or within rows, take the allocation from here.

    Args:
        curvature: Scores of such a criterion, None where dense.
        sparsity: Share to remove of all the scored weights, in [0, 1).
        max_sparsity: Largest share that any tensor loses, in (0, 1]; None: everything.

    Source: this project. The nearest that we know is arXiv 2310.09499, sparsities by the Hessian's
    sensitivity and then SparseGPT.
    """
    return by_scores(curvature, sparsity, max_sparsity=max_sparsity)


@functools.partial(jax.jit, static_argnums=2)
def _kept_each(
    scores: list[Array], keep: counting.Count, least: tuple[int, ...] | None
) -> tuple[list[counting.Count], list[Array]]:
    if least is None:
        masks = select.top_k_masks(scores, keep)
    else:
        masks = select.top_k_masks_of_each(scores, keep, least)
    masks = [mask & (score != -jnp.inf) for mask, score in zip(masks, scores, strict=True)]
    nans = [counting.count_each([jnp.isnan(score)])[0] for score in scores]
    return [counting.count_true([mask]) for mask in masks], nans
