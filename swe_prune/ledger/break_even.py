"""After how many tokens pruning has paid for itself, or that it never will."""

import dataclasses
import math
from collections.abc import Sequence

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.ledger.interval import Interval, interval, of_samples, text


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """What pruning cost, what it saves, and when the savings exceed the cost.

    Attributes:
        spent: Joules that pruning took in all.
        dense: Joules per token of the model that it is compared with.
        pruned: Joules per token of the pruned model.
        saved: Joules per token that the pruned model saves.
        tokens: Tokens after which pruning has paid for itself, or None where the interval of what
            is saved holds 0 or less. `high` is infinite nowhere: then it is None.
    """

    spent: Interval
    dense: Interval
    pruned: Interval
    saved: Interval
    tokens: Interval | None

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.tokens is not None:
            return f"pruning has paid for itself after {text(self.tokens)} tokens"
        if self.saved.high <= 0:
            return "pruning never pays: the pruned model takes no less energy per token"
        return (
            "not shown to pay: the saving per token, "
            f"{text(self.saved, 'J')}, may be 0; a mask alone saves nothing"
        )

    def of(self, tokens: float) -> Interval:
        """Returns the joules that the pruned model saves over so many tokens, its cost deducted."""
        return self.saved * tokens - self.spent


@checked
def break_even(
    spent: Interval | float,
    dense: Sequence[float],
    pruned: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> BreakEven:
    """Returns after how many tokens a pruned model has paid for its pruning.

    N = spent / (J per token of the dense model - J per token of the pruned one). The windows of
    the two are measured in turn, so that they are compared pair by pair: the interval of the saving
    is the bootstrap's over the differences of the pairs.

    Args:
        spent: Joules of tracking, scoring, pruning, restoring, recovery, search, and of failed
            attempts.
        dense: Joules per token of the compared model, one per window, of at least 5 s each where a
            hardware counter is read.
        pruned: The same of the pruned model; window i was measured beside the dense window i.
        confidence: Share that the interval holds.
        seed: Seed of the bootstrap.

    Raises:
        InputError: If there are fewer than two windows or not as many of both, or a cost is
            negative.

    >>> break_even(100.0, [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]).verdict
    'pruning has paid for itself after 100 tokens'
    >>> break_even(100.0, [2.0, 2.0, 2.0], [2.1, 1.9, 2.0]).tokens is None
    True
    """
    spent = interval(spent)
    if spent.low < 0:
        raise InputError(f"spent must be 0 or more, got {spent}")
    if len(dense) != len(pruned):
        raise InputError(
            f"both models must have as many windows, measured in turn, got {len(dense)} and "
            f"{len(pruned)}"
        )
    kept = {"confidence": confidence, "seed": seed}
    saved = of_samples([a - b for a, b in zip(dense, pruned, strict=True)], **kept)
    tokens = None
    if saved.low > 0 and math.isfinite(spent.high / saved.low):
        tokens = spent / saved
    return BreakEven(spent, of_samples(dense, **kept), of_samples(pruned, **kept), saved, tokens)
