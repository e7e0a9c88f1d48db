"""Sparse in the forward pass, dense in the gradient: the straight-through estimator."""

from jaxtyping import Array, Float, PyTree

from swe_prune import importance, masks
from swe_prune.arguments import checked
from swe_prune.masks.fitting import map_masked
from swe_prune.sparse_training.masked import masked, stopped


@checked
def straight_through(params: PyTree, mask: PyTree) -> PyTree:
    """Returns the masked weights, whose gradient goes to all the weights as if there was no mask.

    Forward W' = W ⊙ M with exact zeros; backward ∂L/∂W = ∂L/∂W'. Pruned weights go on learning and
    come back when the mask lets them. Bengio, Léonard and Courville (arXiv 1308.3432).

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.

    Raises:
        InputError: Mask and parameters differ in structure or shape.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> loss = lambda p: (straight_through(p, {"w": jnp.array([True, False])})["w"] * 3).sum()
    >>> jax.grad(loss)({"w": jnp.array([1.0, 2.0])})["w"].tolist()
    [3.0, 3.0]
    """
    return map_masked(lambda weight, keep: masked(weight, keep, None), params, mask)


@checked
def ste_magnitude(
    params: PyTree,
    prunable: PyTree | None,
    sparsity: float | Float[Array, ""],
    *,
    scope: str = "tensor",
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the weights with the smallest |w| pruned, and a straight-through gradient.

    Call it on the dense weights inside the loss, in every step. Gradients go straight to the dense
    weights and no update is masked (jaxpruner's STE magnitude pruning). After training, call it on
    the final dense weights to get the sparse ones.

    Args:
        params: Pytree of dense weights.
        prunable: Bool pytree; None means `tree.prunable(params)`.
        sparsity: Share of the weights to prune; a number, or traced, so that a schedule's
            `sparsity(step)` compiles once.
        scope: Scope of `masks.by_sparsity`: "tensor", "global" or "row".
        layout: Pytree of `layout.Axes` like the parameters; see `masks.by_sparsity`.

    Raises:
        InputError: Errors of `importance.score` and `masks.by_sparsity`.

    >>> import jax.numpy as jnp
    >>> ste_magnitude({"w": jnp.array([[1.0, -3.0]])}, None, 0.5)["w"].tolist()
    [[0.0, -3.0]]
    """
    scores = importance.score(
        "magnitude", stopped(params), prunable=prunable, layout=layout, zeros="free"
    )
    return straight_through(params, masks.by_sparsity(scores, sparsity, scope, layout=layout))
