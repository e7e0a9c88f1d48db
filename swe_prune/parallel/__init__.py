"""Sharding over many devices: the mesh, partition rules, and shardings of the training state.

    mesh = parallel.mesh(config.parallel)                    # axes data, fsdp, tensor
    specs, uneven = parallel.partition(params, rules, mesh)  # path rule -> PartitionSpec
    params = parallel.with_shardings(params, specs, mesh)    # abstract, for sharded init under jit
    state = parallel.shard_state(state, params)              # moments, masks, statistics too

The batch is sharded over the axes `data` and `fsdp`. Weights are sharded over `fsdp` too, and
gathered where they are used. The computation inside a layer is sharded over `tensor`.
"""

from swe_prune.parallel.batches import (
    BATCH,
    ShardedBatches,
    check_batch,
    constrain_rows,
    own_rows,
    shard_batch,
)
from swe_prune.parallel.host_memory import host_memory_missing, to_host, tracking_on_host
from swe_prune.parallel.mesh import AXES, mesh
from swe_prune.parallel.partition_rules import partition
from swe_prune.parallel.sharding import shard_like, shard_state, with_shardings

__all__ = [
    "AXES",
    "BATCH",
    "ShardedBatches",
    "check_batch",
    "constrain_rows",
    "host_memory_missing",
    "mesh",
    "own_rows",
    "partition",
    "shard_batch",
    "shard_like",
    "shard_state",
    "to_host",
    "tracking_on_host",
    "with_shardings",
]
