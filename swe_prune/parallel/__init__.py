"""Where arrays live when there are many devices: the mesh, the path rules, the state's layout.

    mesh = parallel.mesh(config.parallel)                    # axes data, fsdp, tensor
    specs, uneven = parallel.partition(params, rules, mesh)  # path rule -> PartitionSpec
    params = parallel.laid_out(params, specs, mesh)          # abstract, born sharded under jit
    state = parallel.place_state(state, params)   # moments, masks, statistics follow

The axes `data` and `fsdp` both divide the batch; `fsdp` divides the weights too, which are gathered
where they are used; `tensor` divides the work inside a layer.
"""

from swe_prune.parallel.batches import (
    BATCH,
    PlacedBatches,
    check_batch,
    constrain_rows,
    own_rows,
    place_batch,
)
from swe_prune.parallel.host_memory import host_memory_missing, to_host, tracking_on_host
from swe_prune.parallel.mesh import AXES, mesh
from swe_prune.parallel.partition_rules import partition
from swe_prune.parallel.sharding import laid_out, place_like, place_state

__all__ = [
    "AXES",
    "BATCH",
    "PlacedBatches",
    "check_batch",
    "constrain_rows",
    "host_memory_missing",
    "laid_out",
    "mesh",
    "own_rows",
    "partition",
    "place_batch",
    "place_like",
    "place_state",
    "to_host",
    "tracking_on_host",
]
