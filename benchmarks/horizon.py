"""When to look back along a weight's trajectory and when ahead, by how the model was trained.

    python benchmarks/horizon.py --workdir=runs/horizon
    python benchmarks/horizon.py --workdir=runs/horizon --steps 400 1600 6400 --schedules cosine

The demo's model, trained for each number of steps by each schedule: a cosine to zero, a constant
rate, or a constant one that decays to zero over the last fifth. `forecast_curvature` scores it,
(w + h (w − late mean))² √v: h = −1 is `swe_curvature`, 0 `magnitude_curvature`. The late mean is
that of all twenty snapshots, of the last half, or of the last quarter. Every score is ranked over
all tensors, at one sparsity. "before" is the increase of the validation loss straight after
pruning; "after" the difference to the control after the demo's fine-tuning. What is in the working
directory is not computed again; `--shard=0/2` and `--shard=1/2` share it between two processes.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accounts import accounted
from etils import epath
from rich.console import Console
from rich.table import Table

from swe_prune import config, importance, masks, study, trajectory, tree
from swe_prune.study.finetune_phase import FINETUNE_SEED_OFFSET
from swe_prune.study.saved import load_dense
from swe_prune.training.progress import Progress

CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare_char.py"
HORIZONS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0)
WINDOWS = {"all": 1, "half": 11, "quarter": 16}
"""First of the twenty snapshots that count."""

SCHEDULES = {
    "cosine": {"final_learning_rate": 0.0},
    "constant": {"final_learning_rate": 3e-3},
    "decay at the end": {"final_learning_rate": 0.0, "decay_from": 0.8},
}
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 1600, 6400])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--shard", default="0/1", help="share of the models that is made, i/n")
    return parser.parse_args()


def made(options: argparse.Namespace, schedule: str, steps: int, seed: int) -> study.Experiment:
    """Returns the experiment of one dense model, trained."""
    settings = config.load(CONFIG)
    train = dataclasses.replace(
        settings.train, steps=steps, keep_every="5%", checkpoint_every="5%", eval_every=0,
        **SCHEDULES[schedule],
    )  # fmt: skip
    grid = dataclasses.replace(
        settings.study, std_criteria=(), criteria=("forecast_curvature",), seeds=(seed,),
        sparsities=(options.sparsity,),
    )  # fmt: skip
    settings = dataclasses.replace(settings, train=train, study=grid)
    path = options.workdir / f"{schedule.replace(' ', '_')}_{steps}_{seed}"
    experiment = study.setup(settings, epath.Path(path))
    with study.claim(experiment.workdir, settings):
        study.train(experiment, Progress())
    return experiment


def tracked(experiment: study.Experiment, seed: int, first: int) -> trajectory.TrajectoryStats:
    """Returns the late mean of the snapshots from number `first` on, at the end of training."""
    stats: Any = None
    for number in range(first, 21):
        params = load_dense(experiment, seed, number * experiment.track_every).params
        if stats is None:
            stats = trajectory.init(params, ("late_mean",), experiment.prunable)
        stats = jax.jit(trajectory.update)(stats, params)
    return stats


def signs(state: Any, mean: Any, prunable: Any) -> dict[str, float]:
    """Returns what the state says of whether the weights still move, over all prunable weights.

    Returns:
        "drift": root mean square of w − late mean over that of w; "agreement": cosine of w − late
        mean and the step that Adam takes next; "signal": root mean square of m / √v of Adam.
    """
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )  # fmt: skip
    chosen = [
        (w, m, mu, nu)
        for (_, w), (_, m), (_, mu), (_, nu), (_, use) in zip(
            *map(tree.named_leaves, (state.params, mean, adam.mu, adam.nu, prunable)), strict=True
        )
        if use
    ]
    w, m, mu, nu = (np.concatenate([np.ravel(x[at]) for x in chosen]) for at in range(4))
    step, moved = -mu / (np.sqrt(nu) + 1e-8), w - m
    return {
        "drift": float(np.sqrt(np.mean(moved**2) / np.mean(w**2))),
        "agreement": float(step @ moved / np.linalg.norm(step) / np.linalg.norm(moved)),
        "signal": float(np.sqrt(np.mean(step**2))),
    }


def recovering(experiment: study.Experiment, seed: int) -> Callable[[Any, Any], float]:
    """Returns the function of weights and masks to the loss after the study's fine-tuning."""
    (tuning,) = experiment.tunings.values()

    def recovered(params: Any, mask: Any) -> float:
        state = experiment.tuning_state(tuning, params, seed, mask)
        batches = experiment.batches(seed + FINETUNE_SEED_OFFSET)
        for _ in range(tuning.steps):
            state, _ = tuning.step(state, next(batches))
        return experiment.validation_loss(state.params)

    return recovered


def rows_of(experiment: study.Experiment, seed: int, sparsity: float) -> Iterator[Row]:
    """Yields the losses of each criterion of one dense model."""
    state = load_dense(experiment, seed)
    recovered = recovering(experiment, seed)
    dense, control = experiment.validation_loss(state.params), recovered(state.params, None)
    stats = {name: tracked(experiment, seed, first) for name, first in WINDOWS.items()}
    mean = trajectory.read(stats["all"], "late_mean")
    yield {"criterion": "dense", "dense": dense, "control": control,
           **signs(state, mean, experiment.prunable)}  # fmt: skip
    tried: list[tuple[str, str, dict[str, Any]]] = [
        ("forecast_curvature", window, {"horizon": horizon})
        for window, horizon in itertools.product(WINDOWS, HORIZONS)
        if horizon or window == "all"
    ]
    tried += [("magnitude", "all", {}), ("swe", "all", {})]
    for criterion, window, given in tried:
        scores = importance.score(
            criterion, state.params, opt_state=state.opt_state, prunable=experiment.prunable,
            stats=stats[window], **given,
        )  # fmt: skip
        mask = masks.by_sparsity(scores, sparsity, "global")
        pruned = masks.apply(state.params, mask)
        row = {"criterion": criterion, "window": window, **given}
        row["before"] = experiment.validation_loss(pruned) - dense
        if window == "all":
            row["after"] = recovered(pruned, mask) - control
        yield row


def main() -> None:
    """Trains, prunes and recovers what is missing, and prints the tables."""
    options = parse()
    shard = study.parse(options.shard)
    settings = list(itertools.product(options.schedules, options.steps, options.seeds))
    everything: dict[tuple[str, int, int], list[Row]] = {}
    # The longest first, so that two processes end at about the same time.
    order = sorted(settings, key=lambda one: -one[1])
    own = shard.part(order)
    for schedule, steps, seed in order:
        name = f"{schedule.replace(' ', '_')}_{steps}_{seed}_{options.sparsity:g}.json"
        file = options.workdir / name
        if not file.exists() and (schedule, steps, seed) in own:
            experiment = made(options, schedule, steps, seed)
            rows = list(rows_of(experiment, seed, options.sparsity))
            part_of = file.with_suffix(".part")
            part_of.write_text(json.dumps(rows, indent=1))
            part_of.replace(file)
        if file.exists():
            everything[schedule, steps, seed] = json.loads(file.read_text())
    show(everything, options)


def show(everything: dict[tuple[str, int, int], list[Row]], options: argparse.Namespace) -> None:
    """Prints a table before and one after fine-tuning, medians over the seeds."""
    columns = [*(f"{h:g}" for h in HORIZONS), "magnitude", "swe"]
    for when in ("before", "after"):
        table = Table(title=f"{when} fine-tuning, {options.sparsity:.0%} removed, medians")
        for head in ("schedule", "steps", "window", *columns):
            table.add_column(head, justify="right")
        for schedule, steps in itertools.product(options.schedules, options.steps):
            found = [everything[s] for s in everything if s[:2] == (schedule, steps)]
            for window in WINDOWS if when == "before" else ["all"]:
                cells = [_median(found, column, window, when) for column in columns]
                table.add_row(schedule, str(steps), window, *cells)
        Console(width=150).print(table)
    table = Table(title="the dense models, medians")
    keys = ("dense", "control", "drift", "agreement", "signal")
    for head in ("schedule", "steps", *keys):
        table.add_column(head, justify="right")
    for schedule, steps in itertools.product(options.schedules, options.steps):
        found = [everything[s][0] for s in everything if s[:2] == (schedule, steps)]
        cells = [f"{statistics.median(one[key] for one in found):.4f}" for key in keys if found]
        table.add_row(schedule, str(steps), *cells)
    Console(width=150).print(table)


def _median(found: list[list[Row]], column: str, window: str, when: str) -> str:
    named = column in ("magnitude", "swe")
    values = [
        row[when]
        for rows in found
        for row in rows[1:]
        if (row["criterion"] == column if named else row.get("horizon") == float(column))
        and row["window"] == (window if named or float(column) else "all")
    ]
    return f"{statistics.median(values):+.4f}" if values else ""


if __name__ == "__main__":
    accounted(main)
