"""A made-up working directory in the experiment's format, for the report's own tests.

The curves have the shape that real ones have (a flat start, a knee, an explosion before
fine-tuning); the real data come in the end-to-end test.
"""

import csv
import itertools
import json
import math
import random
from pathlib import Path

from swe_prune.study.results import COLUMNS, Row

KINDS = {"attention/out": 0.06, "attention/qkv": 0.05, "mlp/down": 0.03, "mlp/up": 0.04}
TENSORS = [f"block_{layer}/{kind}/kernel" for layer in range(6) for kind in KINDS]
SIZE = 20_000
PRUNABLE, PARAMS = SIZE * len(TENSORS), SIZE * len(TENSORS) + 300_000
RATES = {0.5: 0.38, 1.0: 0.505, 1.4: 0.612, 2.0: 0.78, 3.0: 0.935}
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
QUALITY = {"swe": 1.0, "swe_spread": 1.25, "magnitude": 1.12, "random": 3.0, "votes": 1.7}
SAMPLE = 64


def row(**changes):
    """One row of results.csv as the report reads it, with plain defaults; a rate or a sparsity."""
    values = {
        "seed": 0, "criterion": "swe", "method": "", "options": "", "allocation": "",
        "scope": "tensor", "sparsity": "", "rate": 1.4, "pattern": "", "schedule": "one_shot",
        "recovery": "finetune", "steps": 500, "sparsity_prunable": 0.6, "sparsity_total": 0.5,
        "nonzero_params": 400, "dense_loss": 2.0, "control_loss": 1.95, "pruned_loss": 3.0,
        "finetuned_loss": 1.955, "seconds": 60.0,
    }  # fmt: skip
    if "sparsity" in changes and "rate" not in changes:
        values["rate"] = ""
    return {**values, **changes}


def cell(**changes):
    """The same as a `Row`, with None for what is empty and may be."""
    values = {name: value for name, value in row(**changes).items() if value != ""}
    return Row(**values)


def rows_of(costs, criterion="swe", scope="tensor", seeds=(0, 1, 2), scatter=0.001, **changes):
    """Rows whose fine-tuned loss is the control's plus a cost per sparsity, scattered by seed."""
    return [
        cell(**{
            "seed": seed, "criterion": criterion, "scope": scope, "sparsity": sparsity,
            "sparsity_prunable": sparsity, "dense_loss": 2.03 + 0.1 * seed,
            "control_loss": 2.0 + 0.1 * seed,
            "pruned_loss": 2.5 + 0.1 * seed + 10 * abs(cost),
            "finetuned_loss": 2.0 + 0.1 * seed + cost + scatter * (seed - 1),
            **changes,
        })
        for seed in seeds
        for sparsity, cost in costs.items()
    ]  # fmt: skip


def losses(criterion, sparsity, rng):
    """Pruned loss over dense and fine-tuned loss over control, of plausible shape."""
    quality = QUALITY.get(criterion, 1.5)
    before = 0.9 * quality * math.expm1(2.6 * sparsity**2.2) * (1 + rng.gauss(0, 0.02))
    after = quality * (0.3 * max(sparsity - 0.55, 0) ** 1.5 + 0.25 * sparsity**14) - 0.004
    return before, after + rng.gauss(0, 0.002)


def cells(seeds, std_seeds, criteria, std_criteria):
    """Every (seed, scope or "rate", criterion, level, achieved) of the study."""
    for seed in std_seeds:
        for name in std_criteria:
            for rate, achieved in RATES.items():
                lift = 0.02 if name == "magnitude" else 0.0
                yield seed, "rate", name, rate, achieved - lift + 0.001 * seed
    for seed in seeds:
        for scope in ("tensor", "global"):
            for name in criteria:
                for sparsity in SPARSITIES:
                    yield seed, scope, name, sparsity, sparsity


def make(
    root,
    seeds=(0, 1, 2),
    std_seeds=(0, 1),
    criteria=("swe", "magnitude", "random"),
    std_criteria=("swe", "swe_spread", "magnitude"),
    finetuned=True,
    details=True,
):
    """Writes a working directory and returns its path."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    base = {seed: 3.412 + rng.gauss(0, 0.008) for seed in sorted({*seeds, *std_seeds})}
    _write_json(root / "config.json", _config(seeds, std_seeds, criteria, std_criteria))
    rows = []
    for seed, group, name, level, achieved in cells(seeds, std_seeds, criteria, std_criteria):
        before, after = losses(name, achieved, rng)
        removed = round(achieved * PRUNABLE)
        asked = {"rate": level} if group == "rate" else {"sparsity": level, "scope": group}
        one = row(
            seed=seed, criterion=name, **asked,
            sparsity_prunable=removed / PRUNABLE, sparsity_total=removed / PARAMS,
            nonzero_params=PARAMS - removed, dense_loss=base[seed],
            control_loss=base[seed] - 0.031 if finetuned else "",
            pruned_loss=base[seed] + before,
            finetuned_loss=base[seed] - 0.031 + after if finetuned else "",
            steps=500 if finetuned else 0, seconds=61.5,
        )  # fmt: skip
        rows.append(one)
        if details:
            _detail(root, one, rng)
    write_rows(root, rows)
    for seed in base:
        _dense(root / f"seed_{seed}", base[seed], rng, details)
    return root


def write_rows(root, rows):
    """Writes results.csv."""
    Path(root).mkdir(parents=True, exist_ok=True)
    with (Path(root) / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return Path(root)


def _write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _config(seeds, std_seeds, criteria, std_criteria):
    study = {
        "std_criteria": list(std_criteria), "std_rates": list(RATES), "std_seeds": list(std_seeds),
        "criteria": list(criteria), "sparsities": list(SPARSITIES), "scopes": ["tensor", "global"],
        "seeds": list(seeds),
    }  # fmt: skip
    phase = {"steps": 5000, "learning_rate": 1e-3, "warmup": 100, "weight_decay": 0.1}
    config = {
        "name": "shakespeare",
        "model": {"layers": 6, "heads": 6, "width": 384, "context": 256, "vocab_size": None},
        "data": {"dataset": "shakespeare_plays", "batch": 64, "eval_windows": 256},
        "train": phase, "finetune": {**phase, "steps": 500},
        "trajectory": {"measures": ["late_mean"], "every": "5%", "power": 0.5},
        "prune": {"include": None, "values_from": "final"}, "study": study, "log_every": 10,
    }  # fmt: skip
    return {"fingerprint": "9f2c41d07be6aa35c0ffee", "config": config}


def _tensor_share(one, index, rng):
    """Sparsity of a tensor: even per tensor, uneven globally and by the paper's rule."""
    share = one["sparsity_prunable"]
    if (one["rate"] == "" and one["scope"] == "tensor") or one["criterion"] == "random":
        return share
    depth = (index // len(KINDS)) / 5 - 0.5
    return min(0.99, max(0.01, share + 0.12 * depth + rng.gauss(0, 0.03)))


def _detail(root, one, rng):
    tensors = {}
    for index, name in enumerate(TENSORS):
        kept = round(SIZE * (1 - _tensor_share(one, index, rng)))
        tensors[name] = {"kept": kept, "total": SIZE}
    edges = [-0.3 + 0.6 * i / 80 for i in range(81)]
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    bell = [math.exp(-((x / 0.05) ** 2) / 2) for x in centres]
    dense = [round(PRUNABLE * b / sum(bell)) for b in bell]
    if one["criterion"] == "random":
        pruned = [round(n * (1 - one["sparsity_prunable"])) for n in dense]
    else:
        cut = 0.05 * one["sparsity_prunable"] * 1.4
        pruned = [round(n / (1 + math.exp(-(abs(x) - cut) / 0.006)))
                  for n, x in zip(dense, centres, strict=True)]  # fmt: skip
    tuned = [round((a + 2 * b + c) / 4) for a, b, c in
             zip([0, *pruned[:-1]], pruned, [*pruned[1:], 0], strict=True)]  # fmt: skip
    name = f"{one['scope']}-{one['criterion']}-{one['sparsity']}-{one['rate']}"
    result = {
        **one, "tensors": tensors,
        "histogram": {"edges": edges, "dense": dense, "pruned": pruned,
                      "finetuned": tuned if one["finetuned_loss"] != "" else []},
        "sample_kept": {t: [abs(v) > 0.045 for v in _ends(t)] for t in TENSORS[::5]},
    }  # fmt: skip
    _write_json(root / f"seed_{one['seed']}" / "cells" / name / "result.json", result)


def _ends(tensor):
    rng = random.Random(tensor)
    return [rng.gauss(0, 0.06) for _ in range(SAMPLE)]


def _dense(folder, loss, rng, details):
    _write_json(
        folder / "dense" / "result.json",
        {"dense_loss": loss, "seconds": 900.0, "params": PARAMS, "prunable": PRUNABLE},
    )
    if not details:
        return
    lines = []
    for step in range(10, 5001, 10):
        falling = loss + 4.5 * math.exp(-step / 450)
        lines.append({"step": step, "loss": falling - 0.08 + rng.gauss(0, 0.05)})
        if step % 500 == 0:
            lines.append({"step": step, "validation_loss": falling})
    (folder / "dense" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    lines = []
    for step in range(0, 5001, 250):
        share = 1 - math.exp(-step / 1200)
        values = {
            name: [0.02 * math.sin(7 * v * 100) * (1 - share) + v * share
                   + random.Random(f"{step}{v}").gauss(0, 0.004) for v in _ends(name)]
            for name in TENSORS[::5]
        }  # fmt: skip
        lines.append({"step": step, "values": values})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "dense" / "trajectory.jsonl").write_text(text)
