"""Neurons cut out of a model: which criterion, and what the refit makes up for.

    python benchmarks/neurons.py                       SmolLM2-135M, a quarter and a half, one seed
    python benchmarks/neurons.py --seeds 0 1 2 --sparsities 0.1 0.25 0.4 0.6
    python benchmarks/neurons.py --workdir=runs/demo --after cut refit recovered    a study's models
    python benchmarks/neurons.py --criteria mi_pairs --draws=4 --after cut folded --explain=why.json

Every criterion gets the same calibration windows of Shakespeare's plays and ranks the hidden units
of each MLP; every layer loses the same share, and the arrays are cut. `mi_greedy` and `mi_pairs`
are arXiv 2406.00030, by mutual information; `activation_norm` is ModelOpt's; `input_norm_product`
is FASP's; `fisher` sums w² √E[g²] over the weights of a unit. "refit" is the least-squares refit of
the down projections, all from the dense model's inputs; "blockwise" the same block after block, on
the inputs that the cut blocks before give; "folded" folds a unit into its partner; "recovered" is
refitted and trained on as the study's cells are. Perplexity is that of held-out plays, and for a
pretrained model of Python source (the installed jax package), too. "left" is what remains of the
increase in loss that the bare cut causes, median over seeds. A seed draws the calibration windows,
and of a study it also chooses the dense model.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accounts import accounted
from rich.console import Console
from rich.table import Table
from subjects import Subject, pretrained, trained

from swe_prune import blockwise, calibration, importance, structured
from swe_prune.errors import InputError
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
AFTER = ("cut", "refit", "blockwise", "folded", "recovered")
READERS = r"mlp/down/kernel$"


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--workdir", type=Path, help="a run whose dense models are cut instead")
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

    subject: Subject = given["subject"]

    def apart(found: Any) -> float:
        scores = structured.redundancy_scores(given["groups"], found)
        keep = structured.choose(given["groups"], scores, sparsity=options.sparsities[0])
        small, params = cut(given, subject.params, keep)
        return distance.kl_to_dense(
            subject.module, subject.params, params, tokens, protocol, batch=4, pruned_model=small
        ).nats_per_token

    return structured.redundant_units(
        given["groups"], subject.params, given["samples"], kind, method=method,
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
        given["groups"], given["subject"].params, criterion, given["moments"], seed=seed
    )
    return scores, None


def cut(given: dict[str, Any], params: Any, keep: Any) -> tuple[Any, Any]:
    """Returns the smaller module and its parameters."""
    subject: Subject = given["subject"]
    config = structured.cut_config(subject.config, keep)
    return gpt.build(config, subject.vocab_size), structured.cut(params, given["groups"], keep)


def made_up(after: str, keep: Any, found: Any, given: dict[str, Any], damping: float) -> Any:
    """Returns the parameters with what makes up for a cut, not cut yet."""
    subject, groups = given["subject"], given["groups"]
    params = subject.params
    if after in ("refit", "recovered"):
        return refit(params, groups, keep, given["moments"], damping=damping)[0]
    if after == "folded":
        return structured.fold_units(params, groups, keep, found, given["samples"])
    if after == "blockwise":
        mask = structured.unit_mask(params, groups, keep)
        down = jax.tree.map_with_path(
            lambda path, leaf: leaf if "down" in jax.tree_util.keystr(path) else None, mask
        )
        return blockwise.prune_blocks(
            subject.module, {"params": params}, given["batches"], blocks=gpt.BLOCKS, mask=down,
            restore="least_squares", damping=damping,
        )[0]  # fmt: skip
    return params


def measured(subject: Subject, seed: int, options: Any) -> dict[str, Any]:
    """Returns the model with what the criteria need, by the calibration text of a seed."""
    batches, module, params = subject.windows(seed), subject.module, subject.params
    begun = time.perf_counter()
    found: dict[str, Any] = {"subject": subject, "batches": batches, "known": {}}
    found["groups"] = structured.groups(subject.config)
    variables = {"params": params}
    found["moments"] = calibration.moments(module, variables, batches, leaves=READERS, gram=True)
    if set(REDUNDANT) & set(options.criteria):
        found["samples"] = calibration.samples(
            module, variables, batches, leaves=READERS, tokens=options.samples, seed=seed
        )
    if "fisher" in options.criteria:
        gradients = calibration.gradients(step.loss_fn(module), params, batches, at_once=1)
        scores = importance.score("fisher", params, measured=gradients, power=0.5)
        found["fisher"] = structured.unit_scores(found["groups"], scores, "sum")
    print(f"seed {seed}: measured in {time.perf_counter() - begun:.0f} s", flush=True)
    return found


def main() -> None:
    """Cuts and scores everything, and prints the table."""
    options = parse()
    if options.workdir is None and "recovered" in options.after:
        raise InputError("--after recovered trains as a study does; give its folder by --workdir")
    subject = None if options.workdir else pretrained(options, "plays", "Python")
    rows: list[dict[str, Any]] = []
    reasons: dict[str, Any] = {}
    for seed in options.seeds:
        if options.workdir:
            subject = trained(options.workdir, seed, options)
        assert subject is not None
        dense = subject.perplexity(subject.module, subject.params)
        print(f"{subject.name}: dense", dense, flush=True)
        given = measured(subject, seed, options)
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
            if after == "recovered":
                assert subject.recover is not None
                params = subject.recover(small, params)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - begun
            row = {
                "criterion": criterion, "sparsity": sparsity, "seed": seed, "after": after,
                "seconds": seconds, "dense": dense, **subject.perplexity(small, params),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"rows": rows}, indent=1))
        reasons |= {
            f"{criterion}, seed {seed}": {name: one.as_json() for name, one in found.items()}
            for criterion, found in orders.items()
            if found is not None
        }
        if options.explain:
            options.explain.write_text(json.dumps(reasons, indent=1))
    show(rows, options, str(options.workdir or (subject and subject.name)))


def show(rows: list[Any], options: argparse.Namespace, name: str) -> None:
    """Prints the table: the increase in loss over the dense model, nats per token."""
    texts = list(rows[0]["dense"])
    dense = {text: statistics.median(row["dense"][text] for row in rows) for text in texts}
    table = Table(
        title=f"{name}: {options.windows} calibration windows, {len(options.seeds)} seeds, medians",
        caption=f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}; dense "
        + ", ".join(f"{text} {value:.2f}" for text, value in dense.items()),
    )
    headings = (*texts, *(f"{text}, rise" for text in texts), *(f"{text}, left" for text in texts))
    for heading in ("criterion", "sparsity", "after", *headings):
        table.add_column(heading, justify="right")
    for sparsity, criterion in itertools.product(options.sparsities, options.criteria):
        own = [r for r in rows if (r["criterion"], r["sparsity"]) == (criterion, sparsity)]
        bare = {row["seed"]: row for row in own if row["after"] == "cut"}
        for after in options.after:
            these = [row for row in own if row["after"] == after]
            if not these:
                continue
            columns = [[row[text] for row in these] for text in texts]
            columns += [[rise(row, text) for row in these] for text in texts]
            if bare and after != "cut":
                columns += [
                    [rise(row, text) / rise(bare[row["seed"]], text) for row in these]
                    for text in texts
                ]
            values = [f"{statistics.median(column):.3f}" for column in columns]
            table.add_row(criterion, f"{sparsity:.0%}", after, *values)
    Console(width=140).print(table)


def rise(row: dict[str, Any], text: str) -> float:
    """Returns the increase in loss over the dense model's, in nats per token."""
    return float(np.log(row[text] / row["dense"][text]))


if __name__ == "__main__":
    accounted(main)
