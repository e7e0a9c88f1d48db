"""The layout of a whole training state: whatever belongs to a parameter lies where it lies."""

import dataclasses
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.training.state import TrainState


def with_shardings(params: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Returns abstract parameters that carry their shardings.

    Args:
        params: shapes and dtypes, as `jax.eval_shape` gives them.
        specs: a PartitionSpec each, from `partition`.
        mesh: the devices.
    """
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        params,
        specs,
    )


def shard_state(
    state: TrainState, optimizer: optax.GradientTransformation, params: PyTree
) -> TrainState:
    """Returns the state with every array laid out as the parameter that it belongs to.

    Moments, masks and statistics take their parameter's sharding; what belongs to no parameter, as
    counters and Adafactor's factored moments, is whole on every device. Traced arrays are
    constrained, so that a compiled step gives the state back as it took it; abstract ones, from
    `jax.eval_shape`, get the sharding to restore a checkpoint to.

    Args:
        state: concrete, traced or abstract.
        optimizer: whose state is in it.
        params: abstract parameters with shardings, from `with_shardings`.
    """
    of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
    mesh = next(iter(jax.tree.leaves(of_params))).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(part: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _put(leaf, everywhere), part)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, like: _put(leaf, like.sharding if leaf.shape == like.shape else everywhere),
        state.opt_state,
        params,
        transform_non_params=lambda leaf: _put(leaf, everywhere),
    )
    stats = state.stats
    if stats is not None:
        stats = dataclasses.replace(
            stats,
            start=whole(stats.start),
            count=whole(stats.count),
            weight_sum=whole(stats.weight_sum),
            buffers={name: shard_like(part, params) for name, part in stats.buffers.items()},
        )
    return dataclasses.replace(
        state,
        step=whole(state.step),
        params=shard_like(state.params, params),
        opt_state=opt_state,
        masks=None if state.masks is None else shard_like(state.masks, params),
        stats=stats,
        rng=whole(state.rng),
        skipped=whole(state.skipped),
        skipped_in_row=whole(state.skipped_in_row),
    )


def shard_like(part: PyTree, params: PyTree) -> PyTree:
    """Returns a pytree like the parameters, None where dense, laid out as they are.

    Args:
        part: masks, scores or statistics; concrete, traced or abstract.
        params: abstract parameters with shardings, from `with_shardings`.
    """
    return tree.map_leaves(
        lambda _, leaf, like: None if leaf is None else _put(leaf, like.sharding), part, params
    )


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if isinstance(leaf, Tracer):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    return jax.device_put(leaf, sharding)
