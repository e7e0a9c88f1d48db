"""Everything that changes while a model trains in one pytree, and beside it what does not."""

import dataclasses

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
        step: optimizer steps taken, int32.
        params: float32 weights, or `lora.Adapters` of those in `Frozen`.
        opt_state: of the optax chain.
        masks: bool pytree like params with None where dense, or None: nothing is pruned.
        stats: trajectory statistics, or None: nothing is tracked.
        rng: a typed jax random key; the step folds its number into it.
        skipped: steps whose loss or gradient was not finite and that changed nothing, int32.
        skipped_in_row: how many of them were the last ones, int32.
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
    """What the train step may read and leaves as it is: an argument of its own, never donated.

    Attributes:
        teacher: parameters of the dense model for `losses.Distillation`, or None.
        base: parameters under the `lora.Adapters` that the state then has as its params, or None.
        masks: of the base, bool, None where dense; those of the state are of its own params.
    """

    teacher: PyTree | None = None
    base: PyTree | None = None
    masks: PyTree | None = None


def init_params(model: nn.Module, seed: int, context: int) -> PyTree:
    """Returns freshly initialized parameters; under `jax.eval_shape`, their shapes."""
    tokens_BxL = jnp.zeros((1, context), jnp.int32)
    init = jax.jit(model.init)  # op by op it would take many times as long to compile
    return init(jax.random.key(seed), tokens_BxL)["params"]


def create(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    masks: PyTree | None = None,
    stats: TrajectoryStats | None = None,
) -> TrainState:
    """Returns a state at step 0 with fresh optimizer moments; masked weights are zeroed."""
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
