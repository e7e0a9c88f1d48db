"""What the report knows of an experiment: rows, trajectories, histograms, as they were written."""

import dataclasses
from typing import Any

RULES = ("std", "tensor", "global", "row")

CellKey = tuple[int, str, str, float]
"""(seed, rule, criterion, requested): what names one cell of the study."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished cell; losses are validation nats per token, None where not measured yet."""

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

    @property
    def key(self) -> CellKey:
        """What names the cell."""
        return (self.seed, self.rule, self.criterion, self.requested)


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

    @property
    def total(self) -> int:
        """How many prunable weights there are."""
        return sum(total for _, total in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was found in a working directory."""

    config: dict[str, Any] | None
    fingerprint: str | None
    rows: list[Row]
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
