"""How much to take where: every rule that shares a sparsity out over the tensors."""

from swe_prune.allocation.count import Allocation, apportion, check_sparsity, removed_count
from swe_prune.allocation.deviation import (
    gaussian_rate,
    gaussian_sparsity,
    rate_for_sparsity,
    reject_no_spread,
    spreads,
    std_threshold,
)

__all__ = [
    "Allocation",
    "apportion",
    "check_sparsity",
    "gaussian_rate",
    "gaussian_sparsity",
    "rate_for_sparsity",
    "reject_no_spread",
    "removed_count",
    "spreads",
    "std_threshold",
]
