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
