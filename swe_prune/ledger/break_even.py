"""After how many tokens pruning has paid for itself, or that it never will."""

import dataclasses
import math
from collections.abc import Sequence

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.ledger.interval import ENDS, Interval, Operand, interval, of_samples, text

MILLION = 1e6


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """What pruning cost, what it saves, and when the savings exceed the cost.

    Attributes:
        spent: Joules that pruning took in all.
        dense: Joules per token of the model that it is compared with.
        pruned: Joules per token of the pruned model.
        saved: Joules per token that the pruned model saves.
        tokens: Tokens after which pruning has paid for itself, or None where the interval of what
            is saved holds 0 or less.
        worse: Loss of the pruned model minus that of the compared one, or None if not given.
        margin: Loss by which the pruned model may be worse at equal quality.
        mask: Whether the pruned model is the compared one with zeros.
    """

    spent: Interval
    dense: Interval
    pruned: Interval
    saved: Interval
    tokens: Interval | None
    worse: Interval | None = None
    margin: float = 0.0
    mask: bool = False

    @property
    def equal(self) -> bool:
        """Whether the pruned model is shown to be worse by no more than the margin, if known."""
        return self.worse is None or self.worse.high <= self.margin

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.mask:
            return "never: a mask makes no array smaller, so it saves no energy per token"
        if self.saved.high <= 0:
            return "pruning never pays: the pruned model takes no less energy per token"
        if self.tokens is None:
            return (
                "not shown to pay: the saving per token, "
                f"{text(self.saved, 'J')}, may be 0; a mask alone saves nothing"
            )
        paid = f"pruning has paid for itself after {text(self.tokens)} tokens"
        if self.equal:
            return paid
        assert self.worse is not None
        return (
            f"not shown to pay at equal quality: its loss is {text(self.worse)} higher, and "
            f"{self.margin:g} is allowed; by energy alone {paid}"
        )

    def of(self, tokens: float) -> Interval:
        """Returns the joules that the pruned model saves over so many tokens, its cost deducted."""
        return self.saved * tokens - self.spent

    def per(self, tokens: float = MILLION) -> Interval:
        """Returns the joules that it saves over so many tokens: a million, or those of a request.

        >>> break_even(1.0, [2.0, 2.0], [1.5, 1.5]).per(48)
        Interval(low=24.0, value=24.0, high=24.0)
        """
        return self.saved * tokens


@checked
def break_even(
    spent: Operand,
    dense: Sequence[Operand],
    pruned: Sequence[Operand],
    *,
    worse: Operand | None = None,
    margin: float = 0.0,
    mask: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> BreakEven:
    """Returns after how many tokens a pruned model has paid for its pruning.

    N = spent / (J per token of the dense model - J per token of the pruned one). The windows of
    the two are measured in turn, so that they are compared pair by pair: the interval of the saving
    is the bootstrap's over the differences of the pairs. A meter's own error is common to all that
    it measures, so N is computed with the low ends of all intervals, with the values, and with the
    high ends, and holds the three.

    Args:
        spent: Joules of tracking, scoring, pruning, restoring, recovery, search, and of failed
            attempts.
        dense: Joules per token of the compared model, one per window, of at least 5 s each where a
            hardware counter is read; see `serving.windows`.
        pruned: The same of the pruned model; window i was measured next to the dense window i.
        worse: Loss of the pruned model minus that of the compared one. None: not known.
        margin: Loss by which the pruned model may be worse and still be of equal quality.
        mask: Whether the pruned model is a mask over arrays of the dense model's size.
        confidence: Share that the interval holds.
        seed: Seed of the bootstrap.

    Raises:
        InputError: If there are fewer than two windows or not as many of both, or a cost or the
            margin is negative.

    >>> break_even(100.0, [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]).verdict
    'pruning has paid for itself after 100 tokens'
    >>> break_even(100.0, [2.0, 2.0, 2.0], [2.1, 1.9, 2.0]).tokens is None
    True
    """
    spent = interval(spent)
    if spent.low < 0:
        raise InputError(f"spent must be 0 or more, got {spent}")
    if not margin >= 0:
        raise InputError(f"margin must be 0 or more, got {margin}")
    if len(dense) != len(pruned):
        raise InputError(
            f"both models must have as many windows, measured in turn, got {len(dense)} and "
            f"{len(pruned)}"
        )

    def mean(samples: Sequence[float]) -> Interval:
        return of_samples(samples, confidence=confidence, seed=seed)

    # One row for each end of the meter's interval: low, value, high.
    rows = [
        [[getattr(_interval(one), end) for one in some] for some in (dense, pruned)] for end in ENDS
    ]
    savings = [mean([a - b for a, b in zip(*row, strict=True)]) for row in rows]
    tokens = None
    if not mask and all(_divides(spent.high, saved) for saved in savings):
        paid = [
            Interval(at, at, at) / saved
            for at, saved in zip((spent.low, spent.value, spent.high), savings, strict=True)
        ]
        tokens = _hull(paid)
    each, other = (_hull([mean(row[model]) for row in rows]) for model in (0, 1))
    return BreakEven(
        spent,
        each,
        other,
        _hull(savings),
        tokens,
        None if worse is None else interval(worse),
        margin,
        mask,
    )


def _interval(sample: Operand) -> Interval:
    if isinstance(sample, Interval):
        return sample
    if not math.isfinite(sample):
        raise InputError(f"windows must be finite samples, got {sample}; measure them again")
    return interval(sample)


def _divides(spent: float, saved: Interval) -> bool:
    return saved.low > 0 and math.isfinite(spent / saved.low)


def _hull(ends: Sequence[Interval]) -> Interval:
    """Returns what holds all intervals, with the value of the middle one."""
    low, high = min(one.low for one in ends), max(one.high for one in ends)
    return Interval(low, min(max(ends[1].value, low), high), high)
