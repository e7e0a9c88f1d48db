"""Local reconstruction: the kernels of a block are trained on together, their masks held.

Source: "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", arXiv 2510.14444, of
which we know the abstract: after pruning, one attention or MLP submodule or one block at a time is
trained to match the dense model's activations on the calibration set; a window that holds a
nonlinearity suffices. Here the window is the block, whatever is in it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from swe_prune.blockwise import guard
from swe_prune.blockwise.runner import Runner, on_device, variables_with

EPOCHS = 8
"""Times that each calibration batch is seen."""

LEARNING_RATE = 1e-2
"""Size of Adam's first steps relative to the root mean square of each kernel; it decays to 0 by a
cosine."""


def reconstruct(
    runner: Runner,
    part: Any,
    kernels: Mapping[str, Any],
    masks: Mapping[str, Any],
    states: Sequence[Any],
    dense: Sequence[Any],
) -> dict[str, Array]:
    """Returns a block's kernels trained towards the dense model's outputs, pruned weights at 0.

    Adam on the mean over tokens of ‖y − y'‖² / ‖y'‖², with y the block's outputs on `states` and y'
    those of the dense block on `dense`. One program for all blocks that are alike.

    Args:
        runner: Compiled programs of the block.
        part: Variables of the dense block.
        kernels: Kernels to start from, by name.
        masks: Their masks.
        states: What goes into the pruned block, batch after batch.
        dense: What goes into the dense block in their place.
    """
    if "local" not in runner.compiled:
        runner.compiled["local"] = jax.jit(functools.partial(_step, runner), donate_argnums=(0, 1))
    step = runner.compiled["local"]
    start = {name: jnp.array(leaf, jnp.float32) for name, leaf in kernels.items()}
    scales = {name: jnp.sqrt(jnp.mean(leaf**2)) for name, leaf in start.items()}
    trained, moments = start, optax.scale_by_adam().init(start)
    steps = EPOCHS * len(states)
    rate = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    for number in range(steps):
        at = number % len(states)
        pair = on_device(states[at]), on_device(dense[at])
        size = {name: scale * rate(number) for name, scale in scales.items()}
        trained, moments = step(trained, moments, part, masks, *pair, size)
    return {name: trained[name].astype(leaf.dtype) for name, leaf in kernels.items()}


def _step(
    runner: Runner,
    trained: dict[str, Array],
    moments: Any,
    part: Any,
    masks: Mapping[str, Array],
    state: Any,
    dense: Any,
    size: Mapping[str, Array],
) -> tuple[dict[str, Array], Any]:
    wanted = runner.run(part, dense)

    def distance(trained: dict[str, Array]) -> Array:
        held = {name: jnp.where(masks[name], leaf, 0) for name, leaf in trained.items()}
        total, count = guard.apart(runner.run(variables_with(part, held), state), wanted)
        return total / jnp.maximum(count, 1)

    moved: Any
    moved, moments = optax.scale_by_adam().update(jax.grad(distance)(trained), moments)
    new = {
        name: jnp.where(masks[name], leaf - size[name] * moved[name], 0)
        for name, leaf in trained.items()
    }
    return new, moments
