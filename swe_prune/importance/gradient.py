"""Criteria of the gradient on calibration batches: what the loss would do if a weight went.

`gradient` is the mean gradient g of the loss over the batches, `gradient_square` the mean over
examples of their squared gradients, E g², the diagonal of the empirical Fisher information.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("snip")
def snip(weight: Float[Array, "..."], gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    """|g w| = |∂L/∂m| at mask m = 1: SNIP.

    Its place is at initialization, on one batch, with global selection. The paper divides by the
    sum over all weights, a constant that changes no ranking and is left out here.

    When: before training, on one batch, with global selection.
    Source: Lee, Ajanthan and Torr, ICLR 2019.
    """
    return jnp.abs(weight * gradient)


@register("taylor")
def taylor(
    weight: Float[Array, "..."], gradient: Float[Array, "..."], signed: bool = False
) -> Float[Array, "..."]:
    """|w g|: the first-order change of the loss.

    Summed over a group it is LLM-Pruner's `param_first`. With
    `signed=True` it is w g, whose group form |Σ w g| is LLM-Pruner's `vectorize`: select by a
    pattern with `reduce="abs_sum"`.

    When: for whole rows and neurons, with a pattern; single weights of a trained model have no
        first-order effect left.
    Source: Molchanov et al., ICLR 2017; Ma, Fang and Wang, NeurIPS 2023.
    """
    product = weight * gradient
    return product if signed else jnp.abs(product)


@register("fisher")
def fisher(
    weight: Float[Array, "..."], gradient_square: Float[Array, "..."], power: float = 1.0
) -> Float[Array, "..."]:
    """w² (E g²)^power: the second-order change of the loss by the diagonal Fisher information.

    At power 1 it ranks as optimal brain damage (LeCun, Denker and Solla, 1989), ½ h w², does; it is
    LLM-Pruner's `param_second`, |w h w|. At power ½ it is what `magnitude_curvature` is with Adam's
    second moment, and fits the calibration text less closely.

    When: for trained weights whose optimizer state is lost.
    Source: LeCun, Denker and Solla, 1989; LLM-Pruner's `param_second`.
    """
    return weight**2 * gradient_square**power


@register("taylor_mix")
def taylor_mix(
    weight: Float[Array, "..."],
    gradient: Float[Array, "..."],
    gradient_square: Float[Array, "..."],
) -> Float[Array, "..."]:
    """|w g − ½ w h w| with h = E g²: first and second order together (LLM-Pruner's `param_mix`).

    When: for groups, as LLM-Pruner does.
    Source: Ma, Fang and Wang, NeurIPS 2023.
    """
    return jnp.abs(weight * gradient - 0.5 * weight * gradient_square * weight)


@register("swe_fisher")
def swe_fisher(
    late_mean: Float[Array, "..."], gradient_square: Float[Array, "..."], power: float = 0.5
) -> Float[Array, "..."]:
    """(Σ wₜ θ(t) / Σ wₜ)² (E g²)^power: `swe_curvature` with a Fisher information of its own.

    For weights whose optimizer kept no second moment; it takes a backward pass for every example.

    When: with a trajectory from an optimizer without a second moment.
    Source: this project.
    """
    return late_mean**2 * gradient_square**power


@register("movement")
def movement(learned: Float[Array, "..."]) -> Float[Array, "..."]:
    """S: the scores that movement pruning learns while it fine-tunes.

    S accumulates −lr Σ g w and grows when a weight moves away from zero; it may be negative. Soft
    movement keeps sigmoid(S) > τ, which is the same ranking: `sparse_training` learns both.

    When: to adapt a pretrained model to a task, at high sparsity.
    Source: Sanh, Wolf and Rush, NeurIPS 2020.
    """
    return learned
