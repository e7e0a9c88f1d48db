"""Allocation rules, which distribute a sparsity over the tensors."""

from swe_prune.allocation.alpha_pruning import (
    alpha_pruning,
    alpha_shares,
    hill_alpha,
    tail_exponents,
)
from swe_prune.allocation.by_score import by_curvature, by_scores
from swe_prune.allocation.by_shape import erk, erk_densities, progression, table, uniform
from swe_prune.allocation.ecoflap import ecoflap, zeroth_order_importance
from swe_prune.allocation.filling import water_fill
from swe_prune.allocation.groups import GROUPINGS, Groups, grouped
from swe_prune.allocation.owl import owl, owl_sparsities
from swe_prune.allocation.registry import NEEDS, Rule, allocate, get, names
from swe_prune.allocation.rounding import (
    Allocation,
    apportion,
    check_room,
    check_sparsity,
    least_kept,
    removed_count,
)
from swe_prune.allocation.std_rule import (
    gaussian_rate,
    gaussian_sparsity,
    rate_for_sparsity,
    reject_no_spread,
    spreads,
    std,
    std_threshold,
)

__all__ = [
    "GROUPINGS",
    "NEEDS",
    "Allocation",
    "Groups",
    "Rule",
    "allocate",
    "alpha_pruning",
    "alpha_shares",
    "apportion",
    "by_curvature",
    "by_scores",
    "check_room",
    "check_sparsity",
    "ecoflap",
    "erk",
    "erk_densities",
    "gaussian_rate",
    "gaussian_sparsity",
    "get",
    "grouped",
    "hill_alpha",
    "least_kept",
    "names",
    "owl",
    "owl_sparsities",
    "progression",
    "rate_for_sparsity",
    "reject_no_spread",
    "removed_count",
    "spreads",
    "std",
    "std_threshold",
    "table",
    "tail_exponents",
    "uniform",
    "water_fill",
    "zeroth_order_importance",
]
