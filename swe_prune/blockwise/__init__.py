"""Pruning by calibration, kernel by kernel and block after block.

admm         ADMM: the update of the weights that stay, for a mask that is given or its own
sparsegpt    SparseGPT: a kernel's mask, and the update of the weights that stay
wanda        Wanda's masks: the lowest of each output, and its variant
block_graph  how the blocks of a Linen or NNX model are run alone
nnx_blocks   NNX models as `block_graph` runs them
kernels      one kernel: its mask, the update of the weights that stay, the report
runner       the activations between blocks, and the compiled programs of a block
streams      the activations of the calibration batches, as several models have them
local        a block's kernels trained towards the dense model's activations, masks held
guard        what is restored is kept only where it holds on held-out batches
prune        the whole: each block on the inputs that the already pruned blocks before it give
"""

from swe_prune.blockwise.admm import admm
from swe_prune.blockwise.kernels import METHODS, RESTORES, KernelReport
from swe_prune.blockwise.prune import prune_blocks
from swe_prune.blockwise.sparsegpt import SolverReport, sparsegpt
from swe_prune.blockwise.streams import TARGETS
from swe_prune.blockwise.wanda import wanda_mask, wanda_variant_mask

__all__ = [
    "METHODS",
    "RESTORES",
    "TARGETS",
    "KernelReport",
    "SolverReport",
    "admm",
    "prune_blocks",
    "sparsegpt",
    "wanda_mask",
    "wanda_variant_mask",
]
