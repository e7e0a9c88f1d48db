"""Price tags composed of scanned handwritten digits.

The scans are the 1,797 of 8 x 8 pixels that scikit-learn ships, of the test set of Alpaydin and
Kaynak, "Optical recognition of handwritten digits" (UCI, 1998).
"""

import gzip
import importlib.metadata
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8

from swe_prune.errors import InputError
from swe_prune.runtime.packages import files_of

WIDTH, HEIGHT = 96, 32  # pixels of a tag
SCANS = 1797
GOODS = {"gum": (1, 9), "pen": (5, 99), "book": (10, 299), "lamp": (100, 999)}
"""Lowest and highest price of each kind of goods; a text alone gives the price that roughly."""

SPLITS = {"train": (0.7, 10_000), "validation": (0.15, 1_000), "test": (0.15, 1_000)}
"""Share of each digit's scans, and number of tags."""


def scans() -> tuple[UInt8[np.ndarray, "S 8 8"], Int[np.ndarray, " S"]]:
    """Returns scikit-learn's scans, ink 0 to 255, and their digits; imports nothing of it.

    Raises:
        InputError: If scikit-learn is not installed, or has other scans.
    """
    files = files_of("scikit-learn", "dataset 'digit_prices'", "images")
    file = next((one for one in files if one.match("sklearn/datasets/data/digits.csv.gz")), None)
    content = b"" if file is None else gzip.decompress(file.read_binary())
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.int64, ndmin=2)
    if table.shape != (SCANS, 65):
        raise InputError(
            f"scikit-learn {importlib.metadata.version('scikit-learn')} has not the known {SCANS} "
            "scans of digits; pip install 'scikit-learn==1.9.1'"
        )
    ink = np.minimum(table[:, :64] * 16, 255).astype(np.uint8)
    return ink.reshape(-1, 8, 8), table[:, 64]


def split_scans(digits: Int[np.ndarray, " S"]) -> dict[str, Int[np.ndarray, " M"]]:
    """Returns the scans of each split, so that every split has every digit and no scan is in two.

    Args:
        digits: Digit of each scan.
    """
    found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        own = np.random.default_rng(digit).permutation(np.flatnonzero(digits == digit))
        start = 0.0
        for split, (share, _) in SPLITS.items():
            first, last = (round(len(own) * end) for end in (start, start + share))
            found[split].append(own[first:last])
            start += share
    return {split: np.sort(np.concatenate(parts)) for split, parts in found.items()}


def tags(split: str) -> Iterator[tuple[UInt8[np.ndarray, "Y X"], str, int]]:
    """Yields the tags of a split: grey pixels, the kind of goods, and the price.

    Args:
        split: Name of a split.
    """
    ink, digits = scans()
    own = split_scans(digits)[split]
    by_digit = [own[digits[own] == digit] for digit in range(10)]
    rng = np.random.default_rng([*SPLITS].index(split) + 100)
    for _ in range(SPLITS[split][1]):
        goods = str(rng.choice([*GOODS]))
        low, high = GOODS[goods]
        price = int(rng.integers(low, high + 1))
        chosen = [ink[rng.choice(by_digit[int(figure)])] for figure in str(price)]
        yield tag(chosen, rng), goods, price


def tag(figures: list[np.ndarray], rng: np.random.Generator) -> UInt8[np.ndarray, "Y X"]:
    """Returns a tag with these figures side by side: dark ink on noisy paper among distractors."""
    from PIL import Image

    paper = rng.normal(rng.uniform(190, 240), rng.uniform(2, 8), (HEIGHT, WIDTH))
    # Distractors: lines of other ink, such as the edge of a tag or the stroke through a price.
    for _ in range(rng.integers(0, 4)):
        at, thick = rng.integers(0, HEIGHT - 1), rng.integers(1, 3)
        first, last = np.sort(rng.integers(0, WIDTH, 2))
        paper[at : at + thick, first:last] -= rng.uniform(30, 110)
    # All figures of one size, somewhere on the tag.
    size = int(rng.integers(16, 26))
    step = int(rng.integers(size, 31))
    left = int(rng.integers(1, min(16, WIDTH - size - step * (len(figures) - 1))))
    top = int(rng.integers(2, HEIGHT - size - 1))
    strength = rng.uniform(0.6, 0.9)
    for number, figure in enumerate(figures):
        scaled = Image.fromarray(figure).resize((size, size), Image.Resampling.BICUBIC)
        down = top + int(rng.integers(-1, 2))
        here = np.s_[down : down + size, left + number * step : left + number * step + size]
        paper[here] -= strength * np.asarray(scaled)
    return np.clip(np.round(paper / 4) * 4, 0, 255).astype(np.uint8)
