"""How much RigL and SET exchange, by the step."""

import math
from typing import Any

from swe_prune.schedules.steps import Step, as_float, check_share, check_step, numbers, result


def cosine_drop_fraction(step: Step, alpha: float, end: int) -> Any:
    """Returns RigL's share of active weights to exchange: α/2 (1 + cos(π t / end)), 0 from `end`.

    The paper has α = 0.3 and ends at three quarters of the training (Evci et al., ICML 2020); its
    code's default is a constant 0.1.

    Args:
        step: t, as for a schedule; the result is a Python float or float32 in the same way.
        alpha: the share at step 0, in [0, 1].
        end: the step from which nothing is exchanged any more.

    Raises:
        InputError: a share outside [0, 1], or an end that is no positive integer.

    >>> [cosine_drop_fraction(t, alpha=0.3, end=750) for t in (0, 375, 750)]
    [0.3, 0.15, 0.0]
    """
    check_share("alpha", alpha, closed=True)
    check_step("end", end, least=1)
    xp, step = numbers(step)
    progress = as_float(xp, xp.clip(step, 0, end)) / end
    return result(xp, xp.where(step >= end, 0.0, alpha / 2 * (1 + xp.cos(math.pi * progress))))
