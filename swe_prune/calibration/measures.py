"""Measurements for a set of criteria, in as few passes over the batches as possible."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import PyTree

from swe_prune.arguments import checked
from swe_prune.calibration.layer_inputs import inputs
from swe_prune.calibration.loss_gradients import gradients
from swe_prune.layout.trace import variables_of

OF_INPUTS = frozenset({"input_norm", "hessian"})
OF_GRADIENTS = frozenset({"gradient", "gradient_square"})
MEASURES = OF_INPUTS | OF_GRADIENTS
"""Names of everything that can be measured here; criteria may need other inputs too."""


@checked
def measure(
    needs: Iterable[str],
    fn: Any,
    params: PyTree,
    batches: Sequence[PyTree],
    *,
    loss: Callable[[PyTree, PyTree], Any],
    prunable: PyTree | None = None,
    at_once: int | None = None,
) -> dict[str, PyTree]:
    """Returns the needed measurements, for `importance.score(measured=)`.

    Args:
        needs: Names of measurements, as listed by `importance.Criterion.measured`, of one or more
            criteria. Names outside `MEASURES` are ignored.
        fn: Function of (params, batch) or module, run if any of `OF_INPUTS` is needed; see
            `inputs`.
        params: Parameters of the function; of a Linen module also {"params": …} and other
            collections.
        batches: Pytrees of arrays whose first axis runs over the examples; iterated once for
            `OF_INPUTS` and once for `OF_GRADIENTS`.
        loss: Function (params, batch) that returns a scalar, used if any of `OF_GRADIENTS` is
            needed.
        prunable: Bool pytree like the parameters. If None, `tree.prunable(params)`.
        at_once: Number of examples whose gradients are in memory together. If None, the whole
            batch.

    Raises:
        InputError: If `inputs` or `gradients` raises it.

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
        found |= inputs(fn, params, batches, hessian="hessian" in wanted, prunable=prunable)
    if wanted & OF_GRADIENTS:
        weights = variables_of(params)["params"] if isinstance(fn, nn.Module) else params
        found |= gradients(loss, weights, batches, prunable=prunable, at_once=at_once)
    return found
