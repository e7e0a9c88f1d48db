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
