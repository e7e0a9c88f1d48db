"""Fraction of weights that RigL and SET exchange at each step."""

import math
from typing import Any

from swe_prune.arguments import checked
from swe_prune.schedules.steps import Step, as_float, check_share, check_step, numbers, result


@checked
def cosine_drop_fraction(step: Step, alpha: float, end: int) -> Any:
    """Returns RigL's fraction of active weights to exchange.

    The fraction is α/2 (1 + cos(π t / end)) before `end`, and 0 from `end` on.

    The paper uses α = 0.3 and ends at three quarters of the training (Evci et al., ICML 2020); the
    default of its code is a constant 0.1.

    Args:
        step: Step t. For a Python integer the result is a Python float, for an array float32.
        alpha: Fraction at step 0, in [0, 1].
        end: First step at which nothing is exchanged.

    Raises:
        InputError: If alpha is outside [0, 1], or end is not a positive integer.

    >>> [cosine_drop_fraction(t, alpha=0.3, end=750) for t in (0, 375, 750)]
    [0.3, 0.15, 0.0]
    """
    check_share("alpha", alpha, closed=True)
    check_step("end", end, least=1)
    xp, step = numbers(step)
    progress = as_float(xp, xp.clip(step, 0, end)) / end
    return result(xp, xp.where(step >= end, 0.0, alpha / 2 * (1 + xp.cos(math.pi * progress))))
