"""Choices of a pruning request, listed once for recipes, configs, commands and checks."""

from typing import Literal

Scope = Literal["tensor", "global", "row"]
"""Where a sparsity is met; see `masks.by_sparsity`."""

Zeros = Literal["keep", "free"]
"""What becomes of weights that are 0 already; see `importance.score`."""

Method = Literal["wanda", "wanda_variant", "sparsegpt", "admm", "magnitude"]
"""Methods that prune one block after the other; see `blockwise.prune_blocks`."""

BlockRestore = Literal["admm", "local", "admm+local"]
Restore = Literal[BlockRestore, "least_squares"]
"""How the weights that stay make up for the others: for any mask, or for masks of whole inputs."""
