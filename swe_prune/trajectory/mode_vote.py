"""The mode vote of the authors' earlier public code, over snapshots that were stored."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError


@checked
def mode_vote(
    snapshots: Sequence[PyTree],
    final: PyTree,
    rate: float = 1.0,
    *,
    leave_out: int = 0,
    prunable: PyTree | None = None,
) -> PyTree:
    """Returns the masks of the mode vote: True where most snapshots exceed the final threshold.

        keep ⟺ |θ(t)| > std(|final|) · rate in more than half of the snapshots t = 1 … n − leave_out

    One threshold per tensor, of the final weights, with the unbiased standard deviation. It is not
    known before training has ended, so the snapshots must be stored; the measure `votes` needs one
    buffer instead, but compares each snapshot with its own deviation.

    Args:
        snapshots: Pytrees of weights like `final`, in their order.
        final: Pytree of the weights at the end of training.
        rate: Multiple of the standard deviation, 0 or more.
        leave_out: Number of last snapshots that do not vote. The code leaves out the last K, the
            window of its mean, perhaps by a slip for voting with these alone.
        prunable: Bool pytree like `final`. None: `tree.prunable(final)`.

    Returns:
        Bool pytree like `final`, None where dense. A tie removes the weight, as the smaller mode
        does in the code.

    Raises:
        InputError: No snapshot votes, or the rate is negative.

    Source: public code of Islam et al. beside "Neural Network Optimization with Weight Evolution",
    2023, in which no script calls it.

    >>> thetas = [{"kernel": jnp.array([[3.0], [x]])} for x in (0.1, 2.0, 0.0)]
    >>> mode_vote(thetas, thetas[-1], 0.5)["kernel"].ravel().tolist()
    [True, False]
    """
    if not rate >= 0:
        raise InputError(f"rate must be 0 or more, got {rate!r}")
    if leave_out >= len(snapshots):
        raise InputError(
            f"leave_out must be from 0 to {len(snapshots) - 1}, since one of the {len(snapshots)} "
            f"snapshots must vote, got {leave_out}"
        )
    voting = snapshots[: len(snapshots) - leave_out]

    def vote(_: str, final: Any, *thetas: Any) -> Any:
        size = jnp.abs(final.astype(jnp.float32))
        threshold = jnp.std(size, ddof=min(1, size.size - 1)) * rate
        votes = sum(
            (jnp.abs(theta.astype(jnp.float32)) > threshold).astype(int) for theta in thetas
        )
        return 2 * votes > len(thetas)

    return tree.map_prunable(vote, final, prunable, *voting)
