"""What a mask does to weights and to an optimizer: exact zeros that stay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.errors import InputError


def apply(params: PyTree, mask: PyTree) -> PyTree:
    """Returns the parameters with exact zeros where the mask is False; dtypes are kept.

    A select rather than a product: the same cost in a compiled step, and 0 · inf is NaN, −w · 0 a
    negative zero.

    Raises:
        InputError: mask and parameters differ in structure, or a mask in shape from its weight.
    """

    def leaf(name: str, keep: Any, weight: Any) -> Any:
        if keep is None:
            return weight
        if jnp.shape(keep) != jnp.shape(weight):
            raise InputError(
                f"the mask of {name!r} has shape {jnp.shape(keep)} and the weight "
                f"{jnp.shape(weight)}; make the mask from scores of these parameters"
            )
        return jnp.where(keep, weight, 0)

    return tree.map_leaves(leaf, mask, params)


def keep(
    optimizer: optax.GradientTransformation, mask: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with pruned weights held at exactly 0, and their moments too.

    Gradients of pruned weights are zeroed before the optimizer sees them; after it, their update
    is −w (so the sum is exactly 0 even for a weight that was not 0 yet, if it was finite:
    `apply` the mask first to be rid of an infinity) and every part of its
    state that is laid out like the parameters is zeroed. The state is the inner optimizer's own:
    wrap or unwrap in the middle of a run without converting anything.

    Args:
        optimizer: any optax chain, or anything with `init` and `update`.
        mask: bool pytree, None where dense. It is captured: in a jit of your own, pass the mask
            as an argument and build the optimizer inside, so that it is no constant of the program.
    """
    inner = optax.with_extra_args_support(optimizer)

    def masked(tree_of: PyTree) -> PyTree:
        return apply(tree_of, mask)

    def init(params: PyTree) -> PyTree:
        return inner.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if "grad" in extra:  # what a line search measures the slope by
            extra["grad"] = masked(extra["grad"])
        updates, state = inner.update(masked(updates), state, params, **extra)
        if params is None:
            return masked(updates), hold_moments(state, mask)
        # In the wider of the two dtypes, lest −w be rounded and a remainder stay.
        held = tree.map_leaves(
            lambda _, m, u, w: u if m is None else jnp.where(m, u, jnp.negative(w)),
            mask,
            updates,
            params,
        )
        return held, hold_moments(state, mask)

    return optax.GradientTransformationExtraArgs(init, update)


def hold_moments(opt_state: PyTree, mask: PyTree) -> PyTree:
    """Returns an optimizer's state with 0 in its moments wherever the mask is False.

    A part of the state belongs to a parameter when its path ends in the parameter's, which is so
    in all of optax. One of another shape is a factored statistic (Adafactor's), which belongs to no
    single weight and stays. L-BFGS keeps several moments of each parameter, along a leading axis.

    Args:
        opt_state: State of any optax chain.
        mask: Bool pytree like the parameters, None where dense.
    """
    masks = dict(jax.tree_util.tree_flatten_with_path(mask, is_leaf=tree.is_none)[0])

    def hold(path: Any, moment: Any) -> Any:
        kept = tree.by_suffix(path, masks)
        if kept is None or jnp.shape(moment)[-kept.ndim or jnp.ndim(moment) :] != kept.shape:
            return moment
        return jnp.where(kept, moment, jnp.zeros_like(moment))

    return jax.tree_util.tree_map_with_path(hold, opt_state)
