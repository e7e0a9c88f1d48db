"""The seed papers' other systems on the demo's model, each beside what could embarrass it.

    python benchmarks/related.py all --out=tables      all of these, each in its JSON file
    python benchmarks/related.py trawl                 stacked weights at low rank, written back
    python benchmarks/related.py ssprop --seeds 0 1 2  back-propagation through a part
    python benchmarks/related.py digits                the same on a small CNN
    python benchmarks/related.py dsmoe                 MLPs in blocks that tokens switch on and off
    python benchmarks/related.py retrikt               a teacher's store for a pruned student
    python benchmarks/related.py reasoning             a reward for short right answers
    python benchmarks/related.py ling                  fine-grained experts with a shared one
    python benchmarks/related.py ecomls                switching between cuts of SmolLM2

The settings of the models are `configs/sweeps/related.py`, those of EcoMLS `configs/ecomls.py`.
Dense models are trained in `--workdir` first, or found there. TRAWL's best layer, rank and method
are chosen on a fifth of the validation windows and reported on the others; "noise" is a random
change of the same kernels by the same norm. ssProp trains from scratch with the same data, order
and steps; its step time is measured in turns. The others are described in their files here.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from accounts import accounted
from flax import linen as nn
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

import digits
import dsmoe
import ecomls
import ling
import reasoning
import retrikt
from fitting import quartiles, shown
from timing import compare

from swe_prune import study
from swe_prune.config import Config, load, read
from swe_prune.evaluation import mean_loss
from swe_prune.related import ssprop, trawl
from swe_prune.study.saved import load_dense
from swe_prune.training import step as step_lib
from swe_prune.training.progress import Progress

CONFIGS = Path(__file__).parents[1] / "configs"
SYSTEMS = ("trawl", "ssprop", "digits", "dsmoe", "retrikt", "reasoning", "ling", "ecomls")
RANKS = (4, 8, 16, 32, 48, 64, 80, 90)


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=(*SYSTEMS, "all"))
    parser.add_argument("--config", default=str(CONFIGS / "ecomls.py"), help="config of ecomls")
    parser.add_argument(
        "--workdir", type=Path, help="folder of the dense models; default: a new one"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--windows", type=int, default=256, help="validation windows")
    parser.add_argument("--more", type=int, default=200, help="further steps of dsmoe")
    parser.add_argument(
        "--work", choices=("sums", "filler"), default="sums", help="tokens before an answer"
    )
    parser.add_argument("--models", nargs="+", help="models of ling; default: all")
    parser.add_argument("--out", type=Path, help="folder of JSON files with all the numbers")
    return parser.parse_args()


def demo(options: argparse.Namespace) -> Config:
    """Returns the config of the models with these seeds and steps."""
    config = load(str(CONFIGS / "sweeps" / "related.py"), [])
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=options.steps),
        data=dataclasses.replace(config.data, eval_windows=options.windows),
        study=dataclasses.replace(config.study, seeds=tuple(options.seeds)),
    )


def run_trawl(experiment: Any, seeds: list[int]) -> list[dict[str, Any]]:
    """Returns, by seed and method, what the best by the selecting windows does on the others."""
    batches = experiment.validation
    fifth = max(1, len(batches) // 5)
    select, report = (
        functools.partial(mean_loss, experiment.eval_step, batches=part)
        for part in (batches[:fifth], batches[fifth:])
    )
    rows = []
    for seed in seeds:
        params = load_dense(experiment, seed).params
        layers = experiment.config.model.layers
        stacks = trawl.stacks_of(params, layers)
        ranks = [rank for rank in RANKS if rank <= experiment.config.model.width]
        tried = list(trawl.search(params, stacks, ranks, select))
        dense = {"seed": seed, "dense_select": select(params), "dense": report(params)}
        for method in trawl.METHODS:
            best = min((one for one in tried if one.method == method), key=lambda one: one.loss)
            stack = stacks[best.stack]
            tensor = trawl.stacked(params, stack)
            near = trawl.METHODS[method](tensor, best.rank)
            row = dense | best._asdict()
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


@dataclasses.dataclass(frozen=True)
class SparselyTrained:
    """A Linen model whose layers back-propagate through a part of their channels.

    Attributes:
        model: Model.
        keep: Share of the output channels.
    """

    model: nn.Module
    keep: float

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the model."""
        with nn.intercept_methods(ssprop.interceptor(self.keep)):
            return self.model.apply(*args, **kwargs)


SCHEDULES = {
    "dense": ssprop.Schedule(1.0),
    "keep 0.2, every other step": ssprop.Schedule(0.2, length=10**9, interleaved=True),
    "keep 0.6": ssprop.Schedule(0.6),
    "keep 0.2": ssprop.Schedule(0.2),
}


def run_ssprop(experiment: Any, seeds: list[int], say: Any) -> list[dict[str, Any]]:
    """Returns the validation loss by schedule and seed, and the time of a step."""
    steps = {}
    for schedule in SCHEDULES.values():
        for keep in {schedule(0), schedule(1)} - set(steps):
            model: Any = SparselyTrained(experiment.model, keep)
            steps[keep] = step_lib.compile_train_step(model, experiment.optimizer)
    rows: list[dict[str, Any]] = []
    for name, schedule in SCHEDULES.items():
        for seed in seeds:
            state, batches = untracked(experiment, seed), experiment.batches(seed)
            for number in range(experiment.train_steps):
                state, _ = steps[schedule(number)](state, next(batches))
            loss = experiment.validation_loss(state.params)
            rows.append({"schedule": name, "seed": seed, "loss": loss})
            say(f"{name}, seed {seed}: {loss:.4f}")
    batch = next(experiment.batches(seeds[0]))
    for name, schedule in SCHEDULES.items():
        keep = schedule(1)
        kept = {share: [untracked(experiment, seeds[0])] for share in (1.0, keep)}

        def once(share: float, kept: Any = kept) -> None:
            kept[share][0], metrics = steps[share](kept[share][0], batch)
            jax.block_until_ready(metrics)

        timed = compare(
            functools.partial(once, keep), functools.partial(once, 1.0), repetitions=9, calls=10
        )
        for row in rows:
            if row["schedule"] == name:
                row["sparse_step"] = [1 / ratio for ratio in timed.speedups]
    return rows


def untracked(experiment: Any, seed: int) -> Any:
    """Returns the dense phase's first state without statistics."""
    return dataclasses.replace(experiment.fresh_state(seed), stats=None)


def trawl_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows of TRAWL as a table."""
    head = ("seed", "method", "best stack", "rank", "error", "dense", "selecting part")
    head += ("other part", "noise of this size")
    table = Table(*head, title="change of the loss, nats per token")
    for row in rows:
        noise = [loss - row["dense"] for loss in row["noise"]]
        table.add_row(
            str(row["seed"]),
            row["method"],
            row["stack"],
            str(row["rank"]),
            f"{row['error']:.3f}",
            f"{row['dense']:.4f}",
            f"{row['loss'] - row['dense_select']:+.4f}",
            f"{row['report'] - row['dense']:+.4f}",
            f"{statistics.fmean(noise):+.4f} ({min(noise):+.4f} to {max(noise):+.4f})",
        )
    return table


def ssprop_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows of ssProp as a table."""
    table = Table("schedule", "loss", "seeds", "time of a sparse step / dense step")
    for name in SCHEDULES:
        own = [row for row in rows if row["schedule"] == name]
        losses = [row["loss"] for row in own]
        table.add_row(name, shown(losses), str(len(losses)), quartiles(own[0]["sparse_step"]))
    return table


def found_by(system: str, experiment: Any, options: argparse.Namespace) -> tuple[Any, list[Table]]:
    """Returns what a system gives, and its tables."""
    seeds, say = options.seeds, Progress().say
    if system == "ecomls":
        found = ecomls.run(read(options.config), say)
        return found, [ecomls.table(found)]
    if system == "digits":
        found = digits.run(seeds, say)
        return found, [digits.table(found)]
    if system == "reasoning":
        found = reasoning.run(seeds, options.work, say)
        return found, reasoning.tables(found)
    if system == "ssprop":
        rows = run_ssprop(experiment, seeds, say)
        return rows, [ssprop_table(rows)]
    if system == "ling":
        found = ling.run(experiment, seeds, options.models, say)
        return found, ling.tables(found)
    study.train(experiment, Progress())
    if system == "trawl":
        rows = run_trawl(experiment, seeds)
        return rows, [trawl_table(rows)]
    if system == "dsmoe":
        found = dsmoe.run(experiment, seeds, options.more, say)
        return found, dsmoe.tables(found)
    found = retrikt.run(experiment, seeds, say)
    return found, retrikt.tables(found)


def main() -> None:
    """Runs the systems, and prints their tables."""
    options = parse()
    console = Console(width=120)
    console.print(f"{platform.machine()}, {os.cpu_count()} processors, jax {jax.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        experiment = study.setup(demo(options), options.workdir or Path(temporary) / "demo")
        for system in SYSTEMS if options.system == "all" else (options.system,):
            begun = time.perf_counter()
            found, tables = found_by(system, experiment, options)
            console.print(*tables, f"{system}: {time.perf_counter() - begun:.0f} s", sep="\n")
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{system}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    accounted(main)
