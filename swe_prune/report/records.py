"""Everything the report reads of an experiment: rows, trajectories, histograms."""

import dataclasses
from typing import Any

from swe_prune.ledger import Beside, Entry, Factors
from swe_prune.study.payback import Payback
from swe_prune.study.results import COLUMNS, Row

GROUPS = {
    "tensor": "Equal sparsity per tensor",
    "global": "Equal global sparsity",
    "row": "Equal sparsity per row",
    "rate": "The paper's rule",
}
"""What cells have in common that can be compared, with its title: a scope, or the paper's rule."""


@dataclasses.dataclass(frozen=True)
class CellGroup:
    """What cells have in common that can be compared.

    Attributes:
        rule: Key of `GROUPS`.
        part: Rules of the prunable weights that are pruned, as in `Row.include`; empty: all.
    """

    rule: str
    part: str = ""

    @property
    def by_rate(self) -> bool:
        """Whether the cells are pruned by the paper's rule, so that their sparsities differ."""
        return self.rule == "rate"

    @property
    def title(self) -> str:
        """Title of the comparison."""
        return GROUPS[self.rule] + (f", {self.part} alone" if self.part else "")

    @property
    def phrase(self) -> str:
        """The title as it stands inside a sentence."""
        return self.title[0].lower() + self.title[1:]


IDENTITY = COLUMNS[: COLUMNS.index("recovery") + 1]
"""The columns that tell one cell from another: all up to the recovery."""

CellKey = tuple[Any, ...]
"""The values of `IDENTITY`."""


def key_of(row: Row) -> CellKey:
    """Returns what tells the row's cell from all others."""
    return tuple(getattr(row, name) for name in IDENTITY)


def name_of(row: Row) -> str:
    """Returns the criterion or method with every setting that is not the usual one."""
    method = f"blockwise {row.method}" if row.method else ""
    schedule = "" if row.schedule == "one_shot" else row.schedule
    recovery = {"finetune": "", "none": "no recovery"}.get(row.recovery, row.recovery)
    restore = f"+ {row.restore}" if row.restore else ""
    parts = [row.criterion, method, restore, row.options, row.allocation, row.pattern, schedule]
    return " ".join(filter(None, [*parts, recovery]))


def name_and_part_of(row: Row) -> str:
    """Returns the name, and the part of the model that is pruned alone."""
    return name_of(row) + (f" of {row.include}" if row.include else "")


def group_of(row: Row) -> CellGroup:
    """Returns the comparison that the row belongs to."""
    return CellGroup(row.scope if row.rate is None else "rate", row.include)


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
    """What a cell's result.json holds beyond its row."""

    tensors: dict[str, tuple[int, int]]  # (kept, total)
    histogram: Histogram | None
    sample_kept: dict[str, list[bool]]
    samples: dict[str, list[dict[str, Any]]]  # text by stage, "pruned" or "finetuned"
    prices: dict[str, dict[str, Any]]  # `evaluation.prices.PriceErrors` by stage
    answers: dict[str, list[dict[str, Any]]]  # prices read off pictures, by stage
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `Row`, by column

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(total for _, total in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class CutModel:
    """A cut of a dense model, and the prices that it and the models next to it read."""

    name: str
    seed: int
    units: str
    sparsity: float  # share of the units to remove
    prices: dict[str, dict[str, Any]]  # by "cut", "recovered", and shapes from random weights


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything found in a working directory."""

    config: dict[str, Any] | None
    fingerprint: str | None
    wanted: int | None  # number of cells that the settings ask for; None if not known
    rows: list[Row]
    repeated: int  # rows of results.csv that a later row of the same cell replaced
    training: dict[int, list[dict[str, float]]]
    trajectories: dict[int, Trajectory]
    dense: dict[int, dict[str, Any]]
    details: dict[CellKey, Detail]
    ledger: list[Entry] = dataclasses.field(default_factory=list)
    factors: Factors | None = None
    beside: list[Beside] = dataclasses.field(default_factory=list)
    paybacks: list[Payback] = dataclasses.field(default_factory=list)
    cuts: list[CutModel] = dataclasses.field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a finished cell."""
        return sorted({row.seed for row in self.rows})

    @property
    def name(self) -> str:
        """Name of the experiment in its settings."""
        return str((self.config or {}).get("name", "experiment"))
