"""Criteria of what a weight did while it trained."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from swe_prune.importance.registry import register


@register("swe")
def swe(late_mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|Σ wₜ θ(t) / Σ wₜ|: Systematic Weight Evaluation (arXiv 2502.17071).

    Signed values are averaged, so a weight that oscillates about zero scores low however large it
    is. Power and window are those that the statistics were tracked with.
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
    """
    return jnp.abs(weight + horizon * (weight - late_mean))


@register("swe_abs")
def swe_abs(late_mean_abs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ wₜ |θ(t)| / Σ wₜ: the ablation of `swe` that averages magnitudes."""
    return late_mean_abs


@register("swe_spread", spread=1.0)
def swe_spread(weight: Float[Array, "..."], late_mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|w| / std(late mean): the final weight against the spread of the signed late mean.

    With the std rule this is the mask of the authors' earlier public code,
    |w| > std(Σ wₜ θ(t) / Σ wₜ) · rate with the unbiased standard deviation. Within a tensor it
    ranks as `magnitude` does; the trajectory only decides how much each tensor loses. A tensor
    whose late mean has no spread scores +inf where w ≠ 0 and 0 elsewhere: its threshold is 0.
    """
    spread = jnp.std(late_mean, ddof=min(1, late_mean.size - 1))
    size = jnp.abs(weight)
    return jnp.where(size > 0, size / spread, 0.0)


@register("votes")
def votes(votes: Float[Array, "..."]) -> Float[Array, "..."]:
    """Share of the snapshots in which |θ(t)| > std(|θ(t)|) · vote_rate.

    A mode vote keeps what has more than half of them; here the share is the score, and its many
    ties are broken by flat index.
    """
    return votes


@register("mean_abs")
def mean_abs(mean_abs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ |θ(t)| / n: the mean magnitude over all snapshots."""
    return mean_abs


@register("mean")
def mean(mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """|Σ θ(t) / n|: the plain mean over the whole run, `swe` with power 0 and no window."""
    return jnp.abs(mean)


@register("stability")
def stability(mean: Float[Array, "..."], variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """|mean| / std over the snapshots: how surely a weight is not zero, as a t-value has it.

    A weight that never moved has no spread: +inf where it is not zero, 0 where it is.
    """
    size = jnp.abs(mean)
    return jnp.where(size > 0, size / jnp.sqrt(variance), 0.0)


@register("variance")
def variance(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ (θ(t) − mean)² / n: what training still changes is kept, what lies still goes."""
    return variance


@register("path_length")
def path_length(path_length: Float[Array, "..."]) -> Float[Array, "..."]:
    """Σ |θ(t) − θ(t−1)|: how far a weight wandered."""
    return path_length


@register("displacement")
def displacement(displacement: Float[Array, "..."]) -> Float[Array, "..."]:
    """|θ(n) − θ(0)|: how far training took a weight from where it began."""
    return jnp.abs(displacement)


@register("sign_flips")
def sign_flips(sign_flips: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / (1 + flips): a weight that never changed its sign is worth most.

    Many weights tie, which flat index breaks: a measure to combine rather than to prune by.
    """
    return 1 / (1 + sign_flips)


@register("last")
def last(last: Float[Array, "..."]) -> Float[Array, "..."]:
    """|θ(n)|: the magnitude at the last snapshot, which may lie before the last step."""
    return jnp.abs(last)
