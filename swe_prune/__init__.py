"""Trajectory-based weight pruning for JAX.

In one line, with what you have of a trained model:

    pruned = swe_prune.prune(params, sparsity=0.5)

Which axes of each weight are inputs, outputs and copies, traced from your own function:

    layout = swe_prune.layout(fn, params, batch)

Or step by step. Track what every weight did while it trained, score it, mask it, fine-tune:

    from swe_prune import importance, masks, trajectory

    stats = trajectory.init(params)               # beside your parameters
    stats = trajectory.update(stats, params)      # every so many steps, inside your jit
    scores = importance.score("swe", params, stats=stats)
    mask = masks.by_sparsity(scores, 0.6)
    params = masks.apply(params, mask)
    optimizer = masks.keep(optimizer, mask)       # zeros stay zero
"""

import swe_prune.early_signals  # first, while the rest is imported
import swe_prune.runtime.huge_pages  # noqa: F401, next, since it may start the program again
from swe_prune import (
    allocation,
    blockwise,
    calibration,
    errors,
    importance,
    ledger,
    masks,
    patterns,
    recipe,
    schedules,
    select,
    sparse_training,
    structured,
    trajectory,
    tree,
)
from swe_prune.layout import Axes, layout
from swe_prune.masks.saving import load, save
from swe_prune.pruning import Pruned, prune
from swe_prune.version import __version__

__all__ = [
    "Axes",
    "Pruned",
    "__version__",
    "allocation",
    "blockwise",
    "calibration",
    "errors",
    "importance",
    "layout",
    "ledger",
    "load",
    "masks",
    "patterns",
    "prune",
    "recipe",
    "save",
    "schedules",
    "select",
    "sparse_training",
    "structured",
    "trajectory",
    "tree",
]
