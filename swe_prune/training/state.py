"""Training state: one pytree of everything that changes, and one of everything that does not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Int, PyTree

from swe_prune import masks as masks_lib
from swe_prune.trajectory import TrajectoryStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The carry of the train step.

    Attributes:
        step: Number of optimizer steps taken, int32.
        params: Float32 weights, or `lora.Adapters` of the base in `Frozen`.
        opt_state: State of the optax chain.
        masks: Bool pytree like `params`, None where dense; or None if nothing is pruned.
        stats: Trajectory statistics, or None if nothing is tracked.
        rng: Typed JAX random key; each step folds its number into it.
        skipped: Number of steps that were skipped because loss or gradient was not finite, int32.
        skipped_in_row: Number of consecutive skipped steps up to the last step, int32.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState
    masks: PyTree | None
    stats: TrajectoryStats | None
    rng: Array
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Constant inputs of the train step: a separate argument that is never donated.

    Attributes:
        teacher: Parameters of the dense model for `Distillation`, or None.
        base: Base parameters if the params of the state are `lora.Adapters`, or None.
        masks: Bool pytree like `base`, None where dense; the masks in the state are for its params.
    """

    teacher: PyTree | None = None
    base: PyTree | None = None
    masks: PyTree | None = None


def init_params(model: nn.Module, seed: int, inputs: Any) -> PyTree:
    """Returns newly initialized parameters.

    Args:
        model: Language model.
        seed: Seed of the initialization.
        inputs: Inputs to initialize with, or for a model of text their number of tokens.
    """
    if isinstance(inputs, int):
        inputs = jnp.zeros((1, inputs), jnp.int32)
    init = jax.jit(model.init)  # compiling op by op takes many times as long
    return init(jax.random.key(seed), inputs)["params"]


def create(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    masks: PyTree | None = None,
    stats: TrajectoryStats | None = None,
) -> TrainState:
    """Returns a state at step 0 with new optimizer moments; masked weights are set to 0.

    Args:
        params: Pytree of float32 weights.
        optimizer: Optax chain.
        seed: Seed of the random key.
        masks: Bool pytree like `params`, None where dense. If None, nothing is pruned.
        stats: Trajectory statistics. If None, nothing is tracked.
    """
    params = params if masks is None else masks_lib.apply(params, masks)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        masks=masks,
        stats=stats,
        rng=jax.random.key(seed),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
