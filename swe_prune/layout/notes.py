"""What a walk knows: of a value of the computation, of a product, and of every weight."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from swe_prune.layout.views import Piece, View

Sums = dict[Any, Any]
"""Sums over products by `SumKey`."""


class Cell(NamedTuple):
    """A value of the computation, and what is known of it.

    Attributes:
        value: Array, or None if nothing is computed.
        views: Views of the weights that it holds.
        data: Whether it depends on the batch.
        sources: Weights whose products with data it comes from, with no such product in between.
        experts: Views of weights with copies, in which the dimensions that run over the copies
            are those of an activation that each copy gave; not `whole` where they may be outputs.
        index: Views of an index or of a one-hot, with the dimension that it counts.
        number: Number of the value, the same for values computed alike, in whatever shape. 0: none.
    """

    value: Any = None
    views: tuple[View, ...] = ()
    data: bool = False
    sources: frozenset[int] = frozenset()
    experts: tuple[View, ...] = ()
    index: tuple[View, ...] = ()
    number: int = 0

    @property
    def is_weight(self) -> bool:
        """Whether it is a function of weights alone whose axes are known."""
        return bool(self.views) and not self.data

    def without_value(self) -> "Cell":
        """Returns what is known of the value, without it and its number."""
        return self._replace(value=None, number=0)


def with_values(cells: Sequence[Cell], values: Sequence[Any]) -> list[Cell]:
    """Returns the cells with other values."""
    return [cell._replace(value=value) for cell, value in zip(cells, values, strict=True)]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a weight with activations.

    Attributes:
        view: View of the weight's operand.
        roles: Role of each dimension of that operand: "inputs", "outputs" or "copies".
        kind: "dot", "ragged" or "conv".
        other: The activations: array, or None if nothing is computed.
        contracted: Dimensions of the weight's operand and of the other one that are summed over.
        batched: Dimensions of both that run over the same index.
        params: Parameters of the equation.
        groups: Group sizes of a ragged product.
        shape: Shape of the weight.
        data: Whether the activations depend on the batch.
        numbers: Numbers of the weight's operand and of the activations.
    """

    view: View
    roles: Mapping[int, str]
    kind: str
    other: Any
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    params: Mapping[str, Any]
    groups: Any
    shape: tuple[int, ...]
    data: bool
    numbers: tuple[int, int]


Measure = Callable[[Product], Sums]


class SumKey(NamedTuple):
    """What a sum belongs to.

    Attributes:
        leaf: Index of the weight.
        labels: Pieces of the weight's axes over which the leading axes of the sum run.
        scanned: (depth, piece) of the scans that the sum has not left yet, outermost first.
        rest: What else tells sums apart that cannot be added.
    """

    leaf: int
    labels: tuple[Piece, ...]
    scanned: tuple[tuple[int, Piece], ...]
    rest: Any = ()


@dataclasses.dataclass
class Notes:
    """What a walk was told of the weights, and what it found.

    Attributes:
        shapes: Shape of each weight.
        members: Axes over members that all get the same activations, by weight, where a product
            further on shows them. A walk that is given them takes them for copies.
        uses: Roles of the axes by weight, each orientation once; None where an axis is in two.
        tentative: The same for products of a constant or another weight, and for those of what they
            gave. They tell something only of a weight that has no other.
        looked_up: Weights that a lookup reads.
        copies: Axes over copies by weight, of weights that meet the activations elementwise.
        ranked: Weights whose products are ranked.
        opaque: Operation that cannot be followed, by weight.
        expert_axes: Axes over experts that all get the same activations, by weight.
    """

    shapes: Sequence[tuple[int, ...]]
    members: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    uses: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    tentative: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    looked_up: set[int] = dataclasses.field(default_factory=set)
    copies: dict[int, set[int]] = dataclasses.field(default_factory=dict)
    ranked: set[int] = dataclasses.field(default_factory=set)
    opaque: dict[int, str] = dataclasses.field(default_factory=dict)
    expert_axes: dict[int, set[int]] = dataclasses.field(default_factory=dict)
