"""The curvature that the optimizer holds already: Adam's second moment, from any optax chain."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.arguments import checked, is_abstract
from swe_prune.errors import InputError, shown

_FIELDS = ("nu", "sum_of_squares")
"""What optax calls running means or sums of squared gradients, in the states of its transforms."""

_OTHERS = ("ScaleBySM3State", "ScaleByBeliefState", "ScaleByNovogradState", "SophiaState")
"""States whose `nu` is something else: a momentum, a variance, a norm of a layer, a Hessian."""


@checked
def has_second_moment(opt_state: PyTree, params: PyTree) -> bool:
    """Returns whether an optimizer's state holds a second moment of any of the weights."""
    return bool(moments_by_name(opt_state, params))


def second_moment(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the running mean of squared gradients, float32 like params, None where there is none.

    It is v of Adam, vₜ = b₂ vₜ₋₁ + (1 − b₂) gₜ², without the bias correction, which is one factor
    for all weights: the diagonal of the empirical Fisher information of batch gradients, at no
    extra memory. Found wherever it is in the state: through `chain`, `masked`, `multi_transform`
    (each tensor's from its own optimizer), `MultiSteps` and `inject_hyperparams`; of Adam and its
    kin, RMSProp and AdaGrad. Adafactor's two vectors are multiplied out, v = r cᵀ / mean(r)
    (Shazeer and Stern, ICML 2018). What SM3, AdaBelief, NovoGrad and Sophia call `nu` is another
    quantity and is left out. Adamax's, a maximum of |g|, cannot be told from Adam's.

    Args:
        opt_state: State of an optax chain that has been updated with gradients of `params`.
        params: Pytree of weights.

    Raises:
        InputError: The state holds no second moment at all (SGD, Lion, Adafactor's not yet made).
    """
    found = moments_by_name(opt_state, params)
    if not found:
        raise InputError(
            "the optimizer's state holds no second moment laid out like the parameters, or one "
            "that is still the same for every weight; use Adam or another that keeps squared "
            "gradients, after its first updates, or a criterion without 'second_moment'"
        )
    return tree.map_named(lambda name, _: found.get(name), params)


def check_state(opt_state: PyTree, params: PyTree) -> None:
    """Raises InputError if what was given as an optimizer's state is none of these weights.

    Args:
        opt_state: What was given.
        params: Pytree of weights.
    """
    names = {name for name, _ in tree.named_leaves(params)}
    own = dict(tree.named_leaves(opt_state))
    if hasattr(opt_state, "init") and hasattr(opt_state, "update"):
        what = "is an optimizer itself"
    elif any(isinstance(leaf, str) or callable(leaf) for leaf in own.values()):
        what = f"is {shown(opt_state)}"
    elif own and set(own) == names:
        what = "is laid out like the weights"
    else:
        moments = [
            name
            for state in _nodes(opt_state, ("nu",))
            for name, leaf in tree.named_leaves(_field(state, "nu"))
            if getattr(leaf, "ndim", 0)
        ]
        if not moments or names & {*moments, *(n.removeprefix("params/") for n in moments)}:
            return
        what = f"has moments of other weights, such as {tree.short(moments[0])!r}"
    raise InputError(
        f"opt_state {what}, not the state of an optimizer of these weights, such as "
        f"{tree.short(min(names, default=''))!r}; give what its updates returned, or no opt_state"
    )


def moments_by_name(opt_state: PyTree, params: PyTree) -> dict[str, Any]:
    """Returns the second moments that a state holds, float32, by the names of the weights."""
    found: dict[str, Any] = {}
    shapes = {n: leaf.shape for n, leaf in tree.named_leaves(params) if tree.is_weight(leaf)}
    for name, moment in _moments(opt_state, shapes):
        if name in shapes and moment.shape == shapes[name]:
            found.setdefault(name, moment.astype(jnp.float32))
    return found


def _moments(opt_state: PyTree, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    for field in _FIELDS:
        for state in _nodes(opt_state, (field,)):
            if type(state).__name__ not in _OTHERS:
                found = list(_arrays(_field(state, field), shapes))
                if not _as_it_began(state, [moment for _, moment in found]):
                    yield from found
    for state in _nodes(opt_state, ("v_row", "v_col", "v")):
        rows, columns, wholes = (
            dict(_arrays(_field(state, field), shapes)) for field in ("v_row", "v_col", "v")
        )
        for name, whole in wholes.items():
            if name in shapes and whole.shape == shapes[name]:
                yield name, whole
            elif name in shapes and len(shapes[name]) >= 2:
                yield name, _multiplied_out(rows[name], columns[name], shapes[name])


def _as_it_began(state: Any, moments: list[Any]) -> bool:
    """Returns whether no gradient has come to moments that begin at another number than 0.

    Those of AdaGrad, Yogi and RMSProp may. Where the state counts its steps, that says it too.
    """
    fields = state if isinstance(state, Mapping) else getattr(state, "_fields", ())
    count = _field(state, "count") if "count" in fields else 0  # a tuple has a method of this name
    if (
        not moments
        or any(isinstance(one, Tracer) or is_abstract(one) for one in (count, *moments))
        or np.any(count)
    ):
        return False
    first = next((jnp.ravel(one)[0] for one in moments if one.size), 0)
    return bool(first != 0) and all(bool((one == first).all()) for one in moments)


def _arrays(part: PyTree, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    for name, leaf in tree.named_leaves(part):
        if hasattr(leaf, "shape"):
            # The optimizer may have been given Linen's variables, and the caller their params.
            yield name if name in shapes else name.removeprefix("params/"), leaf


def _nodes(opt_state: PyTree, fields: tuple[str, ...]) -> list[Any]:
    """Returns the states in a chain that have all the fields; as dicts where one was restored."""

    def is_state(node: Any) -> bool:
        if isinstance(node, Mapping):  # but not weights of such a name
            return all(field in node for field in fields) and ("count" in node or "mu" in node)
        return not isinstance(node, type) and all(hasattr(node, field) for field in fields)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]


def _field(state: Any, name: str) -> PyTree:
    return state[name] if isinstance(state, Mapping) else getattr(state, name)


def _multiplied_out(
    row: Float[Array, "..."], column: Float[Array, "..."], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Returns r cᵀ / mean(r), the second moment that Adafactor's vectors stand for.

    Optax leaves the largest axis out of `v_row` and the second largest out of `v_col`.
    """
    second, largest = (int(axis) for axis in np.argsort(shape)[-2:])
    rows = jnp.expand_dims(row, largest)
    mean = jnp.mean(rows, axis=second, keepdims=True)
    return rows / jnp.where(mean == 0, 1, mean) * jnp.expand_dims(column, second)
