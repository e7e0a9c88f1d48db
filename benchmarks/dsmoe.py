"""DSMoE on the demo's model; `benchmarks/related.py dsmoe` runs it.

Every row goes on from the same dense checkpoint for the same steps on the same batches. The
baselines have as many FFN weights active for a token as the gated model of each tau has on average:
neurons cut out by a criterion (`structured`), and whole blocks of neurons cut out, which is a
static choice of blocks. Times are multiples of the dense FFN's beside it, in turns, at gates drawn
at random, for the FFN of SmolLM2-135M's shape.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fitting import compiled, gated_mlp, shown
from rich.table import Table

from swe_prune import importance, structured
from swe_prune.evaluation import latency, mean_loss
from swe_prune.models import gpt
from swe_prune.related import dsmoe
from swe_prune.study.saved import load_dense
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import step as step_lib

GATED = "DSMoE"
BLOCKS = 8
TAUS = (0.3, 0.5, 0.7)
CRITERIA = ("magnitude", "forecast_curvature")
FEW = 24  # neurons that a cut is rounded to, so that one program serves several
STATIC = "forecast_curvature"
WIDTH, HIDDEN = 576, 1536  # SmolLM2-135M
TOKENS = (1, 128, 1024)
SHARES = (1.0, 0.75, 0.5, 0.25)


def run(experiment: Any, seeds: list[int], steps: int, say: Callable[[str], None]) -> Any:
    """Returns the loss of each way by seed, and the times of skipped blocks."""
    rows: list[dict[str, Any]] = []
    config = experiment.config.model
    optimizer = optimizer_lib.build(experiment.config.finetune, steps)

    def add(seed: int, way: str, tau: float | None, active: float, model: Any, params: Any) -> None:
        loss = mean_loss(judging(model), params, experiment.validation)
        rows.append({"seed": seed, "way": way, "tau": tau, "active": active, "loss": loss})
        say(f"{way}, tau {tau}, seed {seed}: {active:.1%} active, {loss:.4f}")

    judging = functools.cache(step_lib.compile_eval_step)

    @functools.cache
    def plain(hidden: int) -> tuple[Any, Any]:
        keep = {name: np.arange(hidden) for name in structured.groups(config, "neurons")}
        model = gpt.build(structured.cut_config(config, keep), experiment.model.vocab_size)
        return model, compiled(step_lib.loss_fn(model), optimizer)

    @functools.cache
    def gated(tau: float, straight: bool = True) -> tuple[Any, Any]:
        model: Any = dsmoe.Gated(experiment.model, BLOCKS, tau=tau, straight=straight)
        return model, compiled(model.loss, optimizer)

    for seed in seeds:
        dense = load_dense(experiment, seed)
        batches = functools.partial(experiment.batches, 1000 + seed)
        model, fit = plain(config.hidden_size)
        add(seed, "dense", None, 1.0, model, fit(dense.params, batches(), steps))
        for tau, straight in [(tau, True) for tau in TAUS] + [(0.5, False)]:
            model, fit = gated(tau, straight)
            start = dsmoe.with_routers(dense.params, BLOCKS, seed=seed)
            params = fit(start, batches(), steps)
            active = open_share(model, params, experiment.validation)
            way = GATED if straight else f"{GATED}, not straight-through"
            add(seed, way, tau, active, model, params)
            if not straight:
                continue
            for name, keep in kept(experiment, dense, active).items():
                model, fit = plain(len(next(iter(keep.values()))))
                small = structured.cut(dense.params, structured.groups(config, "neurons"), keep)
                share = model.config.hidden_size / config.hidden_size
                add(seed, name, tau, share, model, fit(small, batches(), steps))
    return {"rows": rows, "times": times(say)}


def open_share(model: dsmoe.Gated, params: Any, batches: list[Any]) -> float:
    """Returns the mean share of open gates over the layers and validation tokens."""
    active = jax.jit(model.active)
    return statistics.fmean(
        float(share) for batch in batches for share in active(params, batch["inputs"]).values()
    )


def kept(experiment: Any, dense: Any, share: float) -> dict[str, dict[str, np.ndarray]]:
    """Returns the neurons that each baseline keeps at a share of them."""
    groups = structured.groups(experiment.config.model, "neurons")
    share = min(max(share, 1 / BLOCKS), 1.0)
    found = {}
    for criterion in CRITERIA:
        scores = importance.score(
            criterion,
            dense.params,
            stats=dense.stats,
            opt_state=dense.opt_state,
            prunable=experiment.prunable,
        )
        units = structured.unit_scores(groups, scores, "sum")
        found[f"neurons cut, {criterion}"] = structured.choose(
            groups, units, sparsity=1 - share, multiple=FEW
        )
        if criterion == STATIC:
            blocks = {name: np.asarray(one).reshape(BLOCKS, -1) for name, one in units.items()}
            count = max(1, round(share * BLOCKS))
            found[f"static blocks, {criterion}"] = {
                name: np.sort(neurons_of(np.argsort(-one.sum(1), kind="stable")[:count], one))
                for name, one in blocks.items()
            }
    return found


def neurons_of(chosen: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Returns the indices of the neurons of some blocks."""
    size = blocks.shape[1]
    return (chosen[:, None] * size + np.arange(size)).reshape(-1)


def times(say: Callable[[str], None], runs: int = 15) -> list[dict[str, Any]]:
    """Returns quartiles of the time of skipped blocks as multiples of the dense FFN's."""
    keys = jax.random.split(jax.random.key(0), 5)
    dense, weights = gated_mlp(WIDTH, HIDDEN, keys[:3])
    skipped = jax.jit(functools.partial(dsmoe.skipped, tau=0.5, activation="silu"))
    blocks = dsmoe.partitioned(weights, BLOCKS)
    found = []
    for tokens in TOKENS:
        x = jax.random.normal(keys[3], (tokens, WIDTH))
        drawn = jax.random.uniform(keys[4], (tokens, BLOCKS))
        works = {"dense": latency.timed(dense, x, weights)}
        for share in SHARES:
            # As many gates of each token are open as the share says, at random.
            rank = jnp.argsort(jnp.argsort(drawn, axis=1), axis=1)
            q = jnp.where(rank < round(share * BLOCKS), 0.9, 0.1)
            works[f"{share:.0%}"] = latency.timed(skipped, x, blocks, q)
        measured = latency.alternating(works, runs)
        for name, (one,) in measured.items():
            ratio = one.ratio(measured["dense"][0])
            found.append({"tokens": tokens, "active": name, "seconds": one.median, "ratio": ratio})
        say(f"{tokens} tokens: timed")
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    """Returns the losses and the times as tables."""
    table = Table("way", "tau", "active", "loss", "to DSMoE", "seeds", title="after the same steps")
    gated = {(row["tau"], row["seed"]): row["loss"] for row in found["rows"] if row["way"] == GATED}
    for way, tau in dict.fromkeys((row["way"], row["tau"]) for row in found["rows"]):
        own = [row for row in found["rows"] if (row["way"], row["tau"]) == (way, tau)]
        apart = [] if tau is None or way == GATED else own
        differences = [row["loss"] - gated[tau, row["seed"]] for row in apart]
        table.add_row(
            way,
            "" if tau is None else f"{tau:g}",
            f"{statistics.fmean(row['active'] for row in own):.1%}",
            shown([row["loss"] for row in own]),
            shown(differences) if differences else "",
            str(len(own)),
        )
    timed = Table("tokens", "active", "time / dense FFN (quartiles)", title="skipped blocks")
    for one in found["times"]:
        low, middle, high = one["ratio"]
        timed.add_row(str(one["tokens"]), one["active"], f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return [table, timed]
