"""What a weight did while it trained, times the curvature that Adam holds already.

A second-order model of the loss says that removing a weight costs ½ h w² (LeCun, Denker and Solla,
"Optimal brain damage", 1989). Adam's second moment v is a running mean of g², which stands for h in
the empirical Fisher information, and √v is what Adam itself divides by. The criteria here put the
trajectory in the place of the final weight; `power` is the exponent of v, ½ unless given: with 1 a
score is that of optimal brain damage, with 0 the trajectory's alone. They cost no memory beyond
the statistics and no backward pass.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("magnitude_curvature")
def magnitude_curvature(
    weight: Float[Array, "..."], second_moment: Float[Array, "..."], power: float = 0.5
) -> Float[Array, "..."]:
    """w² v^power: the final weight and the curvature at it (optimal brain damage at power 1).

    When: for weights that Adam trained and nobody tracked.
    Source: optimal brain damage (LeCun, Denker and Solla, 1989) with Adam's v for h.
    """
    return weight**2 * second_moment**power


@register("swe_curvature")
def swe_curvature(
    late_mean: Float[Array, "..."], second_moment: Float[Array, "..."], power: float = 0.5
) -> Float[Array, "..."]:
    """(Σ wₜ θ(t) / Σ wₜ)² v^power: the late mean of `swe` and the curvature.

    When: for a model that has finished training and is not fine-tuned after pruning.
    Source: this project.
    """
    return late_mean**2 * second_moment**power


@register("forecast_curvature")
def forecast_curvature(
    weight: Float[Array, "..."],
    late_mean: Float[Array, "..."],
    second_moment: Float[Array, "..."],
    power: float = 0.5,
    horizon: float = 0.5,
) -> Float[Array, "..."]:
    """(w + horizon · (w − late mean))² v^power: where the weight is heading, and the curvature.

    A larger horizon costs more before fine-tuning and less after it; see docs/results.md.

    When: first choice for tracked weights that Adam trained, when fine-tuning follows.
    Source: this project; measured in docs/results.md.
    """
    return (weight + horizon * (weight - late_mean)) ** 2 * second_moment**power


@register("stability_curvature")
def stability_curvature(
    weight: Float[Array, "..."],
    mean: Float[Array, "..."],
    variance: Float[Array, "..."],
    second_moment: Float[Array, "..."],
    power: float = 0.5,
) -> Float[Array, "..."]:
    """w² v^power · |mean| / (|mean| + std): curvature, less for a weight that did not settle.

    When: as an ablation of `magnitude_curvature`; it gains a little before fine-tuning where
        training has converged, and loses a little elsewhere.
    Source: this project.
    """
    size = jnp.abs(mean)
    settled = jnp.where(size > 0, size / (size + jnp.sqrt(variance)), 0.0)
    return weight**2 * second_moment**power * settled


@register("path_curvature")
def path_curvature(
    path_length: Float[Array, "..."], second_moment: Float[Array, "..."], power: float = 0.5
) -> Float[Array, "..."]:
    """(Σ |θ(t) − θ(t−1)|)² v^power: how far a weight wandered, and the curvature.

    When: as an ablation.
    Source: this project.
    """
    return path_length**2 * second_moment**power


@register("displacement_curvature")
def displacement_curvature(
    displacement: Float[Array, "..."], second_moment: Float[Array, "..."], power: float = 0.5
) -> Float[Array, "..."]:
    """(θ(n) − θ(0))² v^power: how far training took a weight, and the curvature.

    When: as an ablation.
    Source: this project.
    """
    return displacement**2 * second_moment**power
