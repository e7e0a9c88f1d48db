"""The seed papers' other systems on the demo's model, each beside what could embarrass it.

    python benchmarks/related.py all --out=tables      all of these, each in its JSON file
    python benchmarks/related.py trawl                 stacked weights at low rank, written back
    python benchmarks/related.py trawl-smollm2         the same on SmolLM2
    python benchmarks/related.py trawl-times           an MLP in its factors, timed
    python benchmarks/related.py ssprop --seeds 0 1 2  back-propagation through a part
    python benchmarks/related.py digits                the same on a small CNN
    python benchmarks/related.py dsmoe                 MLPs in blocks that tokens switch on and off
    python benchmarks/related.py retrikt               a teacher's store for a pruned student
    python benchmarks/related.py reasoning             a reward for short right answers
    python benchmarks/related.py ling                  fine-grained experts with a shared one
    python benchmarks/related.py ecomls                switching between cuts of SmolLM2

The settings of the models are `configs/sweeps/related.py`, those of EcoMLS `configs/ecomls.py`.
Dense models are trained in `--workdir` first, or found there. ssProp trains from scratch with the
same data, order and steps; operations, time and energy of a step are multiples of a dense step's.
The others are described in their files here.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from accounts import accounted
from etils import epath
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
import trawl
from fitting import cost, operations, quartiles, shown

from swe_prune import study
from swe_prune.bounds import COUNT, SEED
from swe_prune.config import Config, load, read
from swe_prune.errors import InputError, writing
from swe_prune.related import ssprop
from swe_prune.study.workdir import config_of
from swe_prune.training import step as step_lib
from swe_prune.training.progress import Progress

CONFIGS = Path(__file__).parents[1] / "configs"
SYSTEMS = (
    "trawl",
    "trawl-smollm2",
    "trawl-times",
    "ssprop",
    "digits",
    "dsmoe",
    "retrikt",
    "reasoning",
    "ling",
    "ecomls",
)


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
    options = parser.parse_args()
    for seed in options.seeds:
        SEED.check(seed, "--seeds")
    if len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"--seeds must be different, got {options.seeds}")
    for name in ("steps", "windows", "more"):
        COUNT.check(getattr(options, name), f"--{name}")
    if options.out is not None:  # now rather than after hours
        with writing(f"--out {options.out}", "choose another folder"):
            options.out.mkdir(parents=True, exist_ok=True)
    return options


def demo(options: argparse.Namespace) -> Config:
    """Returns the config of the models with these seeds and steps."""
    config = load(str(CONFIGS / "sweeps" / "related.py"), [])
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=options.steps),
        data=dataclasses.replace(config.data, eval_windows=options.windows),
        study=dataclasses.replace(config.study, seeds=tuple(options.seeds)),
    )


def claim(config: Config, folder: Path) -> contextlib.AbstractContextManager[None]:
    """Returns the hold on a folder of dense models, whose seeds may be others.

    Raises:
        InputError: If another config made it, or another run uses it.
    """
    place = study.Workdir(epath.Path(folder))
    if folder.exists() and any(folder.iterdir()):
        seeds = config_of(place.path).study.seeds
        config = dataclasses.replace(config, study=dataclasses.replace(config.study, seeds=seeds))
    return study.claim(place, config)


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
    start, size = functools.partial(untracked, experiment, seeds[0]), experiment.config.data.batch
    for name, schedule in SCHEDULES.items():
        states = {share: start() for share in (1.0, schedule(1))}

        def once(share: float, states: Any = states) -> None:
            states[share], metrics = steps[share](states[share], batch)
            jax.block_until_ready(metrics)

        counted = [operations(steps[share], start(), batch) for share in (schedule(1), 1.0)]
        measured = {"operations": counted[0] / counted[1], **cost(once, schedule(1), size)}
        for row in rows:
            if row["schedule"] == name:
                row |= measured
    return rows


def untracked(experiment: Any, seed: int) -> Any:
    """Returns the dense phase's first state without statistics."""
    return dataclasses.replace(experiment.fresh_state(seed), stats=None)


def ssprop_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows of ssProp as a table."""
    table = Table("schedule", "loss", "seeds", "operations", "step time")
    table.add_column(f"energy ({rows[0]['source']})")
    for name in SCHEDULES:
        own = [row for row in rows if row["schedule"] == name]
        losses = [row["loss"] for row in own]
        ratios = [quartiles(own[0][what]) for what in ("time", "energy")]
        count = f"{own[0]['operations']:.3f}"
        table.add_row(name, shown(losses), str(len(losses)), count, *ratios)
    return table


def found_by(system: str, experiment: Any, options: argparse.Namespace) -> tuple[Any, list[Table]]:
    """Returns what a system gives, and its tables."""
    seeds, say = options.seeds, Progress().say
    if system == "ecomls":
        found = ecomls.run(read(options.config), say)
        return found, [ecomls.table(found)]
    if system == "trawl-times":
        rows = trawl.times(say)
        return rows, [trawl.timed(rows)]
    if system == "trawl-smollm2":
        rows = trawl.run_pretrained(say)
        return rows, [trawl.table(rows)]
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
        rows = trawl.run(experiment, seeds, say)
        return rows, [trawl.table(rows)]
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
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        config, folder = demo(options), options.workdir or Path(temporary) / "demo"
        experiment = study.setup(config, folder)
        stack.enter_context(claim(config, folder))
        for system in SYSTEMS if options.system == "all" else (options.system,):
            begun = time.perf_counter()
            found, tables = found_by(system, experiment, options)
            console.print(*tables, f"{system}: {time.perf_counter() - begun:.0f} s", sep="\n")
            if options.out is not None:
                (options.out / f"{system}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    accounted(main)
