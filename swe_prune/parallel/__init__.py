"""Where arrays live when there are many devices: the mesh, the path rules, the state's layout.

    mesh = parallel.mesh(config.parallel)                    # axes data, fsdp, tensor
    specs, uneven = parallel.partition(params, rules, mesh)  # path rule -> PartitionSpec
    params = parallel.with_shardings(params, specs, mesh)          # abstract, born sharded under jit
    state = parallel.shard_state(state, optimizer, params)   # moments, masks, statistics follow

The axes `data` and `fsdp` both divide the batch; `fsdp` divides the weights too, which are gathered
where they are used; `tensor` divides the work inside a layer.
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
