"""All that a set of criteria wants measured, in as few passes as it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import PyTree

from swe_prune.calibration.layer_inputs import inputs
from swe_prune.calibration.loss_gradients import gradients

OF_INPUTS = frozenset({"input_norm", "hessian"})
OF_GRADIENTS = frozenset({"gradient", "gradient_square"})
MEASURES = OF_INPUTS | OF_GRADIENTS
"""What can be measured; criteria may need other things that are not."""


def measure(
    needs: Iterable[str],
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Sequence[PyTree],
    *,
    loss: Callable[[PyTree, PyTree], Any],
    prunable: PyTree | None = None,
    at_once: int | None = None,
) -> dict[str, PyTree]:
    """Returns what is needed, for `importance.score(measured=)`; nothing where nothing is.

    Args:
        needs: as `importance.Criterion.measured` lists them, of one criterion or of many.
        model: as in `inputs`, run on the batches if `OF_INPUTS` are needed.
        variables: of the model.
        batches: as in `inputs` and `gradients`; gone through once for each of the two.
        loss: as in `gradients`, of the parameters, if `OF_GRADIENTS` are needed.
        prunable: bool pytree; None: `tree.prunable(params)`.
        at_once: as in `gradients`.

    Raises:
        InputError: as `inputs` and `gradients`.

    >>> import jax.numpy as jnp
    >>> batch, of_ones = jnp.array([[3.0, 4.0]]), {"params": {"kernel": jnp.ones((2, 1))}}
    >>> def loss(params, batch):
    ...     return jnp.sum(batch @ params["kernel"])
    >>> found = measure({"gradient"}, nn.Dense(1, use_bias=False), of_ones, [batch], loss=loss)
    >>> found["gradient"]["kernel"].ravel().tolist()
    [3.0, 4.0]
    """
    wanted = set(needs)
    found: dict[str, PyTree] = {}
    if wanted & OF_INPUTS:
        found |= inputs(model, variables, batches, hessian="hessian" in wanted, prunable=prunable)
    if wanted & OF_GRADIENTS:
        found |= gradients(loss, variables["params"], batches, prunable=prunable, at_once=at_once)
    return found
