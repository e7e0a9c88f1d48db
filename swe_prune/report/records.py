"""What the report knows of an experiment: rows, trajectories, histograms, as they were written."""

import dataclasses
from typing import Any

RULES = ("std", "tensor", "global", "row")

USUAL = ("one-shot", "finetune")
"""The schedule and the recovery that the comparisons of criteria are about."""

CellKey = tuple[int, str, str, float]
"""(seed, rule, criterion, requested): what names one cell of the study."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished cell; losses are validation nats per token, None where not measured yet.

    The criterion is called by its name with its options, its allocation and its pattern.
    """

    seed: int
    criterion: str
    rule: str
    requested: float
    sparsity_prunable: float
    sparsity_total: float
    nonzero_params: int
    dense_loss: float
    control_loss: float | None
    pruned_loss: float
    finetuned_loss: float | None
    steps: int
    seconds: float
    schedule: str = "one-shot"
    recovery: str = "finetune"
    dense_train_loss: float | None = None
    control_train_loss: float | None = None
    pruned_train_loss: float | None = None
    finetuned_train_loss: float | None = None
    generalisation_gap: float | None = None
    control_gap: float | None = None
    pruned_kl: float | None = None
    finetuned_kl: float | None = None
    pruned_repetition: float | None = None
    finetuned_repetition: float | None = None

    @property
    def key(self) -> CellKey:
        """What names the cell among those that were pruned at once and fine-tuned."""
        return (self.seed, self.rule, self.criterion, self.requested)

    @property
    def plain(self) -> bool:
        """Whether it was pruned at once and fine-tuned, which the comparisons are about."""
        return (self.schedule, self.recovery) == USUAL

    def in_full(self) -> "Row":
        """Returns the row with its schedule and recovery in the name of its criterion."""
        return dataclasses.replace(self, criterion=full_name(*self.names))

    @property
    def names(self) -> tuple[str, str, str]:
        """Criterion, schedule and recovery."""
        return (self.criterion, self.schedule, self.recovery)


def full_name(criterion: str, schedule: str, recovery: str) -> str:
    """Returns a criterion's name with a schedule and a recovery that are not the usual ones.

    >>> full_name("swe", "one-shot", "finetune"), full_name("swe", "cubic", "rewind")
    ('swe', 'swe cubic rewind')
    """
    usual = (schedule, recovery) == USUAL
    return criterion if usual else f"{criterion} {schedule} {recovery}"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Sampled weights of each tensor at each snapshot: `values[name][snapshot][weight]`."""

    steps: list[int]
    values: dict[str, list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of weights between `edges`; exact zeros are counted in `dense` alone."""

    edges: list[float]
    dense: list[int]
    pruned: list[int]
    finetuned: list[int]  # empty before fine-tuning


@dataclasses.dataclass(frozen=True)
class Detail:
    """What a cell tells beyond its row."""

    tensors: dict[str, tuple[int, int]]  # (kept, total)
    histogram: Histogram | None
    sample_kept: dict[str, list[bool]]
    schedule: str = USUAL[0]
    recovery: str = USUAL[1]
    samples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)  # by stage

    @property
    def total(self) -> int:
        """How many prunable weights there are."""
        return sum(total for _, total in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was found in a working directory."""

    config: dict[str, Any] | None
    fingerprint: str | None
    rows: list[Row]  # those pruned at once and fine-tuned, or where there are none all
    study: list[Row]  # all
    repeated: int  # rows of results.csv that a later row of the same cell replaced
    training: dict[int, list[dict[str, float]]]
    trajectories: dict[int, Trajectory]
    dense: dict[int, dict[str, Any]]
    details: dict[CellKey, Detail]

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a finished cell."""
        return sorted({row.seed for row in self.rows})

    @property
    def name(self) -> str:
        """What the settings call the experiment."""
        return str((self.config or {}).get("name", "experiment"))
