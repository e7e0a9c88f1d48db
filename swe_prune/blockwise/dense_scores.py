"""Scores of the whole dense model, for an allocation to read before any block is pruned."""

from collections.abc import Iterable, Mapping

from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import calibration, importance


def dense_scores(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    *,
    prunable: PyTree | None = None,
) -> PyTree:
    """Returns Wanda's scores |w| · ‖x‖ of the dense model, for `allocation.allocate`.

    OWL reads these for Wanda and for SparseGPT alike (https://github.com/luuyin/OWL), and both then
    go block after block with what it gives.

    Args:
        model: as in `prune_blocks`, like the others.
        variables: {"params": …}.
        batches: of calibration.
        prunable: bool pytree; None: `tree.prunable(params)`.

    Returns:
        float32 pytree like the parameters, None where dense.
    """
    measured = calibration.inputs(model, variables, batches, prunable=prunable)
    return importance.score("wanda", variables["params"], measured=measured, prunable=prunable)
