"""Tracing a user's function of weights and a batch to a jaxpr, with one sentence when it fails."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.errors import InputError, first_line
from swe_prune.layout.notes import Cell
from swe_prune.layout.views import of_leaf


class Traced(NamedTuple):
    """A function as a jaxpr.

    Attributes:
        closed: Closed jaxpr of the array leaves of the parameters and of the batch.
        names: Names of the floating-point leaves of the parameters, in their order.
        shapes: Their shapes.
        numbers: Index in `names` of each argument; None for other arrays.
        data: Whether each argument is of the batch.
    """

    closed: Any
    names: list[str]
    shapes: list[tuple[int, ...]]
    numbers: list[int | None]
    data: list[bool]

    def cells(self, values: list[Any] | None = None) -> list[Cell]:
        """Returns the arguments for a walk, with values or without."""
        given = [None] * len(self.data) if values is None else values
        return [
            Cell(value, () if n is None else (of_leaf(n, self.shapes[n]),), data)
            for value, n, data in zip(given, self.numbers, self.data, strict=True)
        ]


def function_of(fn: Any, params: PyTree) -> Callable[[PyTree, PyTree], Any]:
    """Returns the function of (params, batch) that a module stands for, or the function itself.

    Args:
        fn: Function of (params, batch), a Linen module, or an NNX module.
        params: Parameters that the function will be given.

    Raises:
        InputError: `fn` is none of these.
    """
    if isinstance(fn, nn.Module):
        return lambda params, batch: fn.apply(variables_of(params), inputs_of(batch))
    if isinstance(fn, nnx.Module):
        if isinstance(params, nnx.Module):
            return lambda params, batch: params(inputs_of(batch))
        return lambda params, batch: _with_state(fn, params)(inputs_of(batch))
    if not callable(fn):
        raise InputError(
            "fn must be a function of (params, batch), a Linen module or an NNX module, got "
            f"{type(fn).__name__}; wrap it, such as lambda params, batch: …"
        )
    return fn


def variables_of(params: Any) -> Any:
    """Returns the variables of a Linen module: `params` itself, or {"params": params}."""
    return params if isinstance(params, Mapping) and "params" in params else {"params": params}


def inputs_of(batch: Any) -> Any:
    """Returns what a model is applied to: the batch, or the batch's "inputs" if it has them."""
    return batch["inputs"] if isinstance(batch, Mapping) and "inputs" in batch else batch


def _with_state(module: Any, params: PyTree) -> Any:
    """Returns a copy of an NNX module with the weights of a state or a dict of them."""
    graph, state = nnx.split(module)
    given = dict(tree.named_leaves(params))
    own = {name for name, _ in tree.named_leaves(state)}
    strange = next(
        (name for name, leaf in given.items() if leaf is not None and name not in own), None
    )
    if strange is not None:
        raise InputError(
            f"{tree.short(strange)!r} is none of the {type(module).__name__}'s weights, such as "
            f"{tree.short(min(own, default=''))!r}; give nnx.state(model, nnx.Param)"
        )
    filled = tree.map_leaves(lambda name, leaf: given.get(name, leaf), state)
    return nnx.merge(graph, filled)


def trace(fn: Callable[[PyTree, PyTree], Any], params: PyTree, batch: PyTree) -> Traced:
    """Traces a function; its arguments may be abstract, traced or concrete.

    Args:
        fn: Function of (params, batch).
        params: Pytree of weights. Leaves that are not arrays are passed as they are.
        batch: Pytree of arrays.

    Raises whatever the function raises; see `one_sentence`.
    """
    named = list(tree.named_leaves(params))
    names = [name for name, leaf in named if tree.is_weight(leaf)]
    leaves, structure = jax.tree.flatten((params, batch))
    weights = len(jax.tree.leaves(params))
    arrays = [at for at, leaf in enumerate(leaves) if _is_array(leaf)]

    def call(*values: Any) -> Any:
        filled = list(leaves)
        for at, value in zip(arrays, values, strict=True):
            filled[at] = value
        result = fn(*structure.unflatten(filled))
        return [leaf for leaf in jax.tree.leaves(result) if _is_array(leaf)]

    closed = jax.make_jaxpr(call)(*(leaves[at] for at in arrays))
    count = iter(range(len(names)))
    numbers = [
        next(count) if at < weights and tree.is_weight(leaves[at]) else None for at in arrays
    ]
    shapes = [leaf.shape for _, leaf in named if tree.is_weight(leaf)]
    return Traced(closed, names, shapes, numbers, [at >= weights for at in arrays])


@contextlib.contextmanager
def one_sentence(what: str, batch: PyTree) -> Iterator[None]:
    """Turns whatever a user's function raises on a batch into an InputError of one sentence.

    Args:
        what: Name of the batch, such as "calibration batch 0".
        batch: Batch that the function is run on.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the function is the user's and may raise anything
        raise InputError(
            f"{what}, {tree.described(batch)}, cannot be run through the function "
            f"({first_line(error)}); give a function of (params, batch) and a batch "
            "with the shapes and dtypes that it takes"
        ) from error


def array_leaves(*trees: PyTree) -> list[Any]:
    """Returns the arguments of the jaxpr that `trace` makes of (params, batch)."""
    return [leaf for leaf in jax.tree.leaves(trees) if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
