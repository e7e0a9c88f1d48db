"""Validation loss in nats per token."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
def mean_loss(
    eval_step: Callable[[PyTree, Any], Any], params: PyTree, batches: Sequence[dict[str, Any]]
) -> float:
    """Returns the mean loss per token over all batches, in nats, summed in float64 on the host.

    Args:
        eval_step: Function from (params, batch) to the summed loss of the batch.
        params: Parameters of the model.
        batches: Evaluation batches; every token has the same weight, regardless of batch sizes, or
            those in "weights".

    Raises:
        InputError: There is no batch, or one is not a mapping that has "targets".
    """
    if not batches or not all("targets" in batch or "weights" in batch for batch in batches):
        raise InputError(
            "batches must be one or more mappings with 'inputs' and 'targets', got "
            f"{[sorted(map(str, batch)) for batch in batches[:3]]}"
        )
    sums = jax.device_get([eval_step(params, batch) for batch in batches])
    counted = sum(
        float(batch["weights"].sum()) if "weights" in batch else batch["targets"].size
        for batch in batches
    )
    return float(sum(float(s) for s in sums) / counted)
