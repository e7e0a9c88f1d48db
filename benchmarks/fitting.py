"""A training loop for models with a loss of their own; `benchmarks/related.py` uses it."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax


def compiled(
    loss: Callable[[Any, Any], Any], optimizer: optax.GradientTransformation
) -> Callable[[Any, Iterator[Any], int], Any]:
    """Returns a function of (params, batches, steps) to trained parameters, compiled once."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def fit(params: Any, batches: Iterator[Any], steps: int) -> Any:
        state = optimizer.init(params)
        for _ in range(steps):
            params, state = step(params, state, next(batches))
        return params

    return fit


def shown(values: Sequence[float], digits: int = 4) -> str:
    """Returns the mean, with the standard deviation of several.

    >>> shown([1.0, 2.0], 1), shown([1.0], 0)
    ('1.5 ± 0.7', '1')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
