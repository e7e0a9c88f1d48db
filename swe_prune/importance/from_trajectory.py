"""Criteria of what a weight did while it trained."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("swe")
def swe(late_mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|Σ wₜ θ(t) / Σ wₜ|: Systematic Weight Evaluation, the paper's criterion.

    Signed values are averaged, so a weight that oscillates about zero scores low however large it
    is. Power and window are those that the statistics were tracked with.

    When: to repeat the paper. It beats `magnitude` before fine-tuning where training has
        converged, and `swe_curvature` beats it everywhere.
    Source: arXiv 2502.17071; the streaming form is ours.
    """
    return jnp.abs(late_mean)


@register("forecast")
def forecast(
    weight: Float[Array, "..."], late_mean: Float[Array, "..."], horizon: float = 0.5
) -> Float[Array, "..."]:
    """|w + horizon · (w − late mean)|: where the weight is heading, on from where it came from.

    `swe` looks back along the line from the late mean to the final weight, this looks ahead: a
    weight that shrank goes before one of the same size that grew. At horizon 0 it is `magnitude`,
    at −1 `swe`. The measure is the same, so the same statistics serve both.

    When: as the ablation of `forecast_curvature`; alone it beats `magnitude` only after
        fine-tuning, and only where the loss was still falling.
    Source: this project; measured in docs/results.md.
    """
    return jnp.abs(weight + horizon * (weight - late_mean))


@register("swe_abs")
def swe_abs(late_mean_abs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ wₜ |θ(t)| / Σ wₜ: the ablation of `swe` that averages magnitudes.

    When: to see what averaging signed values does.
    Source: this project's ablation of arXiv 2502.17071.
    """
    return late_mean_abs


@register("swe_spread", spread=1.0)
def swe_spread(weight: Float[Array, "..."], late_mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|w| / std(late mean): the final weight against the spread of the signed late mean.

    With the std rule this is the mask of the authors' earlier public code,
    |w| > std(Σ wₜ θ(t) / Σ wₜ) · rate with the unbiased standard deviation. Within a tensor it
    ranks as `magnitude` does; the trajectory only decides how much each tensor loses. A tensor
    whose late mean has no spread scores +inf where w ≠ 0 and 0 elsewhere: its threshold is 0.

    When: to repeat the authors' earlier results.
    Source: public code of Islam et al. beside "Neural Network Optimization with Weight
        Evolution", 2023.
    """
    spread = jnp.std(late_mean, ddof=min(1, late_mean.size - 1))
    size = jnp.abs(weight)
    return jnp.where(size > 0, size / spread, 0.0)


@register("votes")
def votes(votes: Float[Array, "..."]) -> Float[Array, "..."]:
    """Share of the snapshots in which |θ(t)| > std(|θ(t)|) · vote_rate.

    A vote like that of the authors' code, in one buffer: each snapshot is compared with its own
    deviation. Theirs takes one threshold per layer, std(|θ(n)|) · rate of the final weights, over
    all snapshots but the last ones, and keeps what most of them exceed; `trajectory.mode_vote` does
    that with stored snapshots, and the two masks differ. Here the share is the score, and its many
    ties are broken by flat index.

    When: as an ablation that asks how often a weight was large instead of how large.
    Source: this project, after public code of Islam et al.
    """
    return votes


@register("mean_abs")
def mean_abs(mean_abs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ |θ(t)| / n: the mean magnitude over all snapshots.

    When: as an ablation of `swe` without its weights.
    Source: this project.
    """
    return mean_abs


@register("mean")
def mean(mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|Σ θ(t) / n|: the plain mean over the whole run, `swe` with power 0 and no window.

    When: as an ablation of `swe` without its weights.
    Source: this project.
    """
    return jnp.abs(mean)


@register("stability")
def stability(mean: Float[Array, "..."], variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """|mean| / std over the snapshots: how surely a weight is not zero, as a t-value has it.

    A weight that never moved has no spread: +inf where it is not zero, 0 where it is.

    When: as an ablation: a t-value ranks what is settled, not what matters.
    Source: this project.
    """
    size = jnp.abs(mean)
    return jnp.where(size > 0, size / jnp.sqrt(variance), 0.0)


@register("variance")
def variance(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ (θ(t) − mean)² / n: what training still changes is kept, what lies still goes.

    When: as an ablation.
    Source: this project.
    """
    return variance


@register("path_length")
def path_length(path_length: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ |θ(t) − θ(t−1)|: how far a weight wandered.

    When: as an ablation.
    Source: this project.
    """
    return path_length


@register("displacement")
def displacement(displacement: Float[Array, "..."]) -> Float[Array, "..."]:
    """|θ(n) − θ(0)|: how far training took a weight from where it began.

    When: for networks trained from small random weights.
    Source: movement from initialization, as in Zhou et al., "Deconstructing lottery tickets",
        NeurIPS 2019.
    """
    return jnp.abs(displacement)


@register("sign_flips")
def sign_flips(sign_flips: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / (1 + flips): a weight that never changed its sign is worth most.

    Many weights tie, which flat index breaks: a measure to combine rather than to prune by.

    When: combined with another criterion.
    Source: this project.
    """
    return 1 / (1 + sign_flips)


@register("last")
def last(last: Float[Array, "..."]) -> Float[Array, "..."]:
    """|θ(n)|: the magnitude at the last snapshot, which may lie before the last step.

    When: when pruning at the last snapshot rather than at the last step.
    Source: `magnitude`, of the tracked weight.
    """
    return jnp.abs(last)
