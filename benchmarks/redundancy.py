"""Time and memory of comparing all pairs of neurons of one layer by mutual information.

    python benchmarks/redundancy.py                    16,384 neurons, 256 tokens
    python benchmarks/redundancy.py --units=1536

The samples are Gaussian noise, whose values do not matter for either. Peak memory is that of the
whole process, with JAX and the result, units² float32 numbers.
"""

import argparse
import os
import platform
import resource
import sys
import time

import jax
import numpy as np
from accounts import accounted

from swe_prune.structured.kernel_width import standardized, widths
from swe_prune.structured.mutual_information import pairwise


def main() -> None:
    """Compares the pairs and prints what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    shape = (options.tokens, options.units)
    samples_NxF = standardized(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    begun = time.perf_counter()
    widths_F = widths(samples_NxF, reference=samples_NxF[:, :512])
    aligned = time.perf_counter() - begun
    begun = time.perf_counter()
    _, entropy_F = pairwise(samples_NxF, widths_F)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform != "darwin" else 2**30
    )
    print(
        f"{options.units} units, {options.tokens} tokens: kernel widths {aligned:.0f} s, pairs "
        f"{seconds:.0f} s, mean entropy {entropy_F.mean():.2f} bits, peak {peak:.2f} GiB; "
        f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    accounted(main)
