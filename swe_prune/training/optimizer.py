"""AdamW with linear warm-up, a stable part if any, and cosine decay, built from a phase."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.config import PhaseConfig, to_steps
from swe_prune.sparse_training import rewound_schedule


def schedule(phase: PhaseConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate schedule: linear warm-up, a stable part if any, cosine decay.

    Step i of a warm-up of n steps has the rate peak · (i + 1) / (n + 1), as in nanoGPT, so that the
    first step moves the weights too and step n is the first at the peak. The decay begins after the
    share `decay_from` of the steps; a final rate equal to the peak gives a constant schedule.

    Args:
        phase: Settings of the phase; a warm-up longer than the phase is cut to its length.
        steps: Number of steps of the phase, at which the final learning rate is reached.
    """
    warmup = min(to_steps(phase.warmup, total=steps), steps)
    stable = max(round(phase.decay_from * steps), warmup)
    peak = phase.learning_rate
    parts = [optax.linear_schedule(peak / (warmup + 1), peak, warmup)]
    if stable > warmup:
        parts.append(optax.constant_schedule(peak))
    decay = max(steps, stable + 1) - stable
    parts.append(optax.cosine_decay_schedule(peak, decay, phase.final_learning_rate / peak))
    return optax.join_schedules(parts, [warmup, stable][: len(parts) - 1])


def build(
    phase: PhaseConfig,
    steps: int,
    *,
    start: int = 0,
    frozen: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by the global norm, followed by AdamW with weight decay on matrices only.

    Biases and norms, which have one axis, are not decayed, as in GPT-2 and nanoGPT.

    Args:
        phase: Settings of the phase.
        steps: Number of steps of the phase that the learning rate belongs to.
        start: Step of the learning rate schedule to start from; nothing else is rewound.
        frozen: Function from a weight's name to whether it never changes; such weights have no
            moments and do not count in the norm. If None, all change.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda weight: weight.ndim >= 2, params)

    rate = schedule(phase, steps)
    chain = optax.chain(
        optax.clip_by_global_norm(phase.clip),
        optax.adamw(
            rewound_schedule(rate, start) if start else rate,
            b1=phase.b1,
            b2=phase.b2,
            weight_decay=phase.weight_decay,
            mask=matrices,
        ),
    )
    if frozen is None:
        return chain

    def groups(params: PyTree) -> PyTree:
        return tree.map_named(lambda name, _: "frozen" if frozen(name) else "trained", params)

    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, groups)


def stop_frozen(frozen: Callable[[str], bool]) -> Callable[[PyTree, Any], PyTree]:
    """Returns the `forward` of a train step that computes no gradient of frozen weights.

    Args:
        frozen: Function from a weight's name to whether it never changes.
    """

    def forward(params: PyTree, step: Any) -> PyTree:
        return tree.map_named(
            lambda name, leaf: jax.lax.stop_gradient(leaf) if frozen(name) else leaf, params
        )

    return forward
