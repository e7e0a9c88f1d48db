"""The compiled steps: train and evaluate. Read this file first.

    train_step: loss and gradients -> optax update, zeros held -> apply -> snapshot when due

Both are pure functions of pytrees. `compile_train_step` is the one place where the train step
is jitted: the state is donated, so masks and statistics live in place beside the parameters. With
`masks` or `stats` None in the state those parts are not in the compiled program at all, and so it
is with what `Frozen` lacks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from swe_prune import masks, trajectory
from swe_prune.errors import InputError
from swe_prune.training import lora, losses
from swe_prune.training.distillation import Distillation, distilled_losses
from swe_prune.training.state import Frozen, TrainState

Batch = dict[str, Any]
"""{"inputs": int32 (B, L), "targets": int32 (B, L)}, and where tokens do not all count alike
"weights": (B, L), 0 for padding. "inputs" may be another pytree that the model takes."""

Metrics = dict[str, Array]


def train_step(
    state: TrainState,
    batch: Batch,
    fixed: Frozen | None = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    track_every: int,
    accumulate: int = 1,
    distillation: Distillation | None = None,
    forward: Callable[[PyTree, Array], PyTree] | None = None,
    teacher_model: nn.Module | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one optimizer step, and its metrics as scalars.

    A loss or gradient that is not finite leaves weights and moments as they are and is counted:
    "skipped" in all, "skipped_in_row" the last ones. With masks the metrics count the pruned
    weights that are not 0, "revived": always none.

    Args:
        state: State of training; masks and statistics are used where they are not None.
        batch: Windows of the training text; a batch whose weights are all 0 is skipped.
        fixed: Arrays that are read and not changed: a teacher, or the base whose adapters the state
            has.
        model: Linen model from tokens to logits.
        optimizer: Optax chain whose state is in `state`.
        track_every: Number of steps between snapshots of the trajectory.
        accumulate: Number of microbatches whose gradients are averaged; must divide the batch. Less
            memory for activations, the same step but for dropout.
        distillation: Weight of the distance to the teacher in the loss; None: the loss is the
            text's.
        forward: Function of (params, step) to the weights that the model computes with, such as
            `sparse_training.ste_magnitude`. None: the params themselves.
        teacher_model: Linen model of the teacher, if units were cut out of `model`. None: `model`.

    Raises:
        InputError: A distillation without a teacher, or a teacher without one.
    """
    fixed = Frozen() if fixed is None else fixed
    _check_teacher(fixed, distillation)
    dropout = jax.random.fold_in(state.rng, state.step)
    # Microbatches may hold different numbers of unmasked tokens.
    total = jnp.sum(batch["weights"]) / accumulate if "weights" in batch else None

    def loss_of(params: PyTree, part: Batch, key: Array) -> Array:
        if fixed.base is not None:
            params = lora.apply(fixed.base, params, fixed.masks)
        if forward is not None:
            params = forward(params, state.step)
        options: dict[str, Any] = {"train": True, "rngs": {"dropout": key}}
        if distillation is None:
            losses_BxL = _losses_BxL(model, params, part, **options)
        else:
            taught = (teacher_model or model, fixed.teacher)
            losses_BxL = distilled_losses(
                model, params, *taught, part, distillation, state.step, **options
            )
        return losses.weighted_mean(losses_BxL, part.get("weights"), total)

    loss, grads = _accumulated(loss_of, state.params, batch, dropout, accumulate)
    if state.masks is not None:
        optimizer = masks.keep(optimizer, state.masks)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = state.skipped + ~finite
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    step = state.step + 1
    stats = state.stats
    if stats is not None:
        stats = trajectory.update(stats, params, when=step % track_every == 0)
    metrics = {"loss": loss, "grad_norm": grad_norm}
    metrics |= {"skipped": skipped, "skipped_in_row": in_row}
    if state.masks is not None:
        metrics["revived"] = masks.revived(params, state.masks).saturated()
    state = dataclasses.replace(
        state,
        step=step,
        params=params,
        opt_state=opt_state,
        stats=stats,
        skipped=skipped,
        skipped_in_row=in_row,
    )
    return state, metrics


def _accumulated(
    loss_of: Callable[[PyTree, Batch, Array], Array],
    params: PyTree,
    batch: Batch,
    key: Array,
    parts: int,
) -> tuple[Array, PyTree]:
    """Returns the mean loss over a batch and its gradients, taken in parts."""
    value_and_grad = jax.value_and_grad(loss_of)
    if parts == 1:
        return value_and_grad(params, batch, key)
    # Part p is the rows p, p + parts, …: of a batch that is divided over devices in consecutive
    # rows each device has its own of every part, and nothing moves.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: PyTree, numbered: tuple[Array, Batch]) -> tuple[PyTree, None]:
        number, part = numbered
        found = value_and_grad(params, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, found), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    return jax.tree.map(lambda x: x / parts, total)


def compile_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    track_every: int = 1,
    *,
    accumulate: int = 1,
    place: Callable[[TrainState], TrainState] = lambda state: state,
    distillation: Distillation | None = None,
    forward: Callable[[PyTree, Array], PyTree] | None = None,
    teacher_model: nn.Module | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted train step of (state, batch), or of (state, batch, fixed).

    It takes over (donates) the state that it is given, and nothing else.

    Args:
        model: Linen model from tokens to logits.
        optimizer: Optax chain.
        track_every: Number of steps between snapshots of the trajectory.
        accumulate: Number of microbatches whose gradients are averaged; must divide the batch.
        place: Function that constrains the state that the step returns to a layout over devices.
        distillation: Weight of the distance to the teacher in the loss, see `train_step`; `fixed`
            then holds the teacher.
        forward: Function of (params, step) to the weights that the model computes with.
        teacher_model: Linen model of the teacher, if units were cut out of `model`. None: `model`.
    """

    def step(
        state: TrainState, batch: Batch, fixed: Frozen | None = None
    ) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(
            state,
            batch,
            fixed,
            model=model,
            optimizer=optimizer,
            track_every=track_every,
            accumulate=accumulate,
            distillation=distillation,
            forward=forward,
            teacher_model=teacher_model,
        )
        return place(state), metrics

    return jax.jit(step, donate_argnums=0)


def eval_step(params: PyTree, batch: Batch, *, model: nn.Module) -> Float[Array, ""]:
    """Returns the summed loss of a batch in nats, float32, of its tokens by their weights."""
    losses_BxL = _losses_BxL(model, params, batch)
    if "weights" not in batch:
        return jnp.sum(losses_BxL)
    return losses.weighted_mean(losses_BxL, batch["weights"], jnp.ones(()))


def _losses_BxL(model: nn.Module, params: PyTree, batch: Batch, **options: Any) -> Array:
    logits_BxLxV: Any = model.apply({"params": params}, batch["inputs"], **options)
    return losses.cross_entropy(logits_BxLxV, batch["targets"])


def _check_teacher(fixed: Frozen, distillation: Distillation | None) -> None:
    if (fixed.teacher is None) == (distillation is None):
        return
    if distillation is None:
        raise InputError(
            "a teacher was given to the train step and no distillation= to compile it with; give "
            "both or neither"
        )
    raise InputError(
        "the train step distils and was given no teacher; pass Frozen(teacher=the dense "
        "parameters) after the batch"
    )


def loss_fn(model: nn.Module) -> Callable[[PyTree, Batch], Float[Array, ""]]:
    """Returns the function of (params, batch) to the mean loss in nats per token, by the weights.

    Args:
        model: Linen model of tokens to logits.
    """

    def loss(params: PyTree, batch: Batch) -> Array:
        return losses.weighted_mean(_losses_BxL(model, params, dict(batch)), batch.get("weights"))

    return loss


def compile_eval_step(model: nn.Module) -> Callable[[PyTree, Batch], Float[Array, ""]]:
    """Returns the jitted evaluation step."""
    return jax.jit(functools.partial(eval_step, model=model))
