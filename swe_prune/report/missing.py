"""What the settings ask for and the working directory does not hold yet."""

from typing import Any

from swe_prune.report.formats import percent, plural
from swe_prune.report.records import CellKey, Results

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
    return paper + equal


def _name(key: CellKey) -> str:
    seed, rule, criterion, requested = key
    level = f"rate {requested:g}" if rule == "std" else percent(requested)
    return f"{criterion} {rule} {level} (seed {seed})"


def missing(results: Results) -> list[str]:
    """Returns one sentence for each kind of thing that is not there, none if all is."""
    lines = [*_missing_cells(results), *_missing_files(results)]
    untuned = sum(row.finetuned_loss is None for row in results.rows)
    if untuned == len(results.rows):
        lines.append("No cell is fine-tuned yet, so the paper's claims cannot be judged.")
    elif untuned:
        lines.append(f"{plural(untuned, 'cell')} of {len(results.rows)} not fine-tuned yet.")
    without = sorted({row.seed for row in results.rows if row.control_loss is None})
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
    there = {(row.seed, row.rule, row.criterion, round(row.requested, 6)) for row in results.rows}
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
