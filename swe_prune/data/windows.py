"""Windows of a token array: random ones without end to train on, fixed ones to evaluate on.

B is the batch and L the context: a window is L inputs and, one place later, L targets.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Int32, Integer

from swe_prune.errors import InputError

if TYPE_CHECKING:
    import grain

Batch = Mapping[str, Int32[np.ndarray, "B L"]]
"""`inputs` and `targets`; `targets[b, i]` is the token after `inputs[b, i]`."""


def train_iterator(
    tokens: Integer[np.ndarray, " N"],
    *,
    context: int,
    batch: int,
    seed: int,
    rows: Int[np.ndarray, " R"] | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless iterator over batches of random windows.

    A window may start at any of the N − L positions. An epoch visits each once, in an order drawn
    from the seed and the epoch; epochs follow each other without a seam, so a batch may hold the
    end of one and the beginning of the next. `get_state()` gives a small JSON-able dict of the
    batches handed out so far, prefetched ones not counted; `set_state` on a new iterator over the
    same tokens, context, batch and seed continues with the identical bits.

    Args:
        tokens: the token ids of a split.
        context: L.
        batch: B.
        seed: in [0, 2^32).
        rows: which of each batch's windows to cut and hand out, where several hosts share the
            batch: R of 0 … B − 1. The batches and their order are the same whatever they are; None:
            all.

    Returns:
        A Grain iterator over `{"inputs": int32 (B, L), "targets": int32 (B, L)}`, of R windows
        where `rows` are given.

    Raises:
        InputError: the tokens are too few for one window, or the seed is out of range.
    """
    # Grain brings jax and takes more than a second, which reading a text need not wait for.
    import grain

    _check_length(tokens, context)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} of the data order is out of range; give one in [0, 2^32)")
    # Grain shuffles and batches the starts alone, and one gather cuts a whole batch: handling each
    # window as an element of its own costs several times as much.
    windows = (
        grain.MapDataset.range(len(tokens) - context)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch, drop_remainder=True)  # of an endless row; else its length overflows at B = 1
        .map(lambda starts: _cut(tokens, starts if rows is None else starts[rows], context))
    )
    # One thread keeps a few batches ready while the device computes; more only fight for the GIL.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(windows.to_iter_dataset(options))


def eval_batches(
    tokens: Integer[np.ndarray, " N"], *, context: int, windows: int, batch: int
) -> list[Batch]:
    """Returns fixed windows, evenly spaced from the first token to the last, in batches.

    They are the same at every call. They do not overlap where N > `windows` · L.

    Raises:
        InputError: the tokens have not so many windows, or they make no whole batches.
    """
    _check_length(tokens, context)
    if windows < 1 or batch < 1 or windows % batch:
        raise InputError(
            f"eval_windows = {windows} make no whole batches of eval_batch = {batch}; "
            "make it a multiple"
        )
    last = len(tokens) - context - 1
    if windows > last + 1:
        raise InputError(
            f"eval_windows = {windows} is more than the {last + 1} windows of {context} tokens "
            "that there are; lower it or give more text"
        )
    starts = np.arange(windows, dtype=np.int64) * last // max(1, windows - 1)
    return [_cut(tokens, chunk, context) for chunk in starts.reshape(-1, batch)]


def random_batches(
    tokens: Integer[np.ndarray, " N"],
    *,
    context: int,
    windows: int,
    batch: int,
    seed: int,
    setting: str = "windows",
) -> list[Batch]:
    """Returns windows of a text drawn without repeating a start, in batches; the last may be less.

    Args:
        tokens: of the text.
        context: L.
        windows: how many.
        batch: B.
        seed: of the choice, which is the same for the same seed.
        setting: what the number of windows is called in an error.

    Raises:
        InputError: the text has not so many windows.
    """
    there = len(tokens) - context
    if windows > there:
        raise InputError(
            f"{setting} = {windows} is more than the {max(0, there)} windows of {context} tokens "
            "that the training text has; lower it or give more text"
        )
    starts = np.random.default_rng(seed).choice(there, windows, replace=False)
    return [_cut(tokens, starts[at : at + batch], context) for at in range(0, windows, batch)]


def _cut(tokens: Integer[np.ndarray, " N"], starts: Int[np.ndarray, " B"], context: int) -> Batch:
    window_BxL1 = tokens[starts[:, None] + np.arange(context + 1)]
    return {
        "inputs": window_BxL1[:, :-1].astype(np.int32),
        "targets": window_BxL1[:, 1:].astype(np.int32),
    }


def _check_length(tokens: Integer[np.ndarray, " N"], context: int) -> None:
    if context < 1 or len(tokens) <= context:
        raise InputError(
            f"{len(tokens)} tokens are too few for a window of context = {context}, which needs "
            f"{context + 1}; lower the context or give more text"
        )
