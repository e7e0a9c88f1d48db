"""Ling's layer on the demo's text, and its experts pruned; `benchmarks/related.py ling` runs it.

All models have the demo's width and depth, gated MLPs, and the same steps on the same batches. The
dense model has as many hidden units as Ling's layer has active for a token, the wide one as many as
it has in all. A share of the batches of the last rows is random symbols. Experts are then removed
from Ling's model, and what is left is trained for some steps.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fitting import compiled, shown
from flax import linen as nn
from rich.table import Table

from swe_prune import importance, structured, trajectory
from swe_prune.errors import InputError, check_choice
from swe_prune.evaluation import mean_loss
from swe_prune.models import gpt
from swe_prune.related import ling, spikes
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import step as step_lib

EXPERTS, PER_TOKEN, HIDDEN, SHARED = 16, 6, 32, 64
ACTIVE, ALL = PER_TOKEN * HIDDEN + SHARED, EXPERTS * HIDDEN + SHARED
WARMUP, DIRTY, SNAPSHOTS = 80, 0.02, 20
SPARSITIES = (0.25, 0.5)
RECOVERY = 100
DENSE, DENSE_NORMED = "dense, as many active", "dense, as many active, NormHead"


@dataclasses.dataclass(frozen=True)
class NormHead:
    """A dense model whose output head is normed.

    Attributes:
        model: Model with an untied head.
    """

    model: Any

    def init(self, *args: Any) -> Any:
        """Initializes the model."""
        return self.model.init(*args)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the model."""
        with nn.intercept_methods(ling.norm_head):
            return self.model.apply(*args, **kwargs)


def models(experiment: Any) -> Mapping[str, Any]:
    """Returns the models by name."""
    config = dataclasses.replace(
        experiment.config.model, gated=True, activation="silu", tied_head=False, hidden=HIDDEN
    )
    symbols = experiment.model.vocab_size

    def plain(hidden: int) -> Any:
        return gpt.build(dataclasses.replace(config, hidden=hidden), symbols)

    def experts(per_token: int) -> Any:
        own = dataclasses.replace(config, experts=EXPERTS, experts_per_token=per_token)
        return gpt.build(own, symbols)

    sparse = ling.Ling(experts(PER_TOKEN), SHARED)
    return {
        DENSE: plain(ACTIVE),
        "dense, as many in all": plain(ALL),
        DENSE_NORMED: NormHead(plain(ACTIVE)),
        "Ling": sparse,
        "no shared expert, two more routed": ling.Ling(experts(ACTIVE // HIDDEN), 0),
        "no losses of the routers": dataclasses.replace(sparse, balance=0.0, z=0.0),
        "no routing warm-up": sparse,
        "no NormHead": dataclasses.replace(sparse, norm_head=False),
        "random batches": sparse,
        "random batches, spikes dropped": sparse,
    }


def run(
    experiment: Any, seeds: list[int], names: list[str] | None, say: Callable[[str], None]
) -> Any:
    """Returns the loss of every model, or those of the names, and of Ling's without experts."""
    rows: list[dict[str, Any]] = []
    pruned: list[dict[str, Any]] = []
    if experiment.train_steps < SNAPSHOTS:
        raise InputError(f"--steps must be at least {SNAPSHOTS}, got {experiment.train_steps}")
    kinds = models(experiment)
    optimizer = optimizer_lib.build(experiment.config.train, experiment.train_steps)
    for name in names or ():
        check_choice(name, kinds, "--models")
    for name, model in kinds.items():
        if names and name not in names:
            continue
        step = stepper(model, optimizer, warm=isinstance(model, ling.Ling) and "warm" not in name)
        judge = judging(model)
        for seed in seeds:
            batches: Any = iter(functools.partial(next, experiment.batches(seed)), None)
            if "random" in name:
                batches = dirtied(batches, seed, experiment.model.vocab_size)
            made = fitted(model, step, batches, optimizer, experiment, seed, "spikes" in name)
            params, stats, state, skipped = made
            loss = mean_loss(judge, params, experiment.validation)
            row = {"model": name, "seed": seed, "loss": loss, "skipped": skipped}
            row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
            if isinstance(model, ling.Ling):
                loads = ling.loads(model, params, experiment.validation)
                row["uneven"] = max(one.tokens.max() / one.tokens.mean() for one in loads.values())
            rows.append(row)
            say(f"{name}, seed {seed}: {loss:.4f}")
            if name == "Ling":
                pruned += without(model, params, stats, state, experiment, seed)
    return {"rows": rows, "pruned": pruned}


def judging(model: Any) -> Callable[..., Any]:
    """Returns the compiled evaluation step."""
    return step_lib.compile_eval_step(model)


def stepper(model: Any, optimizer: Any, warm: bool) -> Any:
    """Returns the compiled step, which drops spikes if it is told to."""
    loss_of = getattr(model, "loss", None) or step_lib.loss_fn(model)

    @functools.partial(jax.jit, static_argnames="drop")
    def step(params: Any, state: Any, watch: Any, batch: Any, key: Any, number: Any, drop: bool):
        more = (jnp.minimum(number / WARMUP, 1.0), key) if warm else ()
        loss, grads = jax.value_and_grad(loss_of)(params, batch, *more)
        updates, new = optimizer.update(grads, state, params)
        watch, skip = spikes.spiked(watch, loss)
        skip = skip & drop
        scaled = jax.tree.map(lambda update: update * jnp.where(drop, watch.rate, 1), updates)
        kept = (optax.apply_updates(params, scaled), new)
        kept = jax.tree.map(lambda a, b: jnp.where(skip, b, a), kept, (params, state))
        return *kept, watch, skip

    return step


def fitted(
    model: Any, step: Any, batches: Any, optimizer: Any, experiment: Any, seed: int, drop: bool
) -> tuple[Any, Any, Any, int]:
    """Returns parameters, trajectory statistics, the optimizer's state and the dropped updates."""
    tokens = jnp.zeros((1, experiment.config.window), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
    state, watch, skipped = optimizer.init(params), spikes.Watch.start(), 0
    stats, tracked = trajectory.init(params), jax.jit(trajectory.update)
    again = spikes.Again(batches, seed=seed)
    steps = experiment.train_steps
    for number in range(steps):
        batch, key = next(again), jax.random.key(seed * steps + number)
        params, state, watch, skip = step(params, state, watch, batch, key, number, drop)
        if drop and skip:
            skipped += 1
            again.put(batch)
        if (number + 1) % (steps // SNAPSHOTS) == 0:
            stats = tracked(stats, params)
    return params, stats, state, skipped


def dirtied(batches: Iterator[Any], seed: int, symbols: int) -> Iterator[Any]:
    """Yields batches, some of which are random symbols."""
    random = np.random.default_rng(seed)
    for batch in batches:
        if random.random() < DIRTY:
            yield {
                name: jnp.asarray(random.integers(0, symbols, part.shape), part.dtype)
                for name, part in batch.items()
            }
        else:
            yield batch


def without(
    model: Any, params: Any, stats: Any, state: Any, experiment: Any, seed: int
) -> list[dict[str, Any]]:
    """Returns the loss without experts by criterion, before and after some steps."""
    groups = ling.groups(model.model.config)
    batches = experiment.training[:2]
    loads = ling.loads(model, params, batches)
    random = np.random.default_rng(seed)
    scores = {
        "REAP": {name: one.reap for name, one in loads.items()},
        "tokens": {name: one.tokens for name, one in loads.items()},
        "random": {name: random.random(EXPERTS) for name in loads},
    }
    for criterion in ("magnitude", "forecast_curvature"):
        found = importance.score(criterion, params, stats=stats, opt_state=state)
        scores[criterion] = structured.unit_scores(groups, found, "sum")
    phase = dataclasses.replace(experiment.config.finetune, steps=RECOVERY)
    optimizer = optimizer_lib.build(phase, RECOVERY)
    rows = []
    for sparsity in SPARSITIES:
        fit: Any = None  # the models of one sparsity are alike
        for criterion, units in scores.items():
            small, cut = ling.without_experts(model, params, units, sparsity)
            if fit is None:
                fit, judge = compiled(small.loss, optimizer), judging(small)
            before = mean_loss(judge, cut, experiment.validation)
            cut = fit(cut, experiment.batches(1000 + seed), RECOVERY)
            rows.append({
                "criterion": criterion, "sparsity": sparsity, "seed": seed, "before": before,
                "after": mean_loss(judge, cut, experiment.validation),
            })  # fmt: skip
    return rows


def tables(found: dict[str, Any]) -> list[Table]:
    """Returns the losses of the models, and of what is left of Ling's, as tables."""
    table = Table("model", "parameters", "loss", "to dense", "to dense, NormHead")
    for head in ("busiest expert / mean", "dropped", "seeds"):
        table.add_column(head)
    for name in dict.fromkeys(row["model"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["model"] == name]
        uneven = [row["uneven"] for row in own if "uneven" in row]
        table.add_row(
            name,
            f"{own[0]['parameters']:,}",
            shown([row["loss"] for row in own]),
            *(apart(own, found["rows"], "loss", model=base) for base in (DENSE, DENSE_NORMED)),
            shown(uneven, 2) if uneven else "",
            f"{statistics.fmean(row['skipped'] for row in own):g}",
            str(len(own)),
        )
    left = Table("experts removed", "by", title=f"{RECOVERY} steps of recovery")
    for head in ("before", "after", "before, to random", "after, to random"):
        left.add_column(head)
    for sparsity in SPARSITIES:
        for criterion in dict.fromkeys(row["criterion"] for row in found["pruned"]):
            own = [
                row
                for row in found["pruned"]
                if (row["criterion"], row["sparsity"]) == (criterion, sparsity)
            ]
            when = ("before", "after")
            losses = (shown([row[name] for row in own]) for name in when)
            random = {"criterion": "random", "sparsity": sparsity}
            differences = (apart(own, found["pruned"], name, **random) for name in when)
            left.add_row(f"{sparsity:.0%}", criterion, *losses, *differences)
    return [table, left]


def apart(own: list[dict[str, Any]], rows: list[dict[str, Any]], column: str, **base: Any) -> str:
    """Returns the mean difference of rows to those of a base, paired by seed; empty without any."""
    of = {row["seed"]: row[column] for row in rows if base.items() <= row.items()}
    differences = [row[column] - of[row["seed"]] for row in own if row["seed"] in of]
    return shown(differences) if differences and any(differences) else ""
