"""A stand-in for RetriKT on the demo's model; `benchmarks/related.py retrikt` runs it.

The student is the demo's model with 90 % of its weights removed and recovered
(`configs/sweeps/related.py`), the teacher the dense one. Neighbors, temperature and share are
chosen on one part of the validation windows and reported on another. The baselines: the student
after as many steps of distillation as the largest store has batches, and the teacher itself.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fitting import shown
from rich.table import Table

from swe_prune import data, study, tree
from swe_prune.related import retrikt
from swe_prune.study.saved import load_dense, load_finetuned, load_masks
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.distillation import Distillation
from swe_prune.training.losses import cross_entropy
from swe_prune.training.progress import Progress
from swe_prune.training.state import Frozen

SIZES = (1024, 4096, 16384, 65536)
NEIGHBORS = (32,)
TEMPERATURES = (2.0, 8.0, 32.0)
LAMBDAS = (0.1, 0.2, 0.4, 0.6)
KINDS = {
    "student's keys, teacher's distributions": ("student", "teacher"),
    "student's keys, tokens of the text": ("student", "text"),
    "teacher's keys, teacher's distributions": ("teacher", "teacher"),
}
CRITERIA = ("magnitude", "forecast_curvature")


def run(experiment: Any, seeds: list[int], say: Callable[[str], None]) -> Any:
    """Returns the loss of students with and without a store, by seed."""
    progress = Progress()
    study.prune(experiment, progress)
    study.finetune(experiment, progress)
    rows: list[dict[str, Any]] = []
    for cell in experiment.cells:
        if cell.seed in seeds and cell.recipe.name in CRITERIA:
            for row in of_student(experiment, cell):
                rows.append({"seed": cell.seed, "criterion": cell.recipe.name, **row})
                say(f"{cell.name}, seed {cell.seed}, {row['way']}: {row['loss']:.4f}")
    return {"rows": rows}


def of_student(experiment: Any, cell: Any) -> Any:
    """Yields the rows of one student."""
    params = {
        "student": load_finetuned(experiment, cell),
        "teacher": load_dense(experiment, cell.seed).params,
    }
    text = passes(experiment, params, stored(experiment, cell.seed))
    selecting, reporting = experiment.validation[:1], experiment.validation[1:3]
    select, report = (passes(experiment, params, part) for part in (selecting, reporting))
    weights = {name: tree.size(one) * 4 for name, one in params.items()}
    for name in params:
        loss = of(report["logits", name], report["targets"])
        yield {"way": name, "size": 0, "bytes": weights[name], "loss": loss}
    student = distilled(experiment, cell, params)
    more = passes(experiment, {"student": student}, reporting)
    loss = of(more["logits", "student"], more["targets"])
    yield {"way": "student, distilled", "size": 0, "bytes": weights["student"], "loss": loss}
    for (way, (keys, values)), size in itertools.product(KINDS.items(), SIZES):
        given = jax.nn.softmax(text["logits", values]) if values != "text" else text["targets"]
        made = retrikt.store(text["states", keys][:size], given[:size], experiment.model.vocab_size)
        yield {"way": way, "size": size, "bytes": made.bytes, **chosen(made, select, report)}


def chosen(made: retrikt.Store, select: Any, report: Any) -> dict[str, float]:
    """Returns the settings that are best where they are chosen, and their loss elsewhere."""

    def loss(part: Any, k: int, temperature: float, shares: tuple[float, ...]) -> list[float]:
        found = retrikt.retrieved(made, part["states", "student"], k=k, temperature=temperature)
        return [
            of(retrikt.interpolated(part["logits", "student"], found, share), part["targets"])
            for share in shares
        ]

    tried = {
        (k, temperature, share): value
        for k, temperature in itertools.product(NEIGHBORS, TEMPERATURES)
        for share, value in zip(LAMBDAS, loss(select, k, temperature, LAMBDAS), strict=True)
    }
    k, temperature, share = min(tried, key=tried.__getitem__)
    (found,) = loss(report, k, temperature, (share,))
    return {"k": k, "temperature": temperature, "share": share, "loss": found}


def stored(experiment: Any, seed: int) -> list[Any]:
    """Returns windows of the training text with as many positions as the largest store."""
    context, batch = experiment.config.window, experiment.config.data.eval_batch
    windows = SIZES[-1] // context
    return data.random_batches(
        experiment.data.train, context=context, windows=windows, batch=batch, seed=1000 + seed
    )


def passes(experiment: Any, params: dict[str, Any], batches: list[Any]) -> dict[Any, Any]:
    """Returns states and logits of each model at every position, and the next tokens."""
    read = jax.jit(lambda params, tokens: retrikt.states(experiment.model, params, tokens))
    found: dict[Any, Any] = {}
    for name, one in params.items():
        parts = [read(one, jnp.asarray(batch["inputs"])) for batch in batches]
        found["states", name], found["logits", name] = map(
            jnp.concatenate, zip(*parts, strict=True)
        )
    found["targets"] = jnp.concatenate([jnp.ravel(batch["targets"]) for batch in batches])
    return found


def of(logits: Any, targets: Any) -> float:
    """Returns the mean loss in nats per token."""
    return float(np.mean(np.float64(cross_entropy(logits[None], targets[None]))))


def distilled(experiment: Any, cell: Any, params: dict[str, Any]) -> Any:
    """Returns the student after distillation on as many tokens as the largest store has."""
    steps = SIZES[-1] // (experiment.config.data.batch * experiment.config.window)
    phase = dataclasses.replace(experiment.config.finetune, steps=steps)
    optimizer = optimizer_lib.build(phase, steps)
    masks = load_masks(experiment, cell)
    state = state_lib.create(
        jax.tree.map(jnp.copy, params["student"]), optimizer, cell.seed, masks=masks
    )
    step = step_lib.compile_train_step(
        experiment.model, optimizer, distillation=Distillation(weight=0.5)
    )
    batches = experiment.batches(1000 + cell.seed)
    for _ in range(steps):
        state, _ = step(state, next(batches), Frozen(teacher=params["teacher"]))
    return state.params


def tables(found: dict[str, Any]) -> list[Table]:
    """Returns the losses as a table, with the memory of what gives them."""
    table = Table("student by", "way", "entries", "MB", "loss", "λ", "k", "seeds")
    keys = dict.fromkeys((row["criterion"], row["way"], row["size"]) for row in found["rows"])
    for key in keys:
        own = [r for r in found["rows"] if (r["criterion"], r["way"], r["size"]) == key]
        criterion, way, size = key
        table.add_row(
            criterion,
            way,
            f"{size:,}" if size else "",
            f"{own[0]['bytes'] / 1e6:.2f}",
            shown([row["loss"] for row in own]),
            *("" if not size else ranged([row[name] for row in own]) for name in ("share", "k")),
            str(len(own)),
        )
    return [table]


def ranged(values: list[float]) -> str:
    """Returns the median."""
    return f"{statistics.median_low(values):g}"
