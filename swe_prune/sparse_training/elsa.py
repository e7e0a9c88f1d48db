"""Sparse by constraint: ADMM over the training itself, around any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from swe_prune import importance, masks, tree
from swe_prune.bounds import COUNT, NOT_NEGATIVE
from swe_prune.errors import InputError


class ElsaState(NamedTuple):
    """State of `elsa`.

    Attributes:
        inner: State of the wrapped optimizer.
        sparse: Nearest sparse weights z, float32, None where dense.
        dual: Scaled dual variable u, float32, None where dense.
        count: Number of steps taken, int32.
    """

    inner: optax.OptState
    sparse: PyTree
    dual: PyTree
    count: Int[Array, ""]


def elsa(
    optimizer: optax.GradientTransformation,
    sparsity: float,
    *,
    penalty: float = 0.01,
    every: int = 32,
    scope: str = "tensor",
    prunable: PyTree | None = None,
    layout: PyTree | None = None,
) -> optax.GradientTransformation:
    """Returns an optimizer that draws the weights towards sparse ones while they are trained.

    The weights x stay dense and follow the loss plus a penalty on their distance from sparse
    weights z, which are renewed every K steps:

        x ← a step on  loss(x) + λ/2 ‖x − z + u‖²
        z ← x + u where |x + u| is among the largest, 0 elsewhere      u ← u + x − z

    At the end `elsa_masks` removes what is small by then. Everything runs inside a jit; z and u
    take two float32 numbers a prunable weight.

    Args:
        optimizer: Optimizer to wrap. It must be the last transformation, since z is renewed from
            the weights after its update.
        sparsity: Share of the prunable weights that z has at 0, in [0, 1).
        penalty: λ.
        every: K, number of steps between renewals.
        scope: Scope of `masks.by_sparsity`: "tensor", "global" or "row".
        prunable: Bool pytree; None: `tree.prunable` of the parameters.
        layout: Pytree of `layout.Axes` like the parameters; see `masks.by_sparsity`.

    Raises:
        InputError: A number is out of its range; in `update`, the parameters are missing.

    Source: ELSA, Lee et al. (arXiv 2510.01650).

    >>> start = {"kernel": jnp.array([[0.5, 2.0]])}
    >>> optimizer = elsa(optax.sgd(0.1), 0.5, penalty=1.0, every=1)
    >>> state = optimizer.init(start)
    >>> updates, state = optimizer.update({"kernel": jnp.zeros((1, 2))}, state, start)
    >>> after = optax.apply_updates(start, updates)["kernel"][0]
    >>> [round(float(weight), 2) for weight in after]  # 0.5 is drawn to 0
    [0.45, 2.0]
    """
    NOT_NEGATIVE.check(penalty, "penalty")
    COUNT.check(every, "every")

    def init(params: PyTree) -> ElsaState:
        chosen = tree.prunable(params, layout=layout) if prunable is None else prunable
        dual = tree.map_prunable(lambda _, w: jnp.zeros_like(w, jnp.float32), params, chosen)
        sparse = _projected(_shifted(params, dual), sparsity, scope, layout)
        return ElsaState(optimizer.init(params), sparse, dual, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **more: Any
    ) -> tuple[PyTree, ElsaState]:
        if params is None:
            raise InputError(
                "elsa needs the parameters; call update(gradients, state, params) of the optimizer"
            )
        drawn = tree.map_named(
            lambda _, g, w, z, u: g if z is None else g + (penalty * (w - z + u)).astype(g.dtype),
            updates,
            params,
            state.sparse,
            state.dual,
        )
        updates, inner = optimizer.update(drawn, state.inner, params, **more)
        count = state.count + 1

        def renewed() -> tuple[PyTree, PyTree]:
            shifted = _shifted(optax.apply_updates(params, updates), state.dual)
            sparse = _projected(shifted, sparsity, scope, layout)
            return sparse, jax.tree.map(jnp.subtract, shifted, sparse)

        sparse, dual = jax.lax.cond(count % every == 0, renewed, lambda: (state.sparse, state.dual))
        return updates, ElsaState(inner, sparse, dual, count)

    return optax.GradientTransformation(init, update)


def elsa_masks(
    state: Any,
    params: PyTree,
    sparsity: float,
    *,
    scope: str = "tensor",
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the masks after training with `elsa`: the largest |x + u| stay.

    Args:
        state: Last `ElsaState` of the optimizer.
        params: Trained weights.
        sparsity: Share of the prunable weights to remove.
        scope: Scope of `masks.by_sparsity`.
        layout: Pytree of `layout.Axes` like the parameters.

    Raises:
        InputError: Errors of `masks.by_sparsity`.
    """
    return _masks(_shifted(params, state.dual), sparsity, scope, layout)


def _shifted(params: PyTree, dual: PyTree) -> PyTree:
    """Returns x + u, None where dense."""
    return tree.map_named(
        lambda _, w, u: None if u is None else w.astype(jnp.float32) + u, params, dual
    )


def _masks(shifted: PyTree, sparsity: float, scope: str, layout: PyTree | None) -> PyTree:
    chosen = tree.map_leaves(lambda _, x: x is not None, shifted)
    scores = importance.score("magnitude", shifted, prunable=chosen, layout=layout, zeros="free")
    return masks.by_sparsity(scores, sparsity, scope, layout=layout)


def _projected(shifted: PyTree, sparsity: float, scope: str, layout: PyTree | None) -> PyTree:
    return masks.apply(shifted, _masks(shifted, sparsity, scope, layout))
