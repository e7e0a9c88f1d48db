"""What tracking and masks add to a train step: time, memory, and the copies that XLA inserts.

    python benchmarks/train_step.py [--seconds=80]
    python benchmarks/train_step.py --config=configs/shakespeare_char_paper.py \
        --config.model.dtype=float32 --config.data.batch=8 --seconds=300

The first is the model of the demo, the second the one of 10.7 M parameters. Steps, batches and
cadence are the config's own. The variants take turns, one step each in a round and in a new order
every time; a ratio is that of the two steps of one round. The same program as the dense step, with
a state of its own, takes part as a control: what it is away from 1 is noise.

Beside the time on the clock stands processor time, which other processes on the machine disturb
far less. Steps with and without a snapshot are timed separately and joined by

    at the cadence = ((every − 1) · between snapshots + with a snapshot) / every

With the statistics in the host's memory a step between snapshots is the dense one, so there the
control stands for it.
"""

import argparse
import dataclasses
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from accounts import accounted
from rich.console import Console
from rich.table import Table
from subjects import configured

from swe_prune import __version__, importance, masks, parallel, trajectory, tree
from swe_prune.study.experiment import Experiment, setup
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import step as step_lib
from swe_prune.training.state import TrainState

SPARSITY = 0.6
CADENCE = "tracking at the cadence"
HOST_CADENCE = "tracking in host memory at the cadence"
CONTROL = "dense again (control)"
HOST = "tracking every step in host memory"
AIMS = {CADENCE: 1.01, HOST_CADENCE: 1.01, "tracking every step": 1.10, "masks": 1.05}


@dataclasses.dataclass
class Variant:
    """A compiled step with the state that it goes on from, and what its steps took.

    Attributes:
        name: shown.
        step: compiled ahead of time; takes over the state it is given.
        state: of the next step.
        wall: seconds of each step.
        cpu: processor seconds of each step, over all threads.
    """

    name: str
    step: Any
    state: TrainState
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def take(self, batch: Any) -> None:
        """Takes one step and waits for it."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, _ = jax.block_until_ready(self.step(self.state, batch))
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def variants(experiment: Experiment, batch: Any) -> list[Variant]:
    """Returns every variant, compiled; each owns its state, which its steps donate."""
    settings = experiment.config.train
    optimizer = optimizer_lib.build(settings, experiment.train_steps)
    tracked = experiment.fresh_state(0)
    scores = importance.score("magnitude", tracked.params, prunable=experiment.prunable)
    mask = masks.by_sparsity(scores, SPARSITY)
    pruned = masks.apply(tracked.params, mask)
    dense = dataclasses.replace(tracked, stats=None)
    masked = dataclasses.replace(dense, params=pruned, masks=mask)
    dense_step = _compiled(experiment, optimizer, 1, dense, batch)

    assert tracked.stats is not None
    on_host = dataclasses.replace(_copy(dense), stats=parallel.to_host(tracked.stats))

    def variant(name: str, state: TrainState, every: int) -> Variant:
        return Variant(name, _compiled(experiment, optimizer, every, state, batch), _copy(state))

    return [
        Variant("dense", dense_step, _copy(dense)),
        Variant(CONTROL, dense_step, _copy(dense)),
        variant("between snapshots", tracked, experiment.track_every),
        variant("tracking every step", tracked, 1),
        Variant(HOST, parallel.tracking_on_host(dense_step, 1), on_host),
        variant("masks", masked, 1),
    ]


def _compiled(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    every: int,
    state: TrainState,
    batch: Any,
) -> Any:
    step = step_lib.compile_train_step(experiment.model, optimizer, every)
    return step.lower(state, batch).compile()  # type: ignore[attr-defined]  # a jitted function


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def measure(taking_turns: list[Variant], batches: Any, seconds: float) -> None:
    """Takes a step of each variant in every round until the time is spent."""
    order = np.random.default_rng(0)
    for variant in taking_turns:
        for _ in range(2):  # caches and thread pools
            variant.take(next(batches))
        variant.wall.clear()
        variant.cpu.clear()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        batch = next(batches)
        for index in order.permutation(len(taking_turns)):
            taking_turns[index].take(batch)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Step times over the dense ones of the same rounds: lower quartile, median, upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, ours: list[float], dense: list[float], where: np.ndarray) -> "Ratio":
        """Returns the ratios of the rounds that `where` marks."""
        return cls(*np.quantile((np.array(ours) / np.array(dense))[where], [0.25, 0.5, 0.75]))

    def joined(self, rare: "Ratio", every: int) -> "Ratio":
        """Returns the ratio when one of `every` steps is a rare one; the spread is the common's."""
        added = (rare.median - self.median) / every
        return Ratio(self.low + added, self.median + added, self.high + added)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(taking_turns: list[Variant], every: int) -> dict[str, tuple[Ratio, Ratio]]:
    """Returns per variant the ratios of clock time and of processor time."""
    dense, rounds = taking_turns[0], len(taking_turns[0].wall)
    steps = np.arange(1, rounds + 1) + 2  # the two of the warm-up came before
    found = {}
    for variant in taking_turns[1:]:
        where = np.ones(rounds, bool)
        if variant.name == "between snapshots" and every > 1:
            where = steps % every != 0
        wall = Ratio.of(variant.wall, dense.wall, where)
        found[variant.name] = (wall, Ratio.of(variant.cpu, dense.cpu, where))
    for name, idle, always in (
        (CADENCE, "between snapshots", "tracking every step"),
        (HOST_CADENCE, CONTROL, HOST),
    ):
        joined = [a.joined(b, every) for a, b in zip(found[idle], found[always], strict=True)]
        found[name] = (joined[0], joined[1])
    return found


def time_table(experiment: Experiment, taking_turns: list[Variant]) -> Table:
    """Returns the table of times, the aims beside the ratios."""
    settings, every = experiment.config, experiment.track_every
    tokens = settings.data.batch * settings.model.context
    found = ratios(taking_turns, every)
    table = Table(
        title="Time of a step over the dense step's: median (quartiles) of "
        f"{len(taking_turns[0].wall)} rounds; the cadence is every {every} steps"
    )
    for column in ("", "ms", "tokens/s", "clock", "processor", "aim"):
        table.add_column(column, justify="left" if not column else "right")
    for variant in taking_turns:
        seconds = float(np.median(variant.wall))
        spent = (variant.name, f"{1e3 * seconds:.1f}", f"{tokens / seconds:,.0f}")
        table.add_row(*spent, *_against_aim(variant.name, found))
    for name in (CADENCE, HOST_CADENCE):
        table.add_row(name, "", "", *_against_aim(name, found))
    return table


def _against_aim(name: str, found: dict[str, tuple[Ratio, Ratio]]) -> tuple[str, ...]:
    aim = f"≤ {AIMS[name]:.2f}" if name in AIMS else ""
    return (*map(str, found.get(name, ("", ""))), aim)


def memory_table(experiment: Experiment, taking_turns: list[Variant]) -> Table:
    """Returns what the compiled programs hold in memory, and what theory adds to the dense one."""
    params, prunable = experiment.abstract_params, experiment.prunable
    statistics = sum(trajectory.memory(params, experiment.measures, prunable).values())
    theory = {
        "dense": 0,
        "between snapshots": statistics,
        "tracking every step": statistics,
        "masks": experiment.prunable_weights(),  # a bool is a byte
    }
    table = Table(
        title="MiB by XLA's account: peak = args + outputs - donated + temp; copied in every step"
    )
    columns = "peak args outputs donated temp +args +theory copied"
    for column in ("", *columns.split()):
        table.add_column(column, justify="left" if not column else "right")
    base = taking_turns[0].step.memory_analysis().argument_size_in_bytes
    for variant in taking_turns:
        if variant.name not in theory:
            continue
        m = variant.step.memory_analysis()
        arguments, outputs = m.argument_size_in_bytes, m.output_size_in_bytes
        donated, temporary = m.alias_size_in_bytes, m.temp_size_in_bytes
        peak = arguments + outputs - donated + temporary
        added = [arguments - base, theory[variant.name], copied_bytes(variant.step.as_text())]
        cells = [peak, arguments, outputs, donated, temporary, *added]
        table.add_row(variant.name, *(f"{cell / 2**20:.2f}" for cell in cells))
    return table


def copied_bytes(text: str) -> int:
    """Returns the bytes of the arrays that a compiled program copies whole in every step.

    Only copies of the entry computation count, which run always; those in a loop run with it.
    """
    entry = text[text.index("\nENTRY ") :]
    widths = {"f32": 4, "bf16": 2, "pred": 1}
    return sum(
        widths[dtype] * math.prod(int(n) for n in shape.split(","))
        for dtype, shape in re.findall(r"= (f32|bf16|pred)\[([\d,]+)\]\S* copy\(", entry)
    )


def main() -> None:
    """Builds the config's experiment, measures, prints."""
    parser = argparse.ArgumentParser(
        description="Time, memory and copies of tracking and masks.", allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=80.0, help="of measuring")
    flags, settings = configured(parser)
    experiment = setup(settings, Path())
    batches = experiment.batches(0)
    taking_turns = variants(experiment, next(batches))
    measure(taking_turns, batches, flags.seconds)

    console = Console(width=max(Console().width, 100))  # the tables do not fit 80 columns
    total = tree.size(experiment.abstract_params)
    console.print(
        f"{settings.name}: {total:,} parameters ({experiment.prunable_weights():,} prunable), "
        f"batch {settings.data.batch} x {settings.model.context}, {settings.model.dtype}; "
        f"tracking {', '.join(experiment.measures)}; masks at sparsity {SPARSITY}"
    )
    console.print(
        f"swe_prune {__version__}, jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}, {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    console.print(time_table(experiment, taking_turns))
    console.print(memory_table(experiment, taking_turns))


if __name__ == "__main__":
    accounted(main)
