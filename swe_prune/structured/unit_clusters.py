"""Clusters of units that go together, by k-means of their samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.structured import kernel_width


@checked
def clusters_of(
    samples_NxF: Float[Any, "N F"], number: int, *, seed: int = 0, iterations: int = 25
) -> Int[np.ndarray, " F"]:
    """Returns the cluster of each unit, by Lloyd's k-means of their standardized samples.

    Args:
        samples_NxF: Samples of F units.
        number: Number of clusters, up to the number of units.
        seed: Seed of the first centres (k-means++).
        iterations: Number of iterations.

    Raises:
        InputError: Fewer than one cluster, more than units, or samples that are all equal.
    """
    units_FxN = np.asarray(kernel_width.standardized(samples_NxF)).T
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(units_FxN):
        raise InputError(
            f"the number of clusters must be 1 to {len(units_FxN)}, the number of units, got "
            f"{number!r}"
        )
    # Each first centre is a unit far from the centres before it.
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(units_FxN)))]
    near_F = ((units_FxN - units_FxN[chosen[0]]) ** 2).sum(1)
    while len(chosen) < number:
        total = near_F.sum()
        odds = near_F / total if total > 0 else None
        chosen.append(int(rng.choice(len(units_FxN), p=odds)))
        near_F = np.minimum(near_F, ((units_FxN - units_FxN[chosen[-1]]) ** 2).sum(1))
    return np.asarray(_lloyd(jnp.asarray(units_FxN), jnp.asarray(units_FxN[chosen]), iterations))


@jax.jit
def _nearest(units_FxN: Any, centres_CxN: Any) -> Any:
    squares_C = jnp.sum(centres_CxN**2, 1)
    return jnp.argmin(squares_C - 2 * units_FxN @ centres_CxN.T, axis=1)


def _lloyd(units_FxN: Any, centres_CxN: Any, iterations: int) -> Any:
    for _ in range(iterations):
        member_F = _nearest(units_FxN, centres_CxN)
        one_CxF = jax.nn.one_hot(member_F, len(centres_CxN), axis=0)
        count_C = one_CxF.sum(1, keepdims=True)
        moved = one_CxF @ units_FxN / jnp.maximum(count_C, 1)
        centres_CxN = jnp.where(count_C > 0, moved, centres_CxN)
    return _nearest(units_FxN, centres_CxN)
