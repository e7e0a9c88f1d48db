"""Back to an early point of training under a late mask: rewinding.

After a round of pruning, weight rewinding goes back to the values that the weights had at an early
step (Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020) and
learning-rate rewinding keeps the values and goes back on the schedule alone (Renda, Frankle and
Carbin, "Comparing rewinding and fine-tuning", ICLR 2020).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from swe_prune import masks, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
def rewind(params: PyTree, early_params: PyTree, mask: PyTree) -> PyTree:
    """Returns the early values under the late mask, dense tensors' early values too.

    Reinitialize the optimizer with them, or give it an early state through `masks.hold_moments`,
    and train again by a schedule that starts at the early step, `rewound_schedule`.

    Args:
        params: Late weights, which give structure, shapes, dtypes and shardings.
        early_params: Parameters of an early checkpoint; arrays of numpy will do.
        mask: Bool pytree, None where dense.

    Raises:
        InputError: The trees differ in structure or a tensor in shape.

    >>> late, early = {"w": jnp.array([5.0, 6.0])}, {"w": jnp.array([1.0, 2.0])}
    >>> rewind(late, early, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """

    def leaf(name: str, weight: Any, early: Any) -> Any:
        if not hasattr(weight, "dtype"):
            return early
        if jnp.shape(early) != jnp.shape(weight):
            raise InputError(
                f"{name!r} has shape {jnp.shape(early)} in the early weights and "
                f"{jnp.shape(weight)} in the late ones; take both from runs of one model"
            )
        early = jnp.asarray(early, weight.dtype)
        placed = isinstance(weight, jax.Array) and not isinstance(weight, Tracer)
        return jax.device_put(early, weight.sharding) if placed else early

    return masks.apply(tree.map_named(leaf, params, early_params), mask)


@checked
def rewound_schedule(schedule: optax.Schedule, to: int, *, at: int = 0) -> optax.Schedule:
    """Returns an optax schedule that goes on from an early step: t ↦ schedule(t − at + to).

    Args:
        schedule: Schedule of the learning rate, from a step count to a rate.
        to: Step to go back to.
        at: Step count of the optimizer when it goes back; before that the schedule is as it was. 0
            for an optimizer that is reinitialized.

    Raises:
        InputError: A negative or fractional step.

    >>> rate = rewound_schedule(optax.linear_schedule(1.0, 0.0, 10), to=5)
    >>> [float(rate(t)) for t in (0, 5)]
    [0.5, 0.0]
    """

    def rewound(count: Any) -> Any:
        return schedule(jnp.where(count < at, count, count - at + to))

    return rewound
