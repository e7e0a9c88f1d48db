"""The cells of the study, and what they need tracked."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from swe_prune import importance, trajectory
from swe_prune.config import CellConfig, Config, Duration
from swe_prune.errors import InputError

BLOCKWISE = "blockwise:"
"""A criterion that begins so prunes block after block and may change the weights that stay."""


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The training that follows pruning; each has a control of its own.

    Attributes:
        kind: "none", "finetune", "rewarm" or "rewind"; see `config.CellConfig`.
        steps: how long, None for the length of fine-tuning.
    """

    kind: str = "finetune"
    steps: Duration | None = None

    @property
    def label(self) -> str:
        """What the results call it: the kind, and the steps where they are not the usual ones."""
        return self.kind if self.steps is None else f"{self.kind}-{_plain(self.steps)}"

    @property
    def name(self) -> str:
        """Part of a folder name; empty for fine-tuning of the usual length."""
        return "" if self == Recovery() else self.label


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pruned and fine-tuned model.

    Attributes:
        seed: of the dense model it comes from.
        criterion: a registered name, or one that begins with `BLOCKWISE`.
        rule: "std", the paper's rule, or the scope of equal sparsity: "tensor", "global", "row".
        requested: the rate of "std", else the sparsity.
        options: of the criterion, sorted by name.
        allocation: name of the rule that shares the sparsity out, None: the scope does.
        pattern: of `masks.by_sparsity`.
        schedule: "one-shot", or "cubic" or "iterative" during the recovery.
        recovery: the training that follows.
    """

    seed: int
    criterion: str
    rule: str
    requested: float
    options: tuple[tuple[str, Any], ...] = ()
    allocation: str | None = None
    pattern: str | None = None
    schedule: str = "one-shot"
    recovery: Recovery = Recovery()

    @property
    def name(self) -> str:
        """A folder name, unique within a seed."""
        usual = f"{self.rule}-{_plain(self.criterion)}-{self.requested:g}"
        return "-".join([usual, *map(_plain, self.settings)])

    @property
    def settings(self) -> list[str]:
        """What differs from a one-shot, unstructured cell that is fine-tuned, one word each."""
        words = [self.option_text, self.allocation, self.pattern]
        words += [self.schedule if self.gradual else "", self.recovery.name]
        return [word for word in words if word]

    @property
    def option_text(self) -> str:
        """The criterion's options as `name=value`, joined by commas."""
        return ",".join(f"{name}={_shown(value)}" for name, value in self.options)

    @property
    def gradual(self) -> bool:
        """Whether pruning goes on during the recovery."""
        return self.schedule != "one-shot"

    @property
    def blockwise(self) -> str | None:
        """The method of block-after-block pruning, or None for a registered criterion."""
        blockwise = self.criterion.startswith(BLOCKWISE)
        return self.criterion.removeprefix(BLOCKWISE) if blockwise else None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """Returns a text with nothing in it that a folder name of any file system cannot have."""
    return re.sub(r"[^\w.,=+-]+", "-", str(value))


def cells(config: Config) -> list[Cell]:
    """Returns every cell in the order of the results table: the paper's rule, each scope, `cells`.

    Raises:
        InputError: there is none, or two would have one name.
    """
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
    grid += [cell for settings in study.cells for cell in _listed(config, settings)]
    unique = list(dict.fromkeys(grid))
    if not unique:
        raise InputError("config.study has no cells; give criteria, levels and seeds")
    named: dict[tuple[int, str], Cell] = {}
    for cell in unique:
        other = named.setdefault((cell.seed, cell.name), cell)
        if other is not cell:
            raise InputError(
                f"two cells of seed {cell.seed} would both be called {cell.name!r}, {other} and "
                f"{cell}; make their settings differ by more"
            )
    return unique


def _listed(config: Config, settings: CellConfig) -> Iterator[Cell]:
    steps = settings.recovery_steps
    if settings.recovery == "none" or steps == config.finetune.steps:
        steps = None
    for seed in config.study.seeds if settings.seeds is None else settings.seeds:
        yield Cell(
            seed,
            settings.criterion,
            settings.scope,
            settings.sparsity,
            options=tuple(sorted(settings.options.items())),
            allocation=settings.allocation,
            pattern=settings.pattern,
            schedule=settings.schedule,
            recovery=Recovery(settings.recovery, steps),
        )


def seeds(config: Config) -> list[int]:
    """Returns the seeds of all the cells, each once, sorted."""
    return sorted({cell.seed for cell in cells(config)})


def recoveries(config: Config) -> list[Recovery]:
    """Returns every recovery that trains, each once, in the order of the cells."""
    return list(dict.fromkeys(c.recovery for c in cells(config) if c.recovery.kind != "none"))


def measures(config: Config) -> tuple[str, ...]:
    """Returns the measures to track: those of the config, or those that the criteria need.

    Raises:
        InputError: an unknown criterion or measure, or a criterion whose measure is not tracked.
    """
    study = config.study
    criteria = [*study.std_criteria, *study.criteria]
    criteria += [cell.criterion for cell in cells(config) if cell.blockwise is None]
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
