"""Exact selection against a sort: how many times as fast `select.top_k_mask` finds the k largest.

    python benchmarks/selection.py            1e6 and 1e7 weights
    python benchmarks/selection.py --large    1e8 alone, against the faster sort; 3 GB and minutes

Each line times two programs in turns, so that a busy machine slows both. "passes" is how often the
search reads all weights; beside it stands what one such pass costs in plain sums of the weights.
Both sorts only order; to make a mask with an exact count of their order would come on top.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from os import cpu_count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from accounts import accounted
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from timing import Comparison, compare

from swe_prune import counting, select

FEW = 3  # repetitions where one takes seconds
LARGE = 10**8


def weights(n: int, ties: bool) -> jax.Array:
    """Returns normal weights as a matrix; with ties, of about 80 distinct values."""
    x = jax.random.normal(jax.random.key(0), (n // 1000, 1000))
    return jnp.round(x, 1) if ties else x


def passes(x: jax.Array, k: int) -> int:
    """Returns how often the search reads all of x: for the threshold, and for the ties if cut."""
    counted = []

    def count_each(masks: Any, axes: Any = None) -> Any:
        jax.debug.callback(lambda: counted.append(1))
        return original(masks, axes)

    original, counting.count_each = counting.count_each, count_each
    try:
        jax.block_until_ready(jax.jit(lambda x, k: select.top_k_mask(x, k))(x, k))
        jax.effects_barrier()
    finally:
        counting.count_each = original
    return len(counted)


def ready(f: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """Returns a call of the compiled function that waits for the result."""
    compiled = jax.jit(f).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def spread(comparison: Comparison) -> str:
    """Returns the median ratio and its range."""
    low, *_, high = comparison.speedups
    return f"{comparison.speedup:.1f} ({low:.1f} to {high:.1f})"


def row(n: int, share: int, ties: bool) -> list[str]:
    """Returns one line of the table."""
    x, k = weights(n, ties), n // share
    repetitions = 9 if n < 10**7 else FEW
    ours = ready(select.top_k_mask, x, jnp.int32(k))
    eager = lambda: jax.block_until_ready(select.top_k_mask(x, k))  # noqa: E731  # checks NaN too
    against_sort = compare(
        ours, ready(lambda x: jnp.sort(x.ravel()), x), repetitions=repetitions, warmup=1
    )
    against_top_k = "-"  # at 1e8 it alone would take longer than all the rest
    if n < LARGE:
        top_k = ready(lambda x: jax.lax.top_k(x.ravel(), k), x)
        against_top_k = spread(compare(ours, top_k, repetitions=repetitions, warmup=1))
    with_check = compare(ours, eager, repetitions=9)
    count = passes(x, k)
    a_sum = ready(jnp.sum, x)
    per_sum = compare(lambda: [a_sum() for _ in range(count)], ours, repetitions=9)
    return [
        f"{n:.0e}",
        f"n/{share}",
        "yes" if ties else "no",
        f"{1e3 * statistics.median(against_sort.seconds_a):.0f}",
        spread(against_sort),
        against_top_k,
        str(count),
        spread(per_sum),
        f"{with_check.speedup:.2f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="1e8 weights")
    large = parser.parse_args().large
    cases = [
        (n, ties, share) for n in (10**6, 10**7) for ties in (False, True) for share in (2, 10)
    ]
    cases = [(LARGE, ties, 2) for ties in (False, True)] if large else cases
    device = jax.devices()[0]
    table = Table(
        title="select.top_k_mask, float32, medians (range)",
        caption=f"{device.device_kind} ({device.platform}), {cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}",
    )
    for heading in (
        "weights", "k", "ties", "ms", "times faster than sort", "than lax.top_k", "passes",
        "time / sums", "eager / jit",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for n, ties, share in cases:
        table.add_row(*row(n, share, ties))
    Console(width=120).print(table)


if __name__ == "__main__":
    accounted(main)
