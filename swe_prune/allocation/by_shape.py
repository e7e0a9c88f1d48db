"""Rules that ask only how large the tensors are: uniform, Erdős–Rényi, and a given table."""

import math
from collections.abc import Mapping

from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.allocation import groups, rounding
from swe_prune.allocation.rounding import Allocation
from swe_prune.errors import InputError


def uniform(shapes: PyTree, sparsity: float) -> Allocation:
    """Returns the same share of every tensor, rounded so that the total is exact.

    Args:
        shapes: pytree of arrays or of shapes, None where dense.
        sparsity: share to remove of all the weights, in [0, 1).

    Raises:
        InputError: sparsity outside [0, 1), or no tensors.

    >>> uniform({"a": (3,), "b": (3,), "c": (4,)}, 0.5).removed
    {'a': 2, 'b': 1, 'c': 2}
    """
    rounding.check_sparsity(sparsity)
    sizes = _sizes(groups.shapes_of(shapes))
    return rounding.round_to_total(
        {name: size * sparsity for name, size in sizes.items()}, sizes, sparsity
    )


def erk(shapes: PyTree, sparsity: float, *, power: float = 1.0, kernel: bool = True) -> Allocation:
    """Returns the Erdős–Rényi-kernel allocation: large tensors lose more.

    The densities are those of `erk_densities`, rounded so that the total is exact.

    Args:
        shapes: pytree of arrays or of shapes, None where dense.
        sparsity: share to remove of all the weights, in [0, 1).
        power: as in `erk_densities`.
        kernel: as in `erk_densities`.

    Raises:
        InputError: sparsity outside [0, 1), a power out of [−8, 8], or no tensors.

    >>> erk({"a": (100, 200), "b": (200, 10)}, 0.8).sparsities
    {'a': 0.8706, 'b': 0.094}
    """
    densities, _ = erk_densities(shapes, sparsity, power=power, kernel=kernel)
    sizes = _sizes(groups.shapes_of(shapes))
    gone = {name: size * (1 - densities[name]) for name, size in sizes.items()}
    return rounding.round_to_total(gone, sizes, sparsity)


def erk_densities(
    shapes: PyTree, sparsity: float, *, power: float = 1.0, kernel: bool = True
) -> tuple[dict[str, float], float]:
    """Returns the share that each tensor keeps by Erdős–Rényi random graphs, and their scale ε.

    density = min(1, ε (Σ dims / Π dims)^power), with ε such that all the tensors together keep the
    share 1 − sparsity; a tensor that would be denser than dense stays dense and the others give.

    SET (Mocanu et al., 2018) and, for convolutions with all the dimensions of the kernel, RigL
    (Evci et al., ICML 2020); google-research/rigl and jaxpruner compute the same.

    Args:
        shapes: pytree of arrays or of shapes, None where dense. All the dimensions count as they
            are: reshape an attention kernel (in, heads, width) if its heads are to count as one.
        sparsity: share to remove of all the weights, in [0, 1).
        power: of the scale; 0 gives every tensor the same density.
        kernel: True, all the dimensions (ERK); False, only inputs and outputs, the last two (ER),
            which differs for convolutions.

    Raises:
        InputError: sparsity outside [0, 1), a power out of [−8, 8], or no tensors.
    """
    rounding.check_sparsity(sparsity)
    if not abs(power) <= 8:
        raise InputError(f"power = {power} is out of [-8, 8]; give one such as 1.0")
    named = groups.shapes_of(shapes)
    sizes = _sizes(named)

    def raw(shape: tuple[int, ...]) -> float:
        dims = shape if kernel else shape[-2:]
        return (sum(dims) / math.prod(dims)) ** power if dims and 0 not in dims else 1.0

    kept = sum(sizes.values()) - rounding.removed_count(sum(sizes.values()), sparsity)
    densities, scale = rounding.scale_to_total([*map(raw, named.values())], [*sizes.values()], kept)
    return dict(zip(named, densities, strict=True)), scale


def table(rules: Mapping[str, float], shapes: PyTree, sparsity: float | None = None) -> Allocation:
    """Returns a given sparsity for each tensor, found by rules on its path.

    Args:
        rules: regular expression → sparsity in [0, 1); the first one found in the name of a tensor
            (`re.search`) counts.
        shapes: pytree of arrays or of shapes, None where dense.
        sparsity: None, each tensor loses what its rule says, to the nearest weight; a share of all
            the weights, then the shares that the tensors keep are scaled by one factor to meet it,
            and none keeps more than it has.

    Raises:
        InputError: a tensor that no rule matches, a rule that matches no tensor (or none that an
            earlier rule does not take), a sparsity outside [0, 1), or no tensors.

    >>> print(table({"up": 0.5, ".*": 0.25}, {"up": (10, 10), "down": (10, 2)}))
    tensor  removed   of  sparsity
    down          5   20    25.00%
    up           50  100    50.00%
    total        55  120    45.83%
    """
    for share in [*rules.values(), *([] if sparsity is None else [sparsity])]:
        rounding.check_sparsity(share)
    sizes = _sizes(groups.shapes_of(shapes))
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
                f"rule {rule!r} matches no tensor that an earlier rule does not take; correct or "
                f"drop it. Tensors: {', '.join(list(sizes)[:12])}"
            )
    given = {name: rules[rule] for name, rule in rule_of.items() if rule is not None}
    if sparsity is None:
        gone = {name: rounding.removed_count(size, given[name]) for name, size in sizes.items()}
        return Allocation(gone, sizes)
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
