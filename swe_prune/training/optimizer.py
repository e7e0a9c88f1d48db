"""AdamW with linear warm-up and cosine decay, from the settings of a phase."""

import jax
import optax
from jaxtyping import PyTree

from swe_prune.config import PhaseConfig, to_steps
from swe_prune.sparse_training import rewound_schedule


def schedule(phase: PhaseConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: up from 0, then down a half cosine.

    Args:
        phase: settings; a warm-up longer than the phase is cut to it.
        steps: length of the phase; the final learning rate is reached there.
    """
    warmup = min(to_steps(phase.warmup, total=steps), steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=phase.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=phase.final_learning_rate,
    )


def build(
    phase: PhaseConfig, steps: int, *, start: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by the global norm, then AdamW that decays matrices only.

    Biases and norms, which have one axis, are not decayed (GPT-2 and nanoGPT do the same).

    Args:
        phase: settings.
        steps: length of the phase that the learning rate belongs to.
        start: the step of it to begin at: the learning rate, and it alone, is rewound to there.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda weight: weight.ndim >= 2, params)

    rate = schedule(phase, steps)
    return optax.chain(
        optax.clip_by_global_norm(phase.clip),
        optax.adamw(
            rewound_schedule(rate, start) if start else rate,
            b1=phase.b1,
            b2=phase.b2,
            weight_decay=phase.weight_decay,
            mask=matrices,
        ),
    )
