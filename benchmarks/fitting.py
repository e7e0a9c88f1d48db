"""What `benchmarks/related.py` trains, times and prints with."""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array
from timing import compare

from swe_prune import ledger
from swe_prune.config import ModelConfig
from swe_prune.models.block import MLP


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


def cost(once: Callable[[float], Any], keep: float, examples: int) -> dict[str, Any]:
    """Returns what a train step of a share costs, as multiples of a dense step beside it.

    Args:
        once: Function that trains one step through a share of the channels, and waits for it.
        keep: Share.
        examples: Number of examples of a step.

    Returns:
        Lists of the ratios of time and of energy, and where the energy is from.
    """

    def ten(share: float) -> int:
        for _ in range(10):
            once(share)
        return 10 * examples

    sparse, dense = functools.partial(ten, keep), functools.partial(ten, 1.0)
    timed = compare(sparse, dense, repetitions=9)
    meters = ledger.Ledger().meters
    found = ledger.windows({"sparse": sparse, "dense": dense}, meters, count=5, seconds=1.0)
    joules = [
        one.per_token.value / other.per_token.value
        for one, other in zip(found["sparse"], found["dense"], strict=True)
    ]
    source = "+".join(dict.fromkeys(meter.source for meter in meters))
    return {"time": [1 / one for one in timed.speedups], "energy": joules, "source": source}


def gated_mlp(width: int, hidden: int, keys: Array) -> tuple[Callable[..., Array], Any]:
    """Returns a compiled MLP, a function of its inputs and weights, and weights drawn at random.

    Args:
        width: Size of inputs and outputs.
        hidden: Number of hidden units.
        keys: Three random keys.
    """
    shapes = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
    weights = {
        name: {"kernel": jax.random.normal(key, shape) * 0.02}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    config = ModelConfig(width=width, hidden=hidden, gated=True, activation="silu")
    return jax.jit(lambda x, weights: MLP(config).apply({"params": weights}, x)), weights


def operations(step: Any, *arguments: Any) -> float:
    """Returns the number of arithmetic operations of a jitted function, as XLA counts them."""
    return float(step.lower(*arguments).cost_analysis()["flops"])


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
