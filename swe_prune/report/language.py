"""Perplexities and samples of text, where the models of a study write some."""

import itertools
import math
from typing import Any

from swe_prune.report import stats
from swe_prune.report.formats import DASH, number, percent
from swe_prune.report.records import Results, Row
from swe_prune.report.tables import Table

STAGES = {"pruned": "before", "finetuned": "after"}


def of(results: Results) -> dict[str, Table] | None:
    """Returns the tables of perplexities and of samples; None where no model wrote anything."""
    if all(row.pruned_kl is None for row in results.study):
        return None
    return {"perplexities": perplexities(results), "samples": samples(results)}


def perplexities(results: Results) -> Table:
    """Returns perplexity, distance from the dense model and repetition, before and after recovery.

    Means over seeds, of the losses: the perplexity is exp of that mean.
    """
    rows = [
        [name, DASH, perplexity(loss), DASH, DASH, DASH, DASH, DASH]
        for name, loss in references(results).items()
    ]
    full = [row.in_full() for row in results.study]
    order = {name: at for at, name in enumerate(stats.order(row.criterion for row in full))}

    def key(row: Row) -> tuple[int, float, str]:
        return order[row.criterion], row.requested, row.rule

    for _, group in itertools.groupby(sorted(full, key=key), key=key):
        same = list(group)
        rows.append(
            [
                same[0].criterion,
                percent(_mean(same, "sparsity_prunable") or 0.0),
                perplexity(_mean(same, "pruned_loss")),
                perplexity(_mean(same, "finetuned_loss")),
                *(_number(_mean(same, f"{stage}_kl")) for stage in STAGES),
                *(_percent(_mean(same, f"{stage}_repetition")) for stage in STAGES),
            ]
        )
    head = ["model", "sparsity", "perplexity", "recovered"]
    head += ["KL", "KL recovered", "repetition", "repetition recovered"]
    return Table(
        "Perplexity on the validation windows, straight after pruning and after the recovery. KL: "
        "how far the next-token probabilities are from the dense model's, in nats per token. "
        "Repetition: the share of 3-grams of the samples that stood in them before.",
        head,
        rows,
    )


def references(results: Results) -> dict[str, float]:
    """Returns the losses that the pruned models are held against, means over seeds, by name."""
    found: dict[str, float] = {}
    dense = list(results.dense.values())
    before = [one["pretrained_loss"] for one in dense if "pretrained_loss" in one]
    if before:
        found["pretrained"] = sum(before) / len(before)
    for name, field in (("dense", "dense_loss"), ("control", "control_loss")):
        values = list(stats.per_seed(results.study, field).values())
        if values:
            found[name] = sum(values) / len(values)
    return found


def samples(results: Results) -> Table:
    """Returns what the models of the first seed wrote, greedily, after each prompt."""
    seed = min(row.seed for row in results.study)
    rows = []
    for one in results.dense.get(seed, {}).get("dense_samples", []):
        rows.append(["dense", DASH, *_shown(one), DASH])
    for (of_seed, _, criterion, _), detail in sorted(results.details.items(), key=str):
        if of_seed != seed or not detail.samples:
            continue
        removed = 1 - sum(kept for kept, _ in detail.tensors.values()) / max(1, detail.total)
        after = detail.samples.get("finetuned", [])
        for one, two in itertools.zip_longest(detail.samples["pruned"], after):
            last = _shown(two)[1] if two else DASH
            rows.append([criterion, percent(removed), *_shown(one), last])
    head = ["model", "sparsity", "prompt", "goes on, pruned", "goes on, recovered"]
    return Table(f"What the models of seed {seed} wrote, greedily.", head, rows, words=5)


def _shown(sample: dict[str, Any]) -> list[str]:
    return [" ".join(str(sample[key]).split()) for key in ("prompt", "text")]


def perplexity(loss: float | None) -> str:
    """Returns exp of a loss as a table shows it.

    >>> perplexity(math.log(20)), perplexity(None)
    ('20.00', '\N{EN DASH}')
    """
    if loss is None:
        return DASH
    return number(math.exp(loss), 2) if loss < 700 else number(math.inf)


def _mean(rows: list[Row], field: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, field)) is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return DASH if value is None else number(value, 3)


def _percent(value: float | None) -> str:
    return DASH if value is None else percent(value)
