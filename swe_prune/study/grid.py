"""The cells of the study, and what they need tracked."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import PyTree

from swe_prune import recipe, trajectory, tree
from swe_prune.config import ONE_SHOT, CellConfig, Config, Duration, ScheduleConfig
from swe_prune.errors import InputError
from swe_prune.recipe import Recipe

UNAVAILABLE = {"learned": "scores that movement pruning learns; use schedule 'movement' for it"}
"""What a study cannot provide to criteria, and what to do instead."""

_LONGEST_NAME = 200
"""Characters of a folder's name, of the 255 bytes of most file systems."""


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The training that follows pruning; each has a control of its own.

    Attributes:
        kind: One of `config.Recovery`; see `config.CellConfig`.
        steps: Number of steps; None: the length of fine-tuning.
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
    """One pruned and fine-tuned model of a study.

    Attributes:
        recipe: How the model is pruned; its seed is that of the dense model.
        schedule: "one_shot", or another of `config.Schedule` during the recovery.
        recovery: Training that follows.
        include: Rules of the prunable weights that are pruned; None: all.
        schedule_options: Settings of the schedule.
    """

    recipe: Recipe
    schedule: str = ONE_SHOT
    recovery: Recovery = Recovery()
    include: tuple[str, ...] | None = None
    schedule_options: ScheduleConfig = ScheduleConfig()

    @property
    def seed(self) -> int:
        """Seed of the dense model."""
        return self.recipe.seed

    @property
    def sparsity(self) -> float:
        """Share to remove, of a cell whose recipe has no rate."""
        target = self.recipe.target
        assert target is not None
        return target

    @property
    def name(self) -> str:
        """Folder name, unique within a seed."""
        request = self.recipe
        rule, amount = request.scope, request.target
        if request.rate is not None:
            rule, amount = "std", request.rate
        words = [f"{rule}-{_plain(request.name)}-{amount:g}", *map(_plain, self.settings)]
        name = "-".join(words)
        if len(name) <= _LONGEST_NAME:
            return name
        short = hashlib.sha256(repr(self.settings).encode()).hexdigest()[:12]
        return f"{name[: _LONGEST_NAME - 13]}-{short}"

    @property
    def settings(self) -> list[str]:
        """What differs from a one-shot, unstructured cell that is fine-tuned, one word each."""
        words = [self.recipe.option_text, self.recipe.allocation, self.recipe.pattern]
        words += [self.schedule_text if self.gradual else "", self.recovery.name]
        words += [f"of {self.include_text}" if self.include else ""]
        return [word for word in words if word]

    @property
    def schedule_text(self) -> str:
        """The schedule, and its settings as `name=value` where they are not the usual ones."""
        changed = self.schedule_options.changed.items()
        shown = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed]
        return " ".join([self.schedule, *shown])

    @property
    def include_text(self) -> str:
        """Rules of the weights that are pruned, joined by commas; empty where all are."""
        return ",".join(self.include or ())

    def chosen(self, prunable: PyTree) -> PyTree:
        """Returns which of the prunable weights the cell prunes, a bool pytree like `prunable`.

        Raises:
            InputError: A rule is not a regular expression or matches no prunable weight.
        """
        if self.include is None:
            return prunable
        names = [name for name, mark in tree.named_leaves(prunable) if mark]
        instead = ", or widen config.prune.include"
        found = tree.matched(self.include, names, "include rule", "prunable weight", instead)
        chosen = set().union(*found.values())
        return tree.map_named(lambda name, mark: mark and name in chosen, prunable)

    @property
    def gradual(self) -> bool:
        """Whether pruning goes on during the recovery."""
        return self.schedule != ONE_SHOT


def _plain(value: Any) -> str:
    """Returns a text with nothing in it that a folder name of any file system cannot have."""
    return re.sub(r"[^\w.,=+-]+", "-", str(value))


def cells(config: Config) -> list[Cell]:
    """Returns every cell in the order of the results table: the paper's rule, each scope, `cells`.

    Raises:
        InputError: There is none, or two would have one name.
    """
    study = config.study
    grid = [
        Cell(Recipe(criterion, rate=rate, seed=seed))
        for seed in study.std_seeds
        for criterion in study.std_criteria
        for rate in study.std_rates
    ]
    grid += [
        Cell(Recipe(criterion, sparsity=sparsity, scope=scope, seed=seed))
        for scope in study.scopes
        for seed in study.seeds
        for criterion in study.criteria
        for sparsity in study.sparsities
    ]
    grid += [cell for settings in study.cells for cell in _listed(config, settings)]
    if not grid:
        raise InputError("config.study has no cells; give criteria, sparsities and seeds")
    named: dict[tuple[int, str], Cell] = {}
    for cell in grid:
        other = named.setdefault((cell.seed, cell.name), cell)
        if other != cell:
            raise InputError(
                f"two cells of seed {cell.seed} would both be called {cell.name!r}, {other} and "
                f"{cell}; make their settings differ by more"
            )
    return list(named.values())


def _listed(config: Config, settings: CellConfig) -> Iterator[Cell]:
    steps = settings.recovery_steps
    if settings.recovery == "none" or steps == config.finetune.steps:
        steps = None
    for seed in config.study.seeds_of(settings):
        recovery = Recovery(settings.recovery, steps)
        yield Cell(
            settings.recipe(seed),
            settings.schedule,
            recovery,
            settings.include,
            settings.schedule_options,
        )


def check(config: Config, abstract_params: PyTree, prunable: PyTree, layout: PyTree) -> None:
    """Checks every cell against the parameters, before any training.

    Args:
        config: Settings.
        abstract_params: Shapes and dtypes of the parameters.
        prunable: Bool pytree like the parameters.
        layout: Pytree of `layout.Axes` like the parameters.

    Raises:
        InputError: The first cell that cannot work, by its name.
    """
    checked: list[Cell] = []
    selections = set()
    for cell in cells(config):
        shared = dataclasses.replace(cell, recipe=dataclasses.replace(cell.recipe, seed=0))
        if shared in checked:
            continue
        unavailable = {} if cell.schedule == "movement" else UNAVAILABLE
        # The shapes admit a selection whatever ranks the weights, so one trace serves all criteria.
        own = cell.recipe
        selection = (own.rate, own.sparsity, own.scope, own.pattern, own.max_sparsity)
        selection += (own.method, own.method and own.option_text, cell.include)
        shapes = None if selection in selections else abstract_params
        try:
            chosen = cell.chosen(prunable)
            recipe.check(own, shapes, chosen, layout=layout, unavailable=unavailable)
        except InputError as error:
            raise InputError(f"cell {cell.name!r}: {error}") from error
        checked.append(shared)
        selections.add(selection)


def in_turns(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells with their seeds in turns: the first of each, the second of each, and on.

    Every N-th of them is then of one seed where N is a multiple or a divisor of their number, so
    that of several processes each trains, loads and measures few dense models.
    """
    by_seed: dict[int, list[Cell]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, []).append(cell)
    turns = itertools.zip_longest(*by_seed.values())
    return [cell for turn in turns for cell in turn if cell is not None]


def seeds(config: Config) -> list[int]:
    """Returns the seeds of all the cells, each once, sorted."""
    return sorted({cell.seed for cell in cells(config)})


def recoveries(config: Config) -> list[Recovery]:
    """Returns every recovery that trains, each once, in the order of the cells."""
    return list(dict.fromkeys(c.recovery for c in cells(config) if c.recovery.kind != "none"))


def measures(config: Config) -> tuple[str, ...]:
    """Returns the measures to track: those of the config, or those that the criteria need.

    Raises:
        InputError: An unknown criterion or measure, or a criterion whose measure is not tracked.
    """
    of_cuts = [cut.recipe for cut in config.cuts if cut.recipe is not None]
    requests = [*(cell.recipe for cell in cells(config)), *of_cuts]
    needed = dict.fromkeys(recipe.measures(requests))
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
