"""Training that changes its masks: functions for any loop, on pytrees of any kind.

All of them run inside a jit with the step, the sparsity and the fraction traced, so one compiled
train step serves the whole training.

on_schedule       prune at the due steps of a schedule
drop_and_grow     RigL and SET: exchange the weakest weights for new ones
straight_through  sparse in the forward pass, dense in the gradient
movement          scores that are learned while training
elsa              weights drawn towards sparse ones, around any optimizer
rewind            back to early values, or to an early learning rate
"""

from swe_prune.sparse_training import movement
from swe_prune.sparse_training.drop_and_grow import (
    REGROWN,
    drop_and_grow,
    rigl,
    rigl_update,
    set,
    set_update,
)
from swe_prune.sparse_training.elsa import ElsaState, elsa, elsa_masks
from swe_prune.sparse_training.on_schedule import all_kept, prune_on_schedule
from swe_prune.sparse_training.rewind import rewind, rewound_schedule
from swe_prune.sparse_training.straight_through import ste_magnitude, straight_through

__all__ = [
    "REGROWN",
    "ElsaState",
    "all_kept",
    "drop_and_grow",
    "elsa",
    "elsa_masks",
    "movement",
    "prune_on_schedule",
    "rewind",
    "rewound_schedule",
    "rigl",
    "rigl_update",
    "set",
    "set_update",
    "ste_magnitude",
    "straight_through",
]
