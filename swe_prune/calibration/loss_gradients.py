"""Per-example gradients of a loss on calibration data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.calibration import batching
from swe_prune.calibration.layer_inputs import wanted_shapes
from swe_prune.errors import InputError, first_line


@checked
def gradients(
    loss: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: PyTree | None = None,
    at_once: int | None = None,
) -> dict[str, PyTree]:
    """Returns the mean gradient and the mean squared gradient of a loss over examples.

        gradient = (1/n) Σ gₑ        gradient_square = (1/n) Σ gₑ²,  gₑ of one example e

    The second is the diagonal of the empirical Fisher information. It needs a separate gradient for
    every example, so `loss` is mapped over batches of one.

    Args:
        loss: Function (params, batch) that returns a scalar, the mean over the batch's examples.
        params: Pytree of weights; only the prunable ones are differentiated.
        batches: Pytrees of arrays whose first axis runs over the examples, consumed one by one.
            They may be sharded over devices along that axis; one step is compiled per shape.
        prunable: Bool pytree like `params`. If None, `tree.prunable(params)`.
        at_once: Number of examples whose gradients are in memory together. If None, the whole
            batch.

    Returns:
        {"gradient": …, "gradient_square": …}: float32 pytrees like the parameters, None where
        dense.

    Raises:
        InputError: If there is no batch, the loss cannot be computed on a batch or is not a scalar,
            or a gradient has NaN or inf.

    >>> def loss(params, x):
    ...     return jnp.mean(x @ params["w"])
    >>> measured = gradients(loss, {"w": jnp.ones((1, 1))}, [jnp.array([[1.0], [3.0]])])
    >>> {name: leaf["w"].item() for name, leaf in measured.items()}
    {'gradient': 2.0, 'gradient_square': 5.0}
    """
    names = wanted_shapes(params, prunable)
    weights = {name: leaf for name, leaf in tree.named_leaves(params) if name in names}

    def sums(weights: Any, params: Any, batch: Any) -> Any:
        return _summed(loss, weights, params, batch, at_once)

    def add(state: Any, weights: Any, params: Any, batch: Any) -> Any:
        return jax.tree.map(jnp.add, state, sums(weights, params, batch))

    # Split the prunable weights, which are differentiated, from the rest.
    step = jax.jit(add, donate_argnums=0)
    rest = tree.map_named(lambda name, leaf: None if name in names else leaf, params)
    state = {
        name: {"sum": jnp.zeros(shape, jnp.float32), "square": jnp.zeros(shape, jnp.float32)}
        for name, shape in names.items()
    }
    # Stream the batches; a new shape is checked before it is run.
    known, n, number = set(), 0, -1
    for number, batch in enumerate(batching.each(batches)):
        n += batching.sequences(batch, number)
        shapes = str(batching.shapes(batch))
        if shapes not in known:
            _check(sums, weights, rest, batch, number)
            known.add(shapes)
        state = step(state, weights, rest, batch)
    if not n:
        raise batching.nothing_given()
    _reject_not_finite(state)

    def mean(which: str) -> PyTree:
        return tree.map_leaves(
            lambda name, _: state[name][which] / n if name in names else None, params
        )

    return {"gradient": mean("sum"), "gradient_square": mean("square")}


def _summed(loss: Any, weights: Any, rest: Any, batch: Any, at_once: int | None) -> Any:
    """Returns the sums of the gradients and of their squares over a batch, by name."""

    def of_one(weights: Any, example: Any) -> Any:
        filled = tree.map_leaves(lambda name, leaf: weights.get(name, leaf), rest)
        return loss(filled, example)

    def of_some(batch: Any) -> Any:
        # Map the loss over batches of one example.
        ones = jax.tree.map(lambda x: x[:, None], batch)
        each = jax.vmap(jax.grad(of_one), in_axes=(None, 0))(weights, ones)
        each = jax.tree.map(lambda g: g.astype(jnp.float32), each)
        return {
            name: {"sum": jnp.sum(g, axis=0), "square": jnp.sum(g**2, axis=0)}
            for name, g in each.items()
        }

    length = batching.sequences(batch, 0)
    if at_once is None or at_once >= length:
        return of_some(batch)
    # Scan over groups of `at_once` examples; the remainder is a smaller group.
    whole = length // at_once * at_once
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, at_once, *x.shape[1:]), batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_some, batch)
    )

    def more(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_some(part)), None

    total, _ = jax.lax.scan(more, zeros, parts)
    if whole == length:
        return total
    return jax.tree.map(jnp.add, total, of_some(jax.tree.map(lambda x: x[whole:], batch)))


def _check(sums: Any, weights: Any, rest: Any, batch: Any, number: int) -> None:
    try:
        jax.eval_shape(sums, weights, rest, batch)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"the loss cannot be differentiated on calibration batch {number}, "
            f"{tree.described(batch)} ({first_line(error)}); it must take (params, "
            "batch) with a batch of one and return a scalar"
        ) from error


def _reject_not_finite(state: Any) -> None:
    finite = _finite(state)
    for name, ok in jax.device_get(finite).items():
        if not ok:
            raise InputError(
                f"the gradient of {name!r} has NaN or inf (or squares beyond float32) on the "
                "calibration batches; find the batch or the weight that causes it"
            )


@jax.jit
def _finite(state: Any) -> Any:
    return {
        name: jnp.all(jnp.isfinite(sums["sum"]) & jnp.isfinite(sums["square"]))
        for name, sums in state.items()
    }
