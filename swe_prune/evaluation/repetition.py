"""Repetition in generated text, the first symptom of a damaged pruned model.

It may not show in the perplexity: under greedy decoding, a model whose perplexity rose by only a
tenth may repeat one sentence forever (Holtzman et al. 2020, arXiv 1904.09751).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from swe_prune.arguments import checked
from swe_prune.bounds import Bound
from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Repetition in one sequence of tokens.

    Attributes:
        shares: Fraction of repeated n-grams for n = 1, 2, …: (all - distinct) / all, or 0 if there
            are none.
        loop: Length of the longest run that repeats one block of tokens at least twice in full, or
            0 if there is none.
        period: Length of the shortest block that the run repeats, or 0 if there is none.
    """

    shares: tuple[float, ...]
    loop: int
    period: int


_LENGTHS = Bound(1, 1000, whole=True)


@checked
def repetition(tokens: Sequence[int] | np.ndarray, *, longest: int = 4) -> Repetition:
    """Measures the repetition in a sequence.

    Args:
        tokens: Token ids of one sequence, without its prompt; may be empty.
        longest: Largest length n of the counted n-grams.

    Raises:
        InputError: If `longest` is not from 1 to 1000, or the tokens are not one-dimensional.

    >>> repetition([5, 1, 2, 1, 2, 1, 7, 8], longest=2)
    Repetition(shares=(0.375, 0.2857142857142857), loop=5, period=2)
    """
    row = np.asarray(tokens, dtype=np.int64)
    if row.ndim != 1:
        raise InputError(f"tokens must be one-dimensional, got shape {row.shape}")
    _LENGTHS.check(longest, "longest")
    shares = tuple(_repeated(row, n) for n in range(1, longest + 1))
    return Repetition(shares, *_longest_loop(row))


def mean_repetition(sequences: Iterable[Sequence[int] | np.ndarray]) -> float:
    """Returns the mean fraction of repeated 3-grams of sequences, the number that reports show."""
    return float(np.mean([repetition(tokens).shares[2] for tokens in sequences]))


def _repeated(row: np.ndarray, n: int) -> float:
    if len(row) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(row, n)
    return (len(grams) - len(np.unique(grams, axis=0))) / len(grams)


def _longest_loop(row: np.ndarray) -> tuple[int, int]:
    """Returns the length and the period of the longest loop: a run of row[i] = row[i + period]."""
    best = (0, 0)
    for period in range(1, len(row) // 2 + 1):
        # A loop with this period is a run of tokens that equal those `period` earlier.
        same = np.concatenate([[False], row[:-period] == row[period:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        run = int(runs.max(initial=0))
        if run >= period and run + period > best[0]:
            best = (run + period, period)
    return best
