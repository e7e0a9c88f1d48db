"""Criteria that weigh a weight by what comes into it on calibration data."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("wanda")
def wanda(weight: Float[Array, "..."], input_norm: Float[Array, "..."]) -> Float[Array, "..."]:
    """|W_ij| ‖X_j‖₂: a weight's size times the norm of the input that it multiplies.

    Ranked among the weights of one output, `scope="row"` or n:m. One pass over calibration data,
    no backward pass, a vector for each kernel.

    When: for pretrained language models without training, by `scope="row"` or n:m.
    Source: Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language
        models", ICLR 2024.
    """
    return jnp.abs(weight) * input_norm


@register("ria")
def ria(
    weight: Float[Array, "..."],
    input_norm: Float[Array, "..."],
    inputs: tuple[int, ...],
    power: float = 0.5,
) -> Float[Array, "..."]:
    """(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) ‖X_j‖₂^power: relative importance, activations.

    A weight is compared with the others of its input and with those of its output, so that neither
    is emptied. One pass over calibration data, no backward pass, as `wanda`.

    When: as `wanda`, by `scope="row"` or n:m.
    Source: Zhang et al., "Plug-and-Play: an efficient post-training pruning method for large
        language models", ICLR 2024; we did not read it again for this.
    """
    size = jnp.abs(weight)
    outputs = tuple(axis for axis in range(size.ndim) if axis not in inputs)

    def share(axes: tuple[int, ...]) -> Array:
        total = jnp.sum(size, axis=axes, keepdims=True)
        return jnp.where(total > 0, size / jnp.where(total > 0, total, 1), 0.0)

    return (share(inputs) + share(outputs)) * input_norm**power
