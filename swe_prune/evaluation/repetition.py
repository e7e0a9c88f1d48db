"""How much a text repeats itself, which is how a pruned model's writing breaks first.

A perplexity that rose by a tenth tells nothing of it: under greedy decoding such a model may go on
with one sentence for ever (Holtzman et al. 2020, arXiv 1904.09751).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class Repetition:
    """What repeats in one sequence of tokens.

    Attributes:
        shares: for n = 1, 2, …: the part of the n-grams that stood in the sequence before,
            (all - different ones) / all; 0 where there is none.
        loop: length of the longest stretch that is one block of tokens over and over, at least
            twice in full; 0 without one.
        period: tokens of that block, the shortest that makes it; 0 without one.
    """

    shares: tuple[float, ...]
    loop: int
    period: int


def repetition(tokens: Sequence[int] | np.ndarray, *, longest: int = 4) -> Repetition:
    """Returns how much a sequence repeats itself.

    Args:
        tokens: of one sequence, without its prompt; an empty one repeats nothing.
        longest: n-grams of 1 … longest tokens are counted.

    Raises:
        InputError: `longest` below 1, or tokens not in one row.

    >>> repetition([5, 1, 2, 1, 2, 1, 7, 8], longest=2)
    Repetition(shares=(0.375, 0.2857142857142857), loop=5, period=2)
    """
    row = np.asarray(tokens, dtype=np.int64)
    if row.ndim != 1:
        raise InputError(f"tokens of shape {row.shape} are no one sequence; give them in one row")
    if longest < 1:
        raise InputError(f"n-grams of up to {longest} tokens cannot be counted; give 1 or more")
    shares = tuple(_repeated(row, n) for n in range(1, longest + 1))
    return Repetition(shares, *_longest_loop(row))


def _repeated(row: np.ndarray, n: int) -> float:
    if len(row) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(row, n)
    return (len(grams) - len(np.unique(grams, axis=0))) / len(grams)


def _longest_loop(row: np.ndarray) -> tuple[int, int]:
    """Returns the length and the period of the longest loop: a run of row[i] = row[i + period]."""
    best = (0, 0)
    for period in range(1, len(row) // 2 + 1):
        same = np.concatenate([[False], row[:-period] == row[period:], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        run = int(runs.max(initial=0))
        if run >= period and run + period > best[0]:
            best = (run + period, period)
    return best
