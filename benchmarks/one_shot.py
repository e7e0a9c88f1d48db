"""One-shot pruning of a pretrained model, from the bare checkpoint, in and out of its domain.

    python benchmarks/one_shot.py                      SmolLM2-135M, one seed
    python benchmarks/one_shot.py --seeds 0 1 2 --scored=16384 --sparsities 0.5 0.6 0.7 2:4

Every method gets the same calibration windows of Shakespeare's plays, nothing else, and the model
as it comes. `fisher-P` scores each weight by w² E[g²]^P, one gradient an example, and ranks all
tensors together, none of which loses more than `--max-sparsity`, by default so much that it keeps
half of what it would keep if all lost the same share; with n:m it chooses within each group.
`+admm` restores the weights that stay, block after block, judged on the last eighth of the windows;
`+admm:TARGET` towards another target; `+admm:blind` without a judge; `+local` trains each block
towards the dense model's activations, and `+admm+local` does one after the other.
`sparsegpt@fisher-P` and `admm@fisher-P` prune to the sparsities per tensor that `fisher-P` gives.
Perplexity is that of held-out plays, of Python source (the installed jax package) and of prose (the
licences of the installed packages). "of SparseGPT" is the increase over the dense model's
perplexity as a multiple of SparseGPT's, median over seeds.
"""

import argparse
import collections
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accounts import accounted
from rich.console import Console
from rich.table import Table
from subjects import TEXTS, Subject, pretrained

from swe_prune import (
    allocation,
    blockwise,
    calibration,
    importance,
    masks,
    patterns,
    tree,
)
from swe_prune.models import gpt
from swe_prune.recipe import default_max_sparsity
from swe_prune.training import step

METHODS = (
    "wanda",
    "sparsegpt",
    "sparsegpt@fisher-0.5",
    "fisher-0.5",
    "fisher-0.5+admm",
    "fisher-1",
    "fisher-1+admm",
)
MORE = (
    "admm",
    "admm@fisher-0.5",
    "fisher-0.5+admm:blind",
    "fisher-1+admm:blind",
    *(f"fisher-{p}+admm:{target}" for p in ("0.5", "1") for target in blockwise.TARGETS[1:]),
    "fisher-0.5+local",
    "fisher-0.5+admm+local",
)
"""Methods and ablations that run only when they are asked for."""


def amount(given: str) -> float | str:
    """Returns a share to remove, or a pattern n:m as it is."""
    return given if ":" in given and patterns.parse_n_of_m(given) else float(given)


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--sparsities", type=amount, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration window")
    parser.add_argument("--max-sparsity", type=float, help="largest share that a tensor loses")
    parser.add_argument("--scored", type=int, default=4096, help="tokens scored of each text")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *MORE), default=METHODS)
    parser.add_argument("--gradients", type=Path, help="folder that keeps gradients for reruns")
    parser.add_argument(
        "--out", type=Path, help="JSON file of all the numbers; the rows it has are not run again"
    )
    parser.set_defaults(other=0)
    return parser.parse_args()


def kept_rows(options: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of an earlier run of the same settings, from the file it wrote."""
    if options.out is None or not options.out.exists():
        return []
    kept = json.loads(options.out.read_text())
    if kept["settings"] != settings:
        sys.exit(
            f"{options.out} was written with {kept['settings']}, and this run has {settings}; "
            "name another file"
        )
    return kept["rows"]


def prune(method: str, sparsity: float | str, given: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the pruned parameters and the masks of one method."""
    arguments: dict[str, Any] = {"blocks": gpt.BLOCKS}
    name, _, restore = method.partition("+")
    solver, _, ranked = name.rpartition("@") if "fisher" in name else (name, "", "")
    variables = {"params": given["params"]}
    scores: Any = None
    most = given["max_sparsity"]
    if most is None and not isinstance(sparsity, str):
        most = default_max_sparsity("fisher", sparsity)
    if ranked:
        power = float(ranked.removeprefix("fisher-"))
        scores = importance.score(
            "fisher", given["params"], measured=given["measured"], power=power
        )
    if solver:
        how: dict[str, Any] = {"sparsity": sparsity}
        if isinstance(sparsity, str):
            how = {"pattern": sparsity}  # which fixes what each tensor loses
        elif ranked:
            how["sparsity"] = allocation.by_curvature(scores, sparsity, max_sparsity=most)
        params, mask, _ = blockwise.prune_blocks(
            given["module"], variables, given["batches"], method=solver, **how, **arguments
        )
        return params, mask
    if isinstance(sparsity, str):
        n, m = patterns.parse_n_of_m(sparsity)
        mask = masks.by_sparsity(scores, 1 - n / m, pattern=sparsity)
    else:
        mask = masks.by_sparsity(scores, sparsity, "global", max_sparsity=most)
    if not restore:
        return masks.apply(given["params"], mask), mask
    restore, _, how_to = restore.partition(":")
    if how_to == "blind":
        arguments["holdout"] = ()
    elif how_to:
        arguments["target"] = how_to
    params, mask, reports = blockwise.prune_blocks(
        given["module"], variables, given["batches"], mask=mask, restore=restore, **arguments
    )
    gave_up = collections.Counter(one.gave_up for one in reports)
    kinds = collections.Counter(one.name.split("/")[-2] for one in reports if one.gave_up)
    print(method, sparsity, dict(gave_up), "not restored:", dict(kinds), flush=True)
    blocks = {one.name.split("/")[0]: one.held_out for one in reports if one.held_out}
    harmed = {block: found for block, found in blocks.items() if found[1] > found[0]}
    for block, (alone, restored_all, kept) in harmed.items():
        print(f"  {block}: {alone:.4f} alone, {restored_all:.4f} restored, {kept:.4f} kept")
    return params, mask


def gradients(subject: Subject, batches: Any, keep: Path | None, name: str) -> Any:
    """Returns E[g²], one gradient an example; from a file where a folder keeps it."""
    file = keep / f"{name}.npz" if keep is not None else None
    if file is not None and file.exists():
        kept = np.load(file)
        leaves = {one.replace("|", "/"): jnp.asarray(kept[one]) for one in kept.files}
        return {"gradient_square": tree.map_named(lambda one, _: leaves.get(one), subject.params)}
    measured = calibration.gradients(
        step.loss_fn(subject.module), subject.params, batches, at_once=1
    )
    if file is not None:
        named = tree.named_leaves(measured["gradient_square"])
        leaves: dict[str, Any] = {n.replace("/", "|"): x for n, x in named if x is not None}
        np.savez(file, **leaves)
    return measured


def main() -> None:
    """Prunes and scores everything, and prints the tables."""
    options = parse()
    subject = pretrained(options, *TEXTS)
    settings = {
        "model": subject.name,
        **{
            name: getattr(options, name) for name in ("windows", "length", "scored", "max_sparsity")
        },
    }
    rows = kept_rows(options, settings)
    done = {(row["method"], row["sparsity"], row["seed"]) for row in rows}
    dense = subject.perplexity(subject.module, subject.params)
    print("dense", dense, flush=True)
    for seed in options.seeds:
        batches = subject.windows(seed)
        begun = time.perf_counter()
        measured = None
        if any("fisher" in method for method in options.methods):
            name = f"g_{seed}_{options.windows}_{options.length}"
            measured = gradients(subject, batches, options.gradients, name)
            jax.block_until_ready(measured)
        backward = time.perf_counter() - begun
        print(f"seed {seed}: gradients in {backward:.0f} s", flush=True)
        given = {
            "params": subject.params,
            "module": subject.module,
            "batches": batches,
            "measured": measured,
            "max_sparsity": options.max_sparsity,
        }
        for sparsity in options.sparsities:
            for method in options.methods:
                if (method, sparsity, seed) in done:
                    continue
                begun = time.perf_counter()
                params, mask = prune(method, sparsity, given)
                jax.block_until_ready(params)
                seconds = time.perf_counter() - begun + backward * ("fisher" in method)
                row = {
                    "method": method, "sparsity": sparsity, "seed": seed, "seconds": seconds,
                    "achieved": masks.summary(mask).sparsity,
                    **subject.perplexity(subject.module, params),
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.out:
                    found = {"settings": settings, "dense": dense, "rows": rows}
                    options.out.write_text(json.dumps(found, indent=1))
    show(dense, rows, options, subject.name)


def show(dense: dict[str, float], rows: list[Any], options: argparse.Namespace, name: str) -> None:
    """Prints the table."""
    table = Table(
        title=f"{name}: {options.windows} x {options.length} tokens of plays, "
        f"{options.scored} tokens scored of each text, {len(options.seeds)} seeds, medians",
        caption=f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}; dense "
        + ", ".join(f"{name} {value:.1f}" for name, value in dense.items()),
    )
    for heading in ("", "sparsity", *dense, *(f"{n}, of SparseGPT" for n in dense), "seconds"):
        table.add_column(heading, justify="right")
    for sparsity in options.sparsities:
        same = [r for r in rows if r["sparsity"] == sparsity and r["seed"] in options.seeds]
        base = {row["seed"]: row for row in same if row["method"] == "sparsegpt"}
        for method in options.methods:
            own = [row for row in same if row["method"] == method]
            values = [f"{statistics.median(r[name] for r in own):.1f}" for name in dense]
            shares = ["" for _ in dense]
            if base:
                shares = [
                    f"{statistics.median((r[n] - d) / (base[r['seed']][n] - d) for r in own):.2f}"
                    for n, d in dense.items()
                ]
            seconds = f"{statistics.median(r['seconds'] for r in own):.0f}"
            shown = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
            table.add_row(method, shown, *values, *shares, seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    accounted(main)
