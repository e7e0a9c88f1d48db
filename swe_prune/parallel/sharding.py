"""Shardings of a training state, in which everything follows its parameter."""

import dataclasses
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.training.state import TrainState


def with_shardings(params: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Returns abstract parameters with shardings.

    Args:
        params: Abstract parameters from `jax.eval_shape`.
        specs: PartitionSpec of each parameter, from `partition`.
        mesh: Mesh of devices.
    """
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        params,
        specs,
    )


def shard_state(state: TrainState, params: PyTree) -> TrainState:
    """Shards every array of a training state like the parameter that it belongs to.

    Moments, masks and statistics get the sharding of their parameter. Arrays that belong to no
    parameter, such as counters and Adafactor's factored moments, are replicated. Traced arrays are
    constrained, so that a compiled step returns the state with the shardings of its input. Abstract
    arrays, from `jax.eval_shape`, get the sharding for restoring a checkpoint.

    Args:
        state: Training state, concrete, traced or abstract.
        params: Abstract parameters with shardings, from `with_shardings`.
    """
    # Arrays that belong to no parameter are replicated over the mesh.
    of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
    mesh = next(iter(jax.tree.leaves(of_params))).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def whole(part: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _put(leaf, everywhere), part)

    # Moments have the path and the shape of their parameter; factored ones only the path.
    like_of = dict(tree.named_leaves(params))

    def moment(name: str, leaf: Any) -> Any:
        like = tree.by_suffix(name, like_of)
        if like is None or leaf.shape != like.shape:
            return _put(leaf, everywhere)
        return _put(leaf, like.sharding)

    opt_state = tree.map_named(moment, state.opt_state)
    stats = state.stats
    if stats is not None:
        stats = dataclasses.replace(
            stats,
            start=whole(stats.start),
            count=whole(stats.count),
            weight_sum=whole(stats.weight_sum),
            settings=whole(stats.settings),
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
    """Shards a pytree like the parameters, None where dense, as the parameters are sharded.

    Args:
        part: Masks, scores or statistics; concrete, traced or abstract.
        params: Abstract parameters with shardings, from `with_shardings`.
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
