"""What settings must be, each by itself and in pairs, before any work is done."""

from collections.abc import Callable
from typing import Any

from swe_prune.bounds import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SEED,
    SHARE,
    Bound,
    check_each,
)
from swe_prune.config.conversion import check_choices
from swe_prune.config.experiment import ONE_SHOT, CellConfig, Config
from swe_prune.config.model import RANGES, check_width
from swe_prune.errors import InputError
from swe_prune.recipe import check as check_recipe

PHASE: dict[str, Bound] = {
    **dict.fromkeys(("learning_rate", "clip"), POSITIVE),
    **dict.fromkeys(("final_learning_rate", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("b1", "b2", "decay_from"), SHARE),
    **dict.fromkeys(("accumulate", "keep_latest", "stop_after_skipped"), COUNT),
}
"""Range of each number of a phase."""

_COUNTS = """
data.batch data.eval_windows data.eval_batch data.window trajectory.window_start calibration.windows
calibration.batch samples.tokens parallel.data parallel.fsdp parallel.tensor log_every
ledger.windows ledger.batch ledger.prompt ledger.new_tokens
"""

_BOUNDS: dict[str, Bound] = {
    **{f"model.{key}": one for key, one in RANGES.items()},
    **dict.fromkeys(_COUNTS.split(), COUNT),
    **{f"{phase}.{key}": one for phase in ("train", "finetune") for key, one in PHASE.items()},
    "trajectory.power": NOT_NEGATIVE,
    "trajectory.vote_rate": NOT_NEGATIVE,
    "calibration.seed": SEED,
    "study.seeds": SEED,
    "study.std_seeds": SEED,
    "study.std_rates": NOT_NEGATIVE,
    "study.sparsities": SHARE,
    "ledger.window_seconds": NOT_NEGATIVE,
    "ledger.margin": NOT_NEGATIVE,
}
"""Range of each number, or of each member of a list; None is left to the setting's type."""

_SCHEDULES: dict[str, tuple[Bound, tuple[str, ...]]] = {
    "ramp_end": (FRACTION, ("cubic", "iterative", "movement")),
    "rounds": (COUNT, ("iterative",)),
    "updates": (COUNT, ("cubic", "rigl", "set")),
    "exchange_end": (FRACTION, ("rigl", "set")),
    "drop_fraction": (PART, ("rigl", "set")),
    "penalty": (NOT_NEGATIVE, ("elsa",)),
}
"""Range of each setting of a schedule, and the schedules that read it."""


def validate(config: Config) -> None:
    """Checks single values and pairs of them; registries check their own names.

    Raises:
        InputError: The first setting that cannot be used, and what it must be.
    """

    def must(ok: bool, key: str, rule: str, value: Any) -> None:
        if not ok:
            raise InputError(f"config.{key} must be {rule}, got {value!r}")

    # Each setting by itself.
    check_choices(config)
    check_each(config, _BOUNDS, "config")
    data, study = config.data, config.study
    fraction = data.validation_fraction
    must(0 < fraction < 1, "data.validation_fraction", "between 0 and 1", fraction)
    cadence = config.train.checkpoint_every
    rule = "above 0, because pruning starts from the dense checkpoint"
    must(cadence != 0, "train.checkpoint_every", rule, cadence)

    # Settings that depend on others.
    check_width(config.model)
    rule = f"a multiple of data.eval_batch = {data.eval_batch}"
    must(data.eval_windows % data.eval_batch == 0, "data.eval_windows", rule, data.eval_windows)
    for name, phase in (("train", config.train), ("finetune", config.finetune)):
        divides = phase.accumulate >= 1 and data.batch % phase.accumulate == 0
        rule = f"a divisor of data.batch = {data.batch}"
        must(divides, f"{name}.accumulate", rule, phase.accumulate)

    # The study.
    for number, cell in enumerate(study.cells):
        _validate_cell(cell, f"study.cells[{number}]", must)
    windows = config.ledger.windows
    rule = "at least 2 for config.cuts, whose energy has an interval"
    must(windows >= 2 or not config.cuts, "ledger.windows", rule, windows)
    for number, cut in enumerate(config.cuts):
        path = f"cuts[{number}]"
        for name, share in (("sparsity", cut.sparsity), *(("smaller", one) for one in cut.smaller)):
            SHARE.check(share, f"config.{path}.{name}")
        if cut.multiple is not None:
            COUNT.check(cut.multiple, f"config.{path}.multiple")
        must(cut.seed == 0, f"{path}.seed", f"left out; give seeds = ({cut.seed},)", cut.seed)
        rule = "False, since whole layers have no projection to refit"
        must(not (cut.restore and cut.units == "layers"), f"{path}.restore", rule, cut.restore)
        rule = "at least one seed, or None for those of the study"
        must(cut.seeds is None or len(cut.seeds) > 0, f"{path}.seeds", rule, cut.seeds)


def _validate_cell(cell: CellConfig, path: str, must: Callable[..., None]) -> None:
    """Checks the recipe of a cell, then what its schedule and recovery allow."""
    try:
        check_recipe(cell.recipe(0))
    except InputError as error:
        raise InputError(f"config.{path}: {error}") from error
    must(cell.seed == 0, f"{path}.seed", f"left out; give seeds = ({cell.seed},)", cell.seed)
    rule = "at least one seed, or None for those of the study"
    must(cell.seeds is None or len(cell.seeds) > 0, f"{path}.seeds", rule, cell.seeds)
    rule = "at least one rule, or None for all prunable weights"
    must(cell.include is None or len(cell.include) > 0, f"{path}.include", rule, cell.include)
    for name, value in cell.schedule_options.changed.items():
        bound, schedules = _SCHEDULES[name]
        readers = ", ".join(schedules)
        rule = f"left at its default with schedule {cell.schedule!r}; it is for {readers}"
        must(cell.schedule in schedules, f"{path}.schedule_options.{name}", rule, value)
        bound.check(value, f"config.{path}.schedule_options.{name}")
    if cell.schedule == ONE_SHOT:
        return
    # All other schedules prune during the recovery.
    schedule = cell.schedule
    rule = f"other than 'none', since schedule {schedule!r} prunes during it"
    must(cell.recovery != "none", f"{path}.recovery", rule, cell.recovery)
    at_once = cell.rate is not None or cell.method is not None or cell.n_of_m
    at_once = at_once or cell.restore is not None
    rule = f"{ONE_SHOT!r}, since a rate, a restoration, a method or an n:m pattern prunes at once"
    must(not at_once, f"{path}.schedule", rule, schedule)
    rule = f"None, since schedule {schedule!r} prunes all prunable weights"
    must(cell.include is None, f"{path}.include", rule, cell.include)
    if schedule in ("cubic", "iterative"):
        return
    rule = f"None, since schedule {schedule!r} prunes single weights"
    must(cell.pattern is None, f"{path}.pattern", rule, cell.pattern)
    ranked_by = {"ste": "magnitude", "elsa": "magnitude", "movement": "movement"}.get(schedule)
    if ranked_by is not None:
        rule = f"{ranked_by!r}, by which schedule {schedule!r} ranks"
        must(cell.criterion == ranked_by, f"{path}.criterion", rule, cell.criterion)
        rule = f"None, since schedule {schedule!r} distributes the sparsity by scope"
        must(cell.allocation is None, f"{path}.allocation", rule, cell.allocation)
