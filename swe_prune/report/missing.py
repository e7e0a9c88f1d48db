"""What the settings ask for and the working directory does not hold yet."""

import re
from typing import Any

from swe_prune.report.formats import percent, plural
from swe_prune.report.read import label
from swe_prune.report.records import USUAL, CellKey, Results, full_name

_NAMED = 6  # cells named one by one; of more only the number is given


def expected(config: dict[str, Any]) -> list[CellKey]:
    """Returns the cells that the settings' `study` asks for."""
    study = config.get("study") or {}

    def of(name: str) -> list[Any]:
        return list(study.get(name) or [])

    paper = [
        (int(seed), "std", str(name), float(rate))
        for seed in of("std_seeds")
        for name in of("std_criteria")
        for rate in of("std_rates")
    ]
    equal = [
        (int(seed), str(scope), str(name), float(sparsity))
        for seed in of("seeds")
        for scope in of("scopes")
        for name in of("criteria")
        for sparsity in of("sparsities")
    ]
    listed = [key for cell in of("cells") for key in _listed(config, cell)]
    return list(dict.fromkeys(paper + equal + listed))


def _listed(config: dict[str, Any], cell: dict[str, Any]) -> list[CellKey]:
    """Returns the cells that one entry of `study.cells` asks for, named as their rows are."""
    steps, kind = cell.get("recovery_steps"), str(cell.get("recovery") or USUAL[1])
    usual = steps is None or kind == "none" or steps == config.get("finetune", {}).get("steps")
    recovery = kind if usual else f"{kind}-{re.sub(r'[^.,=+0-9A-Za-z_-]+', '-', str(steps))}"
    options = sorted((cell.get("options") or {}).items())
    text = ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options)
    criterion = label({**cell, "options": text})
    name = full_name(criterion, str(cell.get("schedule") or USUAL[0]), recovery)
    seeds = cell.get("seeds") or (config.get("study") or {}).get("seeds") or []
    return [(int(s), str(cell["scope"]), name, float(cell["sparsity"])) for s in seeds]


def _name(key: CellKey) -> str:
    seed, rule, criterion, requested = key
    level = f"rate {requested:g}" if rule == "std" else percent(requested)
    return f"{criterion} {rule} {level} (seed {seed})"


def missing(results: Results) -> list[str]:
    """Returns one sentence for each kind of thing that is not there, none if all is."""
    lines = [*_missing_cells(results), *_missing_files(results)]
    tuned = [row for row in results.study if row.recovery != "none"]
    untuned = sum(row.finetuned_loss is None for row in tuned)
    if untuned and untuned == len(tuned):
        lines.append("No cell is fine-tuned yet, so the paper's claims cannot be judged.")
    elif untuned:
        lines.append(f"{plural(untuned, 'cell')} of {len(tuned)} not fine-tuned yet.")
    without = sorted({row.seed for row in tuned if row.control_loss is None})
    if without:
        seeds = ", ".join(map(str, without))
        lines.append(f"No control yet for {plural(len(without), 'seed')}: {seeds}.")
    if results.repeated:
        lines.append(
            f"{plural(results.repeated, 'row')} of results.csv replaced by a later row of the cell."
        )
    return lines


def _missing_cells(results: Results) -> list[str]:
    if results.config is None:
        return ["There is no config.json, so what else was asked for is not known."]
    wanted = expected(results.config)
    found = (row.in_full() for row in results.study)
    there = {(row.seed, row.rule, row.criterion, round(row.requested, 6)) for row in found}
    absent = [key for key in wanted if (*key[:3], round(key[3], 6)) not in there]
    if not absent:
        return []
    named = ", ".join(_name(key) for key in absent[:_NAMED])
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    return [f"{len(absent)} of {plural(len(wanted), 'cell')} not finished: {named}{more}."]


def _missing_files(results: Results) -> list[str]:
    lines = []
    if not results.training:
        lines.append(
            "There is no metrics.jsonl of the dense model: the training curve is left out."
        )
    if not results.details:
        lines.append(
            "No cell has a result.json: the figures of what happened to the weights are left out."
        )
    elif not results.trajectories:
        lines.append("There is no trajectory.jsonl: the paths of single weights are left out.")
    return lines
