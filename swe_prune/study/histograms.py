"""What the report draws of the weights: a fixed sample of each tensor, and histograms."""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import counting, tree

SAMPLED_PER_TENSOR = 48  # weights whose trajectories the report may draw
HISTOGRAM_BINS = 80


def sample_indices(name: str, size: int) -> np.ndarray:
    """Returns the flat indices, int64, of the weights of a tensor whose trajectories are kept."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.sort(rng.choice(size, min(SAMPLED_PER_TENSOR, size), replace=False))


def sampled(values: PyTree) -> dict[str, Any]:
    """Returns the sampled elements of every tensor by name; None leaves are left out."""
    return {
        name: leaf[np.unravel_index(sample_indices(name, tree.size(leaf)), leaf.shape)]
        for name, leaf in tree.named_leaves(values)
        if leaf is not None
    }


def sampler(prunable: PyTree, everywhere: Any) -> Callable[[PyTree], dict[str, Any]]:
    """Returns the compiled function from parameters to the sampled weights of prunable tensors.

    Args:
        prunable: Bool pytree like the parameters.
        everywhere: Sharding of arrays that every process must have whole.
    """

    def sample(params: PyTree) -> dict[str, Any]:
        return sampled(
            tree.map_named(lambda _, weight, chosen: weight if chosen else None, params, prunable)
        )

    return jax.jit(sample, out_shardings=everywhere)


def histogram_edges(params: PyTree, masks: PyTree) -> np.ndarray:
    """Returns float32 edges that span the weights of the masked tensors, symmetric about 0."""
    largest = max(float(_largest(weight)) for weight, _ in _masked(params, masks))
    # Float32, as the weights are: the largest must not fall outside by a rounding.
    return np.linspace(-largest, largest, HISTOGRAM_BINS + 1, dtype=np.float32)


def histogram(params: PyTree, masks: PyTree, edges: Any, *, kept_only: bool) -> np.ndarray:
    """Returns int64 counts of the masked tensors' weights per bin.

    Args:
        params: Pytree of weights.
        masks: Bool pytree, None where dense; dense tensors are not counted.
        edges: Bin edges from `histogram_edges`; values beyond them go into the outermost bins.
        kept_only: Whether weights that the mask removes are left out.
    """
    edges = np.asarray(edges, np.float32)
    counts = np.zeros(len(edges) - 1, np.int64)
    for weight, mask in _masked(params, masks):
        reached = np.asarray(_reached(weight, mask, edges, kept_only=kept_only), np.int64)
        counts += reached[:-1] - np.append(reached[1:-1], 0)
    return counts


def _masked(params: PyTree, masks: PyTree) -> Iterator[tuple[Any, Any]]:
    pairs = zip(tree.named_leaves(params), tree.named_leaves(masks), strict=True)
    return ((weight, mask) for (_, weight), (_, mask) in pairs if mask is not None)


@jax.jit
def _largest(weight: Array) -> Array:
    return jnp.max(jnp.abs(weight))


@functools.partial(jax.jit, static_argnames="kept_only")
def _reached(weight: Array, mask: Array, edges: Array, *, kept_only: bool) -> Array:
    """Returns for each edge how many clipped weights reach it, summed where they lie."""
    clipped = jnp.clip(weight, edges[0], edges[-1])

    def reach(edge: Array) -> Array:
        return counting.count_each([(clipped >= edge) & (mask | (not kept_only))])[0]

    return jax.lax.map(reach, edges)
