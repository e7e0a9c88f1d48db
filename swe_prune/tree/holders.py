"""What people keep their weights in: a module, a training state, Linen's variables, or a pytree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import PyTree

from swe_prune.errors import InputError
from swe_prune.tree import pairing

COLLECTION = "params"
"""Name that Linen and its followers give to the weights among the variables."""


@dataclasses.dataclass(frozen=True)
class Held:
    """The weights of an object, and the way back.

    Attributes:
        weights: Pytree of the weights alone.
        put_back: Function from new weights to an object of the same kind; the given one stays as
            it is.
        like: Function from a pytree like the weights, such as masks, to one for the object: with
            None for all that is not a weight.
        lower: Function from a pytree like the object, or like its weights, to one like the weights.
        opt_state: Optimizer state in the object, or None.
        stats: Trajectory statistics in the object, or None.
    """

    weights: PyTree
    put_back: Callable[[PyTree], Any]
    like: Callable[[PyTree], PyTree] = lambda values: values
    lower: Callable[[PyTree], PyTree] = lambda values: values
    opt_state: PyTree | None = None
    stats: Any = None


def held(holder: Any) -> Held:
    """Returns the weights that an object holds.

    Args:
        holder: NNX module, whose `nnx.Param`s are the weights; training state, such as
            `flax.training.train_state.TrainState`: any dataclass or NamedTuple with `params` and
            one of `opt_state`, `tx` and `step`; mapping of Linen's collections with "params" among
            others, or a training state as such a mapping; or a pytree of weights.

    Raises:
        InputError: If the object is an optimizer or a Linen module, which hold no weights, or has
            an optimizer's state among the weights.
    """
    if isinstance(holder, nnx.Optimizer):
        raise InputError(
            "an nnx.Optimizer holds no weights to prune; give the model, with the optimizer as "
            "opt_state="
        )
    if isinstance(holder, nnx.Module):
        return Held(nnx.state(holder, nnx.Param), lambda new: _updated(holder, new))
    if _is_train_state(holder):
        inside = held(holder.params)
        return dataclasses.replace(
            inside,
            put_back=lambda new: _replaced(holder, inside.put_back(new)),
            opt_state=getattr(holder, "opt_state", None),
            stats=getattr(holder, "stats", None),
        )
    if isinstance(holder, nn.Module):
        raise InputError(
            "a Linen module holds no weights to prune; give the params that its init returns"
        )
    if isinstance(holder, Mapping) and COLLECTION in holder and len(holder) > 1:
        return _of_variables(holder)
    state = _optimizer_state_in(holder)
    if state is not None:
        raise InputError(
            f"the weights hold an optimizer's state at {pairing.short(state)!r}, whose moments are "
            "no weights; give the weights alone, with opt_state= for the state"
        )
    return Held(holder, lambda new: new)


def level_of(holder: Any) -> str:
    """Returns what the names of the weights begin with in a training state or Linen's variables."""
    is_collections = isinstance(holder, Mapping) and COLLECTION in holder
    return f"{COLLECTION}/" if is_collections or _is_train_state(holder) else ""


def opt_state_of(given: Any) -> PyTree | None:
    """Returns an optimizer's state; an `nnx.Optimizer` or a training state may be given for it."""
    if isinstance(given, nnx.Optimizer) or _is_train_state(given):
        return getattr(given, "opt_state", None)
    return given


def _optimizer_state_in(holder: Any) -> str | None:
    """Returns the path of a state of optax in a pytree, or None."""

    def is_state(node: Any) -> bool:
        of_optax = type(node).__module__.partition(".")[0] == "optax"
        return of_optax and hasattr(node, "_fields") and not pairing.is_absent(node)

    with pairing.keys_checked(holder):
        paths = jax.tree_util.tree_flatten_with_path(holder, is_leaf=is_state)[0]
    found = (path for path, node in paths if is_state(node))
    return next((jax.tree_util.keystr(p, simple=True, separator="/") for p in found), None)


def _updated(module: nnx.Module, weights: PyTree) -> nnx.Module:
    new = nnx.clone(module)
    nnx.update(new, weights)
    return new


def _is_train_state(holder: Any) -> bool:
    can_replace = dataclasses.is_dataclass(holder) or hasattr(holder, "_replace")
    if isinstance(holder, type) or not can_replace or not hasattr(holder, COLLECTION):
        return False
    return any(hasattr(holder, field) for field in ("opt_state", "tx", "step"))


def _replaced(state: Any, params: PyTree) -> Any:
    if hasattr(state, "_replace"):
        return state._replace(params=params)
    return dataclasses.replace(state, params=params)


def _of_variables(variables: Mapping[str, Any]) -> Held:
    inside = held(variables[COLLECTION])

    def with_params(params: PyTree, rest: Mapping[str, Any]) -> Mapping[str, Any]:
        new = {name: params if name == COLLECTION else rest[name] for name in variables}
        return FrozenDict(new) if isinstance(variables, FrozenDict) else new

    def like(values: PyTree) -> PyTree:
        nothing = {name: pairing.emptied(rest) for name, rest in variables.items()}
        return with_params(inside.like(values), nothing)

    return dataclasses.replace(
        inside,
        put_back=lambda new: with_params(inside.put_back(new), variables),
        like=like,
        opt_state=variables.get("opt_state") if inside.opt_state is None else inside.opt_state,
        lower=lambda given: (
            given[COLLECTION] if isinstance(given, Mapping) and COLLECTION in given else given
        ),
    )
