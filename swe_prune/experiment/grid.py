"""The cells of the study: criterion × rule × level × seed, and what they need tracked."""

import dataclasses

from swe_prune import importance, trajectory
from swe_prune.config import Config
from swe_prune.errors import InputError


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pruned and fine-tuned model.

    Attributes:
        seed: of the dense model it comes from.
        criterion: a registered name.
        rule: "std", the paper's rule, or the scope of equal sparsity: "tensor", "global", "row".
        requested: the rate of "std", else the sparsity.
    """

    seed: int
    criterion: str
    rule: str
    requested: float

    @property
    def name(self) -> str:
        """A folder name, unique within a seed."""
        return f"{self.rule}-{self.criterion}-{self.requested:g}"


def cells(config: Config) -> list[Cell]:
    """Returns every cell in the order of the results table: the paper's rule, then each scope."""
    study = config.study
    grid = [
        Cell(seed, criterion, "std", rate)
        for seed in study.std_seeds
        for criterion in study.std_criteria
        for rate in study.std_rates
    ]
    grid += [
        Cell(seed, criterion, scope, sparsity)
        for scope in study.scopes
        for seed in study.seeds
        for criterion in study.criteria
        for sparsity in study.sparsities
    ]
    unique = list(dict.fromkeys(grid))
    if not unique:
        raise InputError("config.study has no cells; give criteria, levels and seeds")
    return unique


def seeds(config: Config) -> list[int]:
    """Returns the seeds of all the cells, each once, sorted."""
    return sorted({cell.seed for cell in cells(config)})


def measures(config: Config) -> tuple[str, ...]:
    """Returns the measures to track: those of the config, or those that the criteria need.

    Raises:
        InputError: an unknown criterion or measure, or a criterion whose measure is not tracked.
    """
    study = config.study
    criteria = dict.fromkeys((*study.std_criteria, *study.criteria))
    needed = dict.fromkeys(m for name in criteria for m in importance.get(name).measures)
    if config.prune.values_from == "late_mean":
        needed["late_mean"] = None
    tracked = config.trajectory.measures
    if tracked is None:
        return tuple(needed) or ("last",)
    trajectory.check_measures(tracked)
    for measure in needed:
        if measure not in tracked:
            raise InputError(
                f"config.trajectory.measures = {tracked!r} lacks {measure!r}, which the study "
                "needs; add it, or set None to track what is needed"
            )
    return tracked
