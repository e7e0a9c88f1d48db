"""Masks applied to weights and optimizers, so that pruned weights stay exactly 0."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.masks.fitting import check_mask, map_masked


@checked
def apply(params: PyTree, mask: PyTree) -> PyTree:
    """Returns the parameters with exact zeros where the mask is False; dtypes are kept.

    Computed by a select, not a product: the cost in a compiled step is the same, while 0 · inf
    would be NaN and −w · 0 a negative zero.

    Args:
        params: Pytree of weights; the result has its containers.
        mask: Bool pytree with the names of `params`, None where dense. Its containers may differ,
            see `tree.map_leaves`.

    Raises:
        InputError: The mask and the parameters differ in their names or in the shape of a leaf, or
            the mask is not bool.
    """
    return map_masked(lambda weight, keep: jnp.where(keep, weight, 0), params, mask)


@checked
def keep(optimizer: Any, mask: PyTree) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that keeps pruned weights, and their moments, at exactly 0.

    Gradients of pruned weights are zeroed before the inner optimizer sees them. After it, the
    update of a pruned weight is −w, so that the weight becomes exactly 0 even if it was not 0
    before, and its moments are zeroed (`hold_moments`). Weights must be finite: `apply` the mask
    first to remove an infinity. The state has the structure of the inner optimizer's state, so an
    optimizer can be wrapped or unwrapped in the middle of a run.

    Args:
        optimizer: Inner transformation: any optax chain, or anything with `init` and `update`.
        mask: Bool pytree, None where dense. The returned functions capture it. Inside your own
            jit, pass the mask as an argument and call `keep` there, so that the mask does not
            become a constant of the compiled program.

    Raises:
        InputError: The mask is not bool, or `optimizer` is none. At `init` and `update`: the mask
            is of other parameters.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise InputError(
            f"optimizer must be an optax transformation, got a {type(optimizer).__name__}; call "
            "masks.keep(optimizer, mask)"
        )
    inner = optax.with_extra_args_support(optimizer)

    check_mask(mask)

    def init(params: PyTree) -> PyTree:
        check_mask(mask, params)
        return inner.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if "grad" in extra:  # what a line search measures the slope by
            extra["grad"] = apply(extra["grad"], mask)
        updates, state = inner.update(apply(updates, mask), state, params, **extra)
        if params is None:
            return apply(updates, mask), hold_moments(state, mask)

        # In the wider of the two dtypes, lest −w be rounded and a remainder stay.
        def held(name: str, update: Any, weight: Any, kept: Any) -> Any:
            if kept is None or tree.is_absent(update):
                return update
            return jnp.where(kept, update, jnp.negative(weight))

        return tree.map_leaves(held, updates, params, mask), hold_moments(state, mask)

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def hold_moments(opt_state: PyTree, mask: PyTree) -> PyTree:
    """Returns an optimizer's state with 0 in its moments wherever the mask is False.

    A leaf of the state is the moment of a parameter when its path ends with the path of that
    parameter, which holds throughout optax, and when it has the same shape, or several of that
    shape along a leading axis, as the history of L-BFGS. Of several parameters whose paths fit, the
    longest path counts. What has another shape stays as it is, such as Adafactor's factored
    statistics. The optimizer itself is not needed, so the state of any chain, line search or
    `nnx.Optimizer` will do.

    If the parameters are a single array, not a tree, their path is empty and every leaf of the
    same shape counts as a moment. Name the array, as in `{"w": array}`, if the state holds other
    arrays of that shape.

    Args:
        opt_state: State of the optimizer.
        mask: Bool pytree like the parameters, None where dense.

    >>> state = optax.TraceState({"w": jnp.array([1.0, 2.0])})
    >>> hold_moments(state, {"w": jnp.array([True, False])}).trace["w"].tolist()
    [1.0, 0.0]
    """
    # Dense parameters take part: a moment of a/w must not be taken for one of w.
    check_mask(mask)
    by_name = dict(tree.named_leaves(mask))

    def hold(name: str, leaf: Any) -> Any:
        kept = tree.by_suffix(name, by_name)
        if kept is None or tree.is_absent(leaf) or not _is_number(leaf):
            return leaf
        if jnp.shape(leaf)[jnp.ndim(leaf) - kept.ndim :] != kept.shape:
            return leaf
        return jnp.where(kept, leaf, jnp.zeros_like(leaf))

    return tree.map_leaves(hold, opt_state)


def _is_number(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.number)
