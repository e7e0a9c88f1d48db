"""Efficient reasoning on a tiny model that adds; `benchmarks/related.py reasoning` runs it.

A model learns sums with 0 to `terms` - 1 tokens of work before the answer, as many of each, so it
draws its lengths at random. Then it is trained by RLOO with the length reward, for each alpha from
the same weights. The baseline is what needs no reward: fine-tuning on the shortest right answer of
each prompt (rejection sampling), as many rounds of as many samples. Answers are judged on other
prompts, sampled at temperature 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fitting import shown
from rich.table import Table

from swe_prune.config import ModelConfig
from swe_prune.evaluation import Sampling, generate
from swe_prune.models import gpt
from swe_prune.related import reasoning
from swe_prune.related.reasoning import Answers

ALPHAS = (0.0, 0.1, 0.2, 0.4)
TERMS = 4
PROMPTS, SAMPLES, ROUNDS = 32, 8, 100
LENGTH = 2 * TERMS + 2
MODEL = ModelConfig(layers=2, heads=4, width=64, context=LENGTH, activation="relu")
PRETRAINING, RATE, RL_RATE, BATCH, JUDGED = 2000, 4e-3, 3e-4, 64, 2048


def run(seeds: list[int], work: Any, say: Callable[[str], None]) -> Any:
    """Returns accuracy and mean length of each way by seed."""
    model = gpt.build(MODEL, reasoning.SYMBOLS)
    rows: list[dict[str, Any]] = []
    learn, reinforce = learning(model), reinforcing(model)
    for seed in seeds:
        tokens = jnp.zeros((1, LENGTH), jnp.int32)
        start = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
        params, state = start, optax.adam(RATE).init(start)
        for step in range(PRETRAINING):
            part = reasoning.sums(BATCH, TERMS, work=work, seed=seed * 10**6 + step)
            rate = RATE * min(1, (step + 1) / 50) * (1 - step / PRETRAINING)
            params, state = learn(params, state, part, rate)
        ways = {"before": params}
        for alpha in ALPHAS:
            ways[f"RLOO, alpha {alpha:g}"] = trained(model, params, seed, alpha, reinforce)
        ways["shortest right answers"] = trained(model, params, seed, None, learn)
        for way, found in ways.items():
            row = {"seed": seed, "work": work, "way": way, **judge(model, found, seed)}
            rows.append(row)
            say(f"{way}, seed {seed}: {row['right']:.3f} right, {row['length']:.2f} tokens")
    return {"rows": rows}


def learning(model: Any) -> Any:
    """Returns the compiled step that makes answers likelier."""

    def loss(params: Any, rows: Answers) -> Any:
        return -reasoning.log_probability(model, params, rows).sum() / rows.written.sum()

    return stepping(loss)


def reinforcing(model: Any) -> Any:
    """Returns the compiled step of RLOO."""

    def loss(params: Any, rows: Answers, before: Any, advantage: Any) -> Any:
        log_p = reasoning.log_probability(model, params, rows)
        old = reasoning.log_probability(model, before, rows)
        return reasoning.policy_loss(log_p, old, advantage)

    return stepping(loss)


def stepping(loss: Any) -> Any:
    """Returns the compiled step of a loss with Adam, of (params, state, rows, rate, …)."""

    @jax.jit
    def step(params: Any, state: Any, rows: Answers, rate: Any, *more: Any) -> Any:
        updates, state = optax.adam(rate).update(jax.grad(loss)(params, rows, *more), state)
        return optax.apply_updates(params, updates), state

    return step


def trained(model: Any, start: Any, seed: int, alpha: float | None, step: Any) -> Any:
    """Returns a model after rounds of RLOO, or without alpha of rejection sampling."""
    params, state = start, optax.adam(RL_RATE).init(start)
    for number in range(ROUNDS):
        asked = reasoning.sums(PROMPTS, TERMS, seed=seed * 10**6 + 5 * 10**5 + number)
        prompts: Any = np.repeat(asked.tokens[:, : TERMS + 1], SAMPLES, axis=0)
        found = answered(model, params, prompts, seed * ROUNDS + number)
        lengths, right = reasoning.judged(prompts, *found)
        rows = reasoning.joined(prompts, *found, LENGTH)
        lengths, right = (one.reshape(PROMPTS, SAMPLES) for one in (lengths, right))
        if alpha is not None:
            gain = reasoning.advantages(reasoning.rewards(lengths, right, alpha))
            params, state = step(params, state, rows, RL_RATE, start, gain.reshape(-1))
            continue
        best = np.where(right, lengths, LENGTH).argmin(1)
        chosen = np.arange(PROMPTS) * SAMPLES + best
        # Of a prompt without a right answer nothing counts.
        written = rows.written[chosen] & np.asarray(right.any(1))[:, None]
        if written.any():
            params, state = step(params, state, Answers(rows.tokens[chosen], written), RL_RATE)
    return params


def answered(model: Any, params: Any, prompts: Any, seed: int) -> tuple[Any, Any]:
    """Returns a sampled answer to each prompt, and whether it ended."""
    made = generate(
        model, params, prompts.tolist(), TERMS + 1, sampling=Sampling(), seed=seed,
        eos_id=reasoning.END,
    )  # fmt: skip
    return made.tokens, made.ended


def judge(model: Any, params: Any, seed: int) -> dict[str, Any]:
    """Returns the share of right answers and the mean length, in all and by length."""
    asked = reasoning.sums(JUDGED, TERMS, seed=10**9 + seed)
    prompts: Any = asked.tokens[:, : TERMS + 1]
    lengths, right = map(
        np.asarray, reasoning.judged(prompts, *answered(model, params, prompts, seed))
    )
    by_length = {
        int(one): (float((lengths == one).mean()), float(right[lengths == one].mean()))
        for one in np.unique(lengths)
    }
    return {"right": float(right.mean()), "length": float(lengths.mean()), "by_length": by_length}


def tables(found: dict[str, Any]) -> list[Table]:
    """Returns accuracy and length, and the accuracy by length before RLOO, as tables."""
    rows = found["rows"]
    table = Table("way", "right, %", "tokens", "seeds", title=f"work: {rows[0]['work']}")
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        right, length = ([row[name] for row in own] for name in ("right", "length"))
        table.add_row(way, shown([100 * one for one in right], 1), shown(length, 2), str(len(own)))
    before = [row["by_length"] for row in rows if row["way"] == "before"]
    by_length = Table("tokens", "share, %", "right, %", title="before RLOO, by length")
    for length in sorted(set().union(*before)):
        own = [one[length] for one in before if length in one]
        by_length.add_row(str(length), *(shown([100 * o[at] for o in own], 1) for at in (0, 1)))
    return [table, by_length]
