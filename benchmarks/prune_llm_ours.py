"""Our side of `prune_llm.py`: `interop.load` and `blockwise.prune_blocks`, in their own process."""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
import timing

from swe_prune import interop, tree
from swe_prune.blockwise import prune_blocks
from swe_prune.models import gpt


def main() -> None:
    """Does the work that the arguments ask for, and prints what it took as JSON."""
    options = json.loads(sys.argv[1])
    compiling: list[float] = []

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    jax.block_until_ready(jax.numpy.zeros((8, 8)) @ jax.numpy.zeros((8, 8)))
    before, _ = timing.memory_mib()
    start = time.perf_counter()
    model = interop.load(options["model"], tokenizer=False)
    config, vocab_size = model.config, model.vocab_size
    leaves, structure = jax.tree.flatten(model.params)
    del model
    for number, leaf in enumerate(leaves):  # to host memory that can be written, one at a time
        leaves[number] = np.array(leaf)
    del leaf
    params = structure.unflatten(leaves)
    del leaves
    found = {"import_s": time.perf_counter() - start}
    found["import_mib"] = timing.memory_mib()[1] - before
    tokens = np.load(options["tokens"])
    timing.restart_peak()
    compiling.clear()
    start = time.perf_counter()
    params, masks, _ = prune_blocks(
        gpt.build(config, vocab_size),
        {"params": params},
        np.split(tokens, range(options["batch"], len(tokens), options["batch"])),
        blocks=[f"block_{number}" for number in range(options["layers"])],
        sparsity=options["sparsity"],
        method=options["method"],
        offload=True,
        donate=True,
    )
    jax.block_until_ready((params, masks))
    found |= {"prune_s": time.perf_counter() - start, "compile_s": sum(compiling)}
    found["prune_mib"] = timing.memory_mib()[1] - before
    first: dict[str, Any] = {
        name.removesuffix("/kernel"): np.asarray(leaf)
        for name, leaf in tree.named_leaves(masks["block_0"])
        if leaf is not None
    }
    np.savez(options["out"], **first)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
