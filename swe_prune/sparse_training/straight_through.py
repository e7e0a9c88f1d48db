"""Sparse in the forward pass, dense in the gradient: the straight-through estimator."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from swe_prune import importance, masks, tree
from swe_prune.sparse_training.checks import check_fits


def straight_through(params: PyTree, mask: PyTree) -> PyTree:
    """Returns the masked weights, whose gradient goes to all the weights as if there was no mask.

    Forward W' = W ⊙ M with exact zeros; backward ∂L/∂W = ∂L/∂W'. Pruned weights go on learning and
    come back when the mask lets them. Bengio, Léonard and Courville (arXiv 1308.3432).

    Args:
        params: pytree of weights.
        mask: bool pytree, None where dense.

    Raises:
        InputError: mask and parameters differ in structure or shape.

    >>> loss = lambda p: (straight_through(p, {"w": jnp.array([True, False])})["w"] * 3).sum()
    >>> jax.grad(loss)({"w": jnp.array([1.0, 2.0])})["w"].tolist()
    [3.0, 3.0]
    """

    def leaf(name: str, keep: Any, weight: Any) -> Any:
        if keep is None:
            return weight
        check_fits(name, keep, weight)
        return _masked(weight, keep)

    return tree.map_leaves(leaf, mask, params)


# A rule of its own for derivatives: w + stop_gradient(w · m − w) would make NaN of an infinity, and
# custom_vjp has no forward mode, which Hessian-vector products need.
@jax.custom_jvp
def _masked(weight: Float[Array, "..."], keep: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(keep, weight, 0)


@_masked.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _masked(*primals), tangents[0]


def ste_magnitude(
    params: PyTree,
    prunable: PyTree | None,
    sparsity: float | Float[Array, ""],
    *,
    scope: str = "tensor",
) -> PyTree:
    """Returns the weights as a forward pass sees them when their smallest |w| are pruned anew.

    Call it on the dense weights inside the loss, in every step; gradients go straight to them and
    no update is masked (jaxpruner's STE magnitude pruning). After training the sparse weights are
    what it returns for the last ones.

    Args:
        params: pytree of dense weights.
        prunable: bool pytree; None: `tree.prunable(params)`.
        sparsity: share of the weights that the forward pass does without; traced, so that a
            schedule's `sparsity(step)` compiles once, or a number.
        scope: of `masks.by_sparsity`: "tensor", "global" or "row".

    Raises:
        InputError: as `importance.score` and `masks.by_sparsity`.

    >>> ste_magnitude({"w": jnp.array([[1.0, -3.0]])}, None, 0.5)["w"].tolist()
    [[0.0, -3.0]]
    """
    fixed = jax.lax.stop_gradient(params)
    scores = importance.score("magnitude", fixed, prunable=prunable)
    return straight_through(params, masks.by_sparsity(scores, sparsity, scope))
