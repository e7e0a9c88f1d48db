"""Pruning by calibration, kernel by kernel and block after block.

solver    SparseGPT: a kernel's mask, and the update of the weights that stay
ranking   Wanda's masks: the lowest of each output, and its variant
"""

from swe_prune.blockwise.ranking import wanda_mask, wanda_variant_mask
from swe_prune.blockwise.solver import SolverReport, sparsegpt

__all__ = [
    "SolverReport",
    "sparsegpt",
    "wanda_mask",
    "wanda_variant_mask",
]
