"""Loss spikes: an update that stands out is dropped, and its batch returns later.

Part of the recipe of Ling (2503.05139): the update of a spike is not taken, its batch is put back
among the later ones at random, and the learning rate falls if spikes go on. What a spike is, and
how far the rate falls, is not given there; the rule of `spiked` is ours.

    watch = spikes.Watch.start()
    watch, skip = spikes.spiked(watch, loss)      # in the compiled step; keep the old weights if so
    batches = spikes.Again(batches)               # on the host; batches.put(batch) if so
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from swe_prune.arguments import checked
from swe_prune.errors import InputError


class Watch(NamedTuple):
    """Running mean and variance of the loss, and what came of its spikes.

    Attributes:
        mean: Mean of the losses that were not spikes.
        variance: Their variance.
        seen: Number of them.
        in_row: Number of spikes since the last one of them.
        rate: Factor of the learning rate.
    """

    mean: Array
    variance: Array
    seen: Array
    in_row: Array
    rate: Array

    @classmethod
    def start(cls) -> "Watch":
        """Returns the state before the first step."""
        return cls(*map(jnp.float32, (0, 0, 0, 0, 1)))


@checked
def spiked(
    watch: Watch,
    loss: Float[Array, ""],
    *,
    deviations: float = 5.0,
    decay: float = 0.98,
    warmup: int = 50,
    patience: int = 3,
    backoff: float = 0.5,
) -> tuple[Watch, Bool[Array, ""]]:
    """Returns the state after a loss, and whether its update is to be dropped.

    A loss is a spike if it is above mean + deviations · std, or not finite. The `patience`-th spike
    in a row multiplies the learning rate by `backoff`; if it is finite, it is taken, and the mean
    starts from it, so that a loss that stays high does not end the training.

    Args:
        watch: State.
        loss: Loss of the batch, before its update.
        deviations: Number of standard deviations.
        decay: Decay of the running mean and variance, in [0, 1).
        warmup: Number of losses before the first spike.
        patience: Number of spikes in a row, 1 or more.
        backoff: Factor of the learning rate, in (0, 1].

    Raises:
        InputError: If a setting is out of its range.
    """
    fine = deviations > 0 and 0 <= decay < 1 and 0 <= warmup < 2**31 and 0 < backoff <= 1
    if not fine:
        raise InputError(
            "spiked must have deviations above 0, decay in [0, 1), warmup 0 or more and backoff in "
            f"(0, 1], got {deviations}, {decay}, {warmup}, {backoff}"
        )
    loss = jnp.asarray(loss, jnp.float32)
    finite = jnp.isfinite(loss)
    far = loss > watch.mean + deviations * jnp.sqrt(watch.variance)
    spike = ~finite | (far & (watch.seen >= warmup))
    worn = spike & (watch.in_row + 1 >= patience)
    skip = spike & ~(worn & finite)
    # Bias-corrected like Adam's moments: the first losses count alike.
    first = worn | (watch.seen == 0)
    pull = jnp.where(first, 1.0, jnp.maximum(1 - decay, 1 / (watch.seen + 1)))
    apart = jnp.where(finite, loss - watch.mean, 0.0)
    mean = watch.mean + pull * apart
    variance = jnp.where(first, 0.0, (1 - pull) * (watch.variance + pull * apart**2))
    return Watch(
        jnp.where(skip, watch.mean, mean),
        jnp.where(skip, watch.variance, variance),
        jnp.where(skip, watch.seen, jnp.where(worn, 1.0, watch.seen + 1)),
        jnp.where(worn, 0.0, jnp.where(skip, watch.in_row + 1, 0.0)),
        jnp.where(worn, watch.rate * backoff, watch.rate),
    ), skip


@checked
class Again:
    """Batches among which those that were put back return at random."""

    def __init__(self, batches: Iterator[Any], *, chance: float = 0.1, seed: int = 0):
        """Starts with nothing put back.

        Args:
            batches: Iterator of new batches.
            chance: Probability that the next batch is one that was put back, if there is one.
            seed: Seed of the draws.

        Raises:
            InputError: If the chance is not in (0, 1].
        """
        if not 0 < chance <= 1:
            raise InputError(f"chance must be in (0, 1], got {chance}")
        self._batches, self._chance = batches, chance
        self._random, self._aside = np.random.default_rng(seed), []

    def put(self, batch: Any) -> None:
        """Puts a batch back."""
        self._aside.append(batch)

    def __iter__(self) -> "Again":
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns a new batch, or one that was put back."""
        if self._aside and self._random.random() < self._chance:
            return self._aside.pop(self._random.integers(len(self._aside)))
        return next(self._batches)
