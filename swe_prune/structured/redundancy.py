"""Redundant units: which unit of a similar pair is removed, and its partner.

Unsupervised and without retraining. Source: Huang, Song and Pao, arXiv 2406.00030, and its journal
version, Entropy 2025, 27(12), 1224. What these leave open (threshold, kernel width, which of a pair
goes) is chosen here.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from swe_prune.errors import InputError, check_choice
from swe_prune.structured import kernel_width
from swe_prune.structured.mutual_information import check_samples, pairwise

METHODS = ("greedy", "pairs")
SIMILARITIES = ("mutual_information", "normalized", "correlation")
PATIENCE = 2000
LOWERED = 0.95


class SaturatedWarning(UserWarning):
    """A kernel width with which all samples are apart, or all alike."""


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike the units of a layer are, by pairs.

    Attributes:
        values_FxF: Bits of mutual information, these divided by the smaller entropy, or |ρ|.
        kind: One of `SIMILARITIES`.
        constant_F: Whether each unit had one value on all samples, which tells nothing.
        mean_entropy: Mean S₂ of the units in bits, None for a correlation.
        largest_entropy: Upper bound log₂ N of the entropy, in bits.
    """

    values_FxF: Float[np.ndarray, "F F"]
    kind: str
    constant_F: Any
    mean_entropy: float | None
    largest_entropy: float


@dataclasses.dataclass(frozen=True)
class Removal:
    """A unit that goes.

    Attributes:
        unit: Index of the unit.
        partner: Index of the unit that makes it redundant; None of a unit that is constant, and of
            one that goes because nothing else is left to.
        similarity: Mutual information of the two in bits, or what else was compared.
    """

    unit: int
    partner: int | None
    similarity: float


@dataclasses.dataclass(frozen=True)
class Redundancy:
    """The units of a layer in the order in which they go, and why.

    Attributes:
        units: Number of units.
        removed: Units in their order; any number of the first is a choice.
        kind: What was compared, one of `SIMILARITIES`.
        method: One of `METHODS`.
        threshold: Threshold at the start of "pairs".
        last_threshold: Threshold at the end, lowered when pairs above it were no longer found.
        seed: Seed of "pairs".
        mean_entropy: Mean entropy of the units in bits, None for a correlation.
        largest_entropy: Upper bound of the entropy in bits, log₂ of the number of samples.
        distance: Distance of the pruned model from the dense one, where seeds were compared by it.
    """

    units: int
    removed: tuple[Removal, ...]
    kind: str
    method: str
    threshold: float | None
    last_threshold: float | None
    seed: int | None
    mean_entropy: float | None
    largest_entropy: float
    distance: float | None = None

    def keep(self, count: int) -> Int[np.ndarray, " K"]:
        """Returns the units that stay, ascending, if the first of `removed` go.

        Raises:
            InputError: `count` is not between 1 and the number of units, or not so many were
                ranked.
        """
        gone = self.units - count
        if not 1 <= count <= self.units or gone > len(self.removed):
            raise InputError(
                f"of {self.units} units {self.units - len(self.removed)} to {self.units} can stay, "
                f"got {count}; one or more must, and more can go if more are ranked"
            )
        away = [removal.unit for removal in self.removed[:gone]]
        return np.setdiff1d(np.arange(self.units), away)

    def scores(self) -> Float[np.ndarray, " F"]:
        """Returns the scores for `choose`: the place in the order of removal, so the lowest go."""
        found = np.full(self.units, len(self.removed), np.float32)
        found[[removal.unit for removal in self.removed]] = np.arange(len(self.removed))
        return found

    def as_json(self) -> dict[str, Any]:
        """Returns it as what `json.dumps` takes."""
        return dataclasses.asdict(self)


def similarity(
    samples_NxF: Float[Any, "N F"],
    kind: str = "mutual_information",
    *,
    width: str = "alignment_unsupervised",
    reference: Float[Any, "N D"] | None = None,
    **options: Any,
) -> Similarity:
    """Returns how alike each two units are on samples, such as those of `calibration.samples`.

    The samples are standardized first. A warning says if the mean entropy is near 0 or near log₂ N,
    where the kernel width tells all samples or none apart.

    Args:
        samples_NxF: Samples of F units after the activation, N tokens.
        kind: "mutual_information": I₂ in bits. "normalized": I₂ / min(S, S), about 0 to 1.
            "correlation": the absolute correlation.
        width: Rule for the kernel widths, of `kernel_width.widths`.
        reference: Samples that the width rule aligns to: the layer's outputs, or labels.
        **options: Options of `kernel_width.widths`.

    Raises:
        InputError: An unknown kind or rule, fewer than two samples, or samples that are all equal.
    """
    check_choice(kind, SIMILARITIES, "similarity")
    check_choice(width, kernel_width.RULES, "width")
    samples_NxF = check_samples(samples_NxF)
    standard_NxF = kernel_width.standardized(samples_NxF)
    constant_F = ~np.asarray(standard_NxF).any(0)
    largest = math.log2(len(samples_NxF))
    if kind == "correlation":
        standard = np.asarray(standard_NxF)
        values_FxF = np.abs(standard.T @ standard / len(standard))
        return Similarity(values_FxF, kind, constant_F, None, largest)
    widths_F = kernel_width.widths(standard_NxF, width, reference=reference, **options)
    values_FxF, entropy_F = pairwise(standard_NxF, widths_F)
    mean = float(entropy_F[~constant_F].mean())
    if kernel_width.saturated(mean, len(samples_NxF)):
        end, way = ("small", "wider") if mean > largest / 2 else ("large", "narrower")
        warnings.warn(
            f"the mean entropy of the units is {mean:.2f} of at most {largest:.2f} bits, so the "
            f"kernel widths of the rule {width!r} are too {end} to compare units; use a {way} rule "
            "or more samples",
            SaturatedWarning,
            stacklevel=2,
        )
    if kind == "normalized":
        floor_F = np.maximum(entropy_F, 1e-6)
        for row, own in zip(values_FxF, floor_F, strict=True):
            row /= np.minimum(own, floor_F)
    return Similarity(values_FxF, kind, constant_F, mean, largest)


def rank(
    similar: Similarity,
    importance_F: Float[Any, " F"],
    *,
    method: str = "greedy",
    remove: int | None = None,
    threshold: float | None = None,
    patience: int = PATIENCE,
    clusters: Int[Any, " F"] | None = None,
    seed: int = 0,
) -> Redundancy:
    """Returns the units in the order in which they go, each with its partner.

    Constant units go first. Then "greedy" takes again and again the pair of remaining units that
    are most alike, and "pairs" draws pairs at random until one is above the threshold; of a pair
    the less important unit goes. When `patience` pairs were drawn in vain, the threshold is lowered
    by 5 %. With clusters, pairs are within a cluster as long as there are any.

    Args:
        similar: How alike the units are, of `similarity`.
        importance_F: What a unit contributes, such as ‖w_out‖ · std; the lower of a pair goes.
        method: "greedy" or "pairs".
        remove: Number of units that go; None for all but one.
        threshold: Similarity above which a pair is redundant, of "pairs". None: that of the most
            similar tenth of the pairs.
        patience: Number of draws in vain after which the threshold is lowered.
        clusters: Number of each unit's cluster, as `clusters_of` returns them.
        seed: Seed of the draws.

    Raises:
        InputError: An unknown method, more units to remove than can go, or a threshold or patience
            that is not positive.
    """
    check_choice(method, METHODS, "method")
    units = len(similar.values_FxF)
    importance_F = np.asarray(importance_F, np.float64)
    remove = units - 1 if remove is None else remove
    if importance_F.shape != (units,):
        raise InputError(f"importance_F must have {units} values, got {importance_F.shape}")
    if not 0 <= remove < units:
        raise InputError(f"remove must leave one or more of {units} units, got {remove}")
    if threshold is not None and not threshold > 0:
        raise InputError(f"threshold must be positive, got {threshold}")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise InputError(f"patience must be a number of draws of at least 1, got {patience!r}")
    clusters_F = np.zeros(units, int) if clusters is None else np.asarray(clusters)
    constant = np.flatnonzero(similar.constant_F)[:remove]
    removed = [Removal(int(unit), None, 0.0) for unit in constant]
    alive_F = np.ones(units, bool)
    alive_F[constant] = False
    last = None
    if method == "pairs" and threshold is None:
        threshold = _tenth(similar.values_FxF)
    if method == "pairs":
        assert threshold is not None
        drawn = _drawn(similar.values_FxF, alive_F, clusters_F, threshold, patience, seed)
        last = threshold
    else:
        drawn = _closest(similar.values_FxF, alive_F, clusters_F)
    while len(removed) < remove:
        a, b, last = next(drawn)
        unit, partner = (a, b) if (importance_F[a], a) < (importance_F[b], b) else (b, a)
        removed.append(Removal(unit, partner, float(similar.values_FxF[unit, partner])))
        alive_F[unit] = False
    of_pairs = method == "pairs"
    return Redundancy(
        units, tuple(removed), similar.kind, method, threshold if of_pairs else None,
        last if of_pairs else None, seed if of_pairs else None, similar.mean_entropy,
        similar.largest_entropy,
    )  # fmt: skip


def _tenth(values_FxF: np.ndarray) -> float:
    """Returns the similarity that a tenth of the pairs exceed, of a sample of them."""
    units = len(values_FxF)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, units, (2, 100_000))
    apart = a != b
    found = float(np.quantile(values_FxF[a[apart], b[apart]], 0.9)) if apart.any() else 0.0
    return max(found, 1e-6)


Pair = tuple[int, int, float]


def _closest(values_FxF: np.ndarray, alive_F: np.ndarray, clusters_F: np.ndarray) -> Iterator[Pair]:
    """Yields the two remaining units that are most alike, of a cluster while there are such.

    Keeps the nearest partner of every unit, and looks for it again only where that partner went.
    """
    units = len(values_FxF)
    within = True
    best_F, partner_F = np.full(units, -np.inf), np.zeros(units, int)

    def renew(unit: int) -> None:
        mates_F = alive_F & (clusters_F == clusters_F[unit]) if within else alive_F.copy()
        mates_F[unit] = False
        row_F = np.where(mates_F, values_FxF[unit], -np.inf)
        partner_F[unit] = row_F.argmax()
        best_F[unit] = row_F[partner_F[unit]]

    stale = np.flatnonzero(alive_F)
    while True:
        for unit in stale:
            renew(int(unit))
        best_F[~alive_F] = -np.inf
        first = int(best_F.argmax())
        if best_F[first] == -np.inf:  # no cluster has two units: take them together
            within, stale = False, np.flatnonzero(alive_F)
            continue
        yield first, int(partner_F[first]), float(best_F[first])
        stale = np.flatnonzero(alive_F & ~alive_F[partner_F])


def _drawn(
    values_FxF: np.ndarray,
    alive_F: np.ndarray,
    clusters_F: np.ndarray,
    threshold: float,
    patience: int,
    seed: int,
) -> Iterator[Pair]:
    """Yields random pairs above the threshold, `patience` of them drawn at a time."""
    rng = np.random.default_rng(seed)
    lowest = threshold * 1e-3
    while True:
        alive = np.flatnonzero(alive_F)
        a = rng.choice(alive, patience)
        b = rng.choice(alive, patience)
        sizes = np.bincount(clusters_F[alive])
        if (sizes > 1).any():
            # The second of a pair is drawn from the cluster of the first.
            order = alive[np.argsort(clusters_F[alive], kind="stable")]
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            own = clusters_F[a]
            b = order[starts[own] + rng.integers(0, sizes[own])]
        above = (values_FxF[a, b] > threshold) | (threshold < lowest)
        found = False
        for first, second in zip(a[above & (a != b)], b[above & (a != b)], strict=True):
            if alive_F[first] and alive_F[second]:
                found = True
                yield int(first), int(second), threshold
        if not found:
            threshold *= LOWERED
