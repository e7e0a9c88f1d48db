"""Windows of a token array: endless random ones for training, fixed ones for evaluation.

B is the batch size and L the context: a window has L inputs, and L targets shifted by one token.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Int32, Integer

from swe_prune.arguments import check_concrete, checked
from swe_prune.errors import InputError, shown

if TYPE_CHECKING:
    import grain

Batch = Mapping[str, Int32[np.ndarray, "B L"]]
"""`inputs` and `targets`; `targets[b, i]` is the token after `inputs[b, i]`."""


def checked_order(
    seed: int, rows: Int[np.ndarray, " R"] | None, batch: int, what: str
) -> Int[np.ndarray, " R"] | None:
    """Returns the rows of an order of batches as int64, or None for all of them.

    Args:
        seed: Seed of the order.
        rows: Indices of the rows of each batch that are returned.
        batch: Number of rows of a batch.
        what: What a row is, in plural.

    Raises:
        InputError: The seed or a row is out of range.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed of the data order must be in [0, 2^32), got {seed}")
    if rows is None:
        return None
    rows = np.asarray(rows, np.int64)  # an empty list would be float
    if not np.all((rows >= 0) & (rows < batch)):
        raise InputError(
            f"rows must be indices of the {batch} {what} of a batch, 0 to {batch - 1}, got "
            f"{shown(rows)}"
        )
    return rows


@checked
def train_iterator(
    tokens: Integer[np.ndarray, " N"],
    *,
    context: int,
    batch: int,
    seed: int,
    rows: Int[np.ndarray, " R"] | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless iterator over batches of random windows.

    A window may start at any of the N − L positions. An epoch visits each start once, in an order
    that depends on the seed and the epoch. A batch may span the end of one epoch and the beginning
    of the next. `get_state()` returns a small JSON-serializable dict of the number of batches
    returned so far, without prefetched ones; `set_state` on a new iterator over the same tokens,
    context, batch and seed continues with identical batches.

    Args:
        tokens: Token ids of a split.
        context: Number of tokens L of a window.
        batch: Number of windows B of a batch.
        seed: Seed of the order, in [0, 2^32).
        rows: Indices in 0 … B − 1 of the R windows of each batch to return, if several hosts share
            the batch. They do not affect the batches and their order. If None, all windows.

    Returns:
        A Grain iterator over `{"inputs": int32 (B, L), "targets": int32 (B, L)}`, with R windows
        instead of B if `rows` is given.

    Raises:
        InputError: If there are too few tokens for one window, or the seed or a row is out of
            range.
    """
    check_concrete((tokens, rows), "tokens and rows")  # now: the windows are cut later
    # Import here: Grain imports JAX and takes more than a second, which reading text does not need.
    import grain

    _check_length(tokens, context)
    rows = checked_order(seed, rows, batch, "windows")
    # Grain shuffles and batches only the starts, and one gather cuts a whole batch. Handling each
    # window as a separate element takes several times as long.
    windows = (
        grain.MapDataset.range(len(tokens) - context)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch, drop_remainder=True)  # endless; else the length overflows at B = 1
        .map(lambda starts: _cut(tokens, starts if rows is None else starts[rows], context))
    )
    # One thread prefetches a few batches while the device computes; more compete for the GIL.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(windows.to_iter_dataset(options))


@checked
def eval_batches(
    tokens: Integer[np.ndarray, " N"], *, context: int, windows: int, batch: int
) -> list[Batch]:
    """Returns fixed windows, evenly spaced from the first token to the last, in batches.

    They are the same in every call, and do not overlap if N > `windows` · L.

    Args:
        tokens: Token ids of a split.
        context: Number of tokens L of a window.
        windows: Number of windows, a multiple of `batch`.
        batch: Number of windows B of a batch.

    Raises:
        InputError: If there are fewer windows, or `windows` is not a multiple of `batch`.
    """
    _check_length(tokens, context)
    if windows % batch:
        raise InputError(f"eval_windows must be a multiple of eval_batch = {batch}, got {windows}")
    last = len(tokens) - context - 1
    if windows > last + 1:
        raise InputError(
            f"eval_windows = {windows} is more than the {last + 1} windows of {context} tokens in "
            "the text; lower it or give more text"
        )
    starts = evenly_spaced(windows, last)
    return [_cut(tokens, chunk, context) for chunk in starts.reshape(-1, batch)]


def evenly_spaced(count: int, last: int) -> Int[np.ndarray, " count"]:
    """Returns evenly spaced integers from 0 to the last one, in exact integer arithmetic.

    >>> evenly_spaced(4, 10).tolist()
    [0, 3, 6, 10]
    """
    return np.arange(count, dtype=np.int64) * last // max(1, count - 1)


@checked
def random_batches(
    tokens: Integer[np.ndarray, " N"],
    *,
    context: int,
    windows: int,
    batch: int,
    seed: int,
    setting: str = "windows",
) -> list[Batch]:
    """Returns random windows with different starts, in batches, the last of which may be smaller.

    Args:
        tokens: Token ids of the text.
        context: Number of tokens L of a window.
        windows: Number of windows.
        batch: Number of windows B of a batch.
        seed: Seed of the choice.
        setting: Name of the number of windows in error messages.

    Raises:
        InputError: If the text has fewer windows.
    """
    available = len(tokens) - context
    if windows > available:
        raise InputError(
            f"{setting} = {windows} is more than the {max(0, available)} windows of {context} "
            "tokens in the training text; lower it or give more text"
        )
    starts = np.random.default_rng(seed).choice(available, windows, replace=False)
    return [_cut(tokens, starts[at : at + batch], context) for at in range(0, windows, batch)]


def _cut(tokens: Integer[np.ndarray, " N"], starts: Int[np.ndarray, " B"], context: int) -> Batch:
    window_BxL1 = tokens[starts[:, None] + np.arange(context + 1)]
    return {
        "inputs": window_BxL1[:, :-1].astype(np.int32),
        "targets": window_BxL1[:, 1:].astype(np.int32),
    }


def _check_length(tokens: Integer[np.ndarray, " N"], context: int) -> None:
    if len(tokens) <= context:
        raise InputError(
            f"{len(tokens)} tokens are too few for a window with context = {context}, which needs "
            f"{context + 1}; lower the context or give more text"
        )
