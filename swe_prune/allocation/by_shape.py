"""Rules that depend only on tensor shapes: uniform, Erdős–Rényi, and a given table."""

import math
import re
from collections.abc import Mapping

from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.allocation import groups as grouping
from swe_prune.allocation import rounding
from swe_prune.allocation.groups import Groups
from swe_prune.allocation.rounding import Allocation
from swe_prune.arguments import checked
from swe_prune.errors import InputError, listed


@checked
def uniform(shapes: PyTree, sparsity: float) -> Allocation:
    """Returns the allocation with the same sparsity in every tensor, rounded to the exact total.

    Args:
        shapes: Pytree of arrays or of shapes, None where dense.
        sparsity: Fraction of all the weights to remove, in [0, 1).

    Raises:
        InputError: If the sparsity is outside [0, 1), or there are no tensors.

    >>> uniform({"a": (3,), "b": (3,), "c": (4,)}, 0.5).removed
    {'a': 2, 'b': 1, 'c': 2}
    """
    rounding.check_sparsity(sparsity)
    sizes = _sizes(grouping.shapes_of(shapes))
    return rounding.round_to_total(
        {name: size * sparsity for name, size in sizes.items()}, sizes, sparsity
    )


@checked
def erk(shapes: PyTree, sparsity: float, *, power: float = 1.0, kernel: bool = True) -> Allocation:
    """Returns the Erdős–Rényi-kernel allocation, which prunes large tensors more.

    The densities are those of `erk_densities`, rounded to the exact total.

    Args:
        shapes: Pytree of arrays or of shapes, None where dense.
        sparsity: Fraction of all the weights to remove, in [0, 1).
        power: Exponent of the scale, in [−8, 8]; 0 gives every tensor the same density.
        kernel: Whether all dimensions of a tensor count (ERK), or only the last two (ER).

    Raises:
        InputError: If the sparsity is outside [0, 1), the power is outside [−8, 8], or there are
            no tensors.

    >>> erk({"a": (100, 200), "b": (200, 10)}, 0.8).sparsities
    {'a': 0.8706, 'b': 0.094}
    """
    densities, _ = erk_densities(shapes, sparsity, power=power, kernel=kernel)
    sizes = _sizes(grouping.shapes_of(shapes))
    gone = {name: size * (1 - densities[name]) for name, size in sizes.items()}
    return rounding.round_to_total(gone, sizes, sparsity)


@checked
def erk_densities(
    shapes: PyTree, sparsity: float, *, power: float = 1.0, kernel: bool = True
) -> tuple[dict[str, float], float]:
    """Returns the densities of the tensors by Erdős–Rényi random graphs, and their scale ε.

    density = min(1, ε (Σ dims / Π dims)^power), with ε such that the density of all the tensors
    together is 1 − sparsity. A tensor whose density would exceed 1 stays dense, and the others are
    pruned more.

    SET (Mocanu et al., 2018) and, for convolutions with all the dimensions of the kernel, RigL
    (Evci et al., ICML 2020); google-research/rigl and jaxpruner compute the same.

    Args:
        shapes: Pytree of arrays or of shapes, None where dense. Every dimension counts separately:
            reshape an attention kernel (in, heads, width) to merge its heads and width.
        sparsity: Fraction of all the weights to remove, in [0, 1).
        power: Exponent of the scale, in [−8, 8]; 0 gives every tensor the same density.
        kernel: Whether all dimensions of a tensor count (ERK), or only inputs and outputs, the last
            two (ER), which differs for convolutions.

    Raises:
        InputError: If the sparsity is outside [0, 1), the power is outside [−8, 8], or there are
            no tensors.
    """
    rounding.check_sparsity(sparsity)
    if not abs(power) <= 8:
        raise InputError(f"power must be in [-8, 8], such as 1.0, got {power}")
    named = grouping.shapes_of(shapes)
    sizes = _sizes(named)

    def raw(shape: tuple[int, ...]) -> float:
        dims = shape if kernel else shape[-2:]
        return (sum(dims) / math.prod(dims)) ** power if dims and 0 not in dims else 1.0

    # Scale the raw densities to the number of retained weights.
    kept = sum(sizes.values()) - rounding.removed_count(sum(sizes.values()), sparsity)
    densities, scale = rounding.scale_to_total([*map(raw, named.values())], [*sizes.values()], kept)
    return dict(zip(named, densities, strict=True)), scale


@checked
def progression(
    shapes: PyTree, sparsity: float, *, spread: float = 0.2, groups: Groups = "block"
) -> Allocation:
    """Returns the allocation whose sparsity rises with depth in an arithmetic progression.

    s_b = s + spread (b / (B − 1) − ½) for the blocks b = 0 … B − 1 by the numbers in their names,
    within [0, 1] and shifted to the exact total; tensors outside of numbered blocks get s.

    Args:
        shapes: Pytree of arrays or of shapes, None where dense.
        sparsity: Fraction of all the weights to remove, in [0, 1).
        spread: Difference between the last block's sparsity and the first one's, in [0, 1]. The
            paper searches for the best in a few trials; the default is ours.
        groups: Grouping of the tensors into blocks; see `grouped`.

    Raises:
        InputError: If a number is out of range, or there are no tensors.

    Source: "Determining layer-wise sparsity for large language models through a theoretical
    perspective", arXiv 2502.14770, of which we know the abstract.

    >>> progression({"block_0/w": (10,), "block_1/w": (10,)}, 0.5, spread=0.2).removed
    {'block_0/w': 4, 'block_1/w': 6}
    """
    rounding.check_sparsity(sparsity)
    if not 0 <= spread <= 1:
        raise InputError(f"spread must be in [0, 1], such as 0.2, got {spread}")
    sizes = _sizes(grouping.shapes_of(shapes))
    members = grouping.grouped(sizes, groups)
    depths = {group: re.search(r"[0-9]+", group) for group in members}
    order = sorted({int(found[0]) for found in depths.values() if found is not None})
    last = max(len(order) - 1, 1)
    shares = [
        sparsity if found is None else sparsity + spread * (order.index(int(found[0])) / last - 0.5)
        for found in depths.values()
    ]
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    return rounding.shift_groups_to_total(shares, members, sizes, sparsity)


@checked
def table(rules: Mapping[str, float], shapes: PyTree, sparsity: float | None = None) -> Allocation:
    """Returns the allocation with a given sparsity for each tensor, by rules on its path.

    Args:
        rules: Sparsity in [0, 1) by regular expression; the first one that matches the name of a
            tensor (`re.search`) applies.
        shapes: Pytree of arrays or of shapes, None where dense.
        sparsity: Fraction of all the weights to remove. The densities of the rules are then scaled
            by one factor, clipped to 1, to meet it. If None, the sparsities of the rules are used
            unchanged, rounded to the nearest weight.

    Raises:
        InputError: If no rule matches a tensor, a rule applies to no tensor, a sparsity is outside
            [0, 1), or there are no tensors.

    >>> print(table({"up": 0.5, ".*": 0.25}, {"up": (10, 10), "down": (10, 2)}))
    tensor  removed   of  sparsity
    down          5   20    25.00%
    up           50  100    50.00%
    total        55  120    45.83%
    """
    for share in [*rules.values(), *([] if sparsity is None else [sparsity])]:
        rounding.check_sparsity(share)
    sizes = _sizes(grouping.shapes_of(shapes))
    # Find the first matching rule of each tensor; every tensor and every rule must have one.
    rule_of = {
        name: next((rule for rule in rules if tree.rule_matches(rule, name)), None)
        for name in sizes
    }
    for name, rule in rule_of.items():
        if rule is None:
            raise InputError(
                f"no rule of the table matches {name!r}; add one, such as '.*' for all the rest"
            )
    for rule in rules:
        if rule not in rule_of.values():
            raise InputError(
                f"rule {rule!r} matches no tensor that no earlier rule matches; correct it or drop "
                f"it. Tensors: {listed(sizes, 12, str)}"
            )
    given = {name: rules[rule] for name, rule in rule_of.items() if rule is not None}
    # Without a total, round each tensor separately.
    if sparsity is None:
        gone = {name: rounding.removed_count(size, given[name]) for name, size in sizes.items()}
        return Allocation(gone, sizes)
    # With a total, scale the densities of the rules to meet it.
    total = sum(sizes.values())
    kept, _ = rounding.scale_to_total(
        [1 - share for share in given.values()],
        [*sizes.values()],
        total - rounding.removed_count(total, sparsity),
    )
    targets = {
        name: size * (1 - share) for (name, size), share in zip(sizes.items(), kept, strict=True)
    }
    return rounding.round_to_total(targets, sizes, sparsity)


def _sizes(named: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in named.items()}
