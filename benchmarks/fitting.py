"""A training loop and spreads in words, for the systems of `benchmarks/related.py`."""

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


def quartiles(values: Sequence[float]) -> str:
    """Returns the median with the quartiles.

    >>> quartiles([1.0, 2.0, 3.0])
    '2.000 (1.500 to 2.500)'
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
