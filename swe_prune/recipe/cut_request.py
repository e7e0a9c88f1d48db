"""The request to cut units out of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from swe_prune import importance
from swe_prune.choices import Zeros
from swe_prune.recipe.request import Recipe

Units = Literal["neurons", "heads", "query_heads", "vision_neurons", "layers"]
Reduce = Literal["sum", "mean", "l2", "max"]
"""Choices of a request; see `structured.groups` and `structured.unit_scores`."""


@dataclasses.dataclass(frozen=True)
class CutRecipe:
    """A request to cut units out of a model; see `structured.cut_model`.

    Attributes:
        units: What is removed as a whole.
        sparsity: Share of the units to remove, in [0, 1). None: a budget says how many.
        criterion: Registered criterion, by whose scores of weights the units are ranked, or one of
            units: of their activations, of whole layers, or of redundancy; see
            `structured.CRITERIA`.
        restore: Whether a least-squares refit of the projections that read what goes makes up for
            it.
        options: Options of a criterion of weights, by name.
        reduce: How the scores of the weights of a unit become one; see `structured.unit_scores`.
        multiple: Number that the count of kept units is a multiple of. None: 8 of neurons, 1 of
            others.
        zeros: What weights that are 0 already count in a unit's score: "keep" 0, "free" what the
            criterion says.
        seed: Seed of random draws.
    """

    units: Units = "neurons"
    sparsity: float | None = None
    criterion: str = "input_norm_product"
    restore: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reduce: Reduce = "l2"
    multiple: int | None = None
    zeros: Zeros = "keep"
    seed: int = 0

    @property
    def recipe(self) -> Recipe | None:
        """Request for the scores of weights; None of a criterion that scores units.

        >>> CutRecipe(criterion="swe", sparsity=0.5).recipe.needs, CutRecipe().recipe
        (frozenset({'late_mean'}), None)
        """
        if self.criterion not in importance.names():
            return None
        sparsity = 0.0 if self.sparsity is None else self.sparsity
        return Recipe(
            self.criterion, self.options, sparsity=sparsity, seed=self.seed, zeros=self.zeros
        )

    @property
    def reads_batches(self) -> bool:
        """Whether calibration batches are needed.

        >>> CutRecipe(criterion="magnitude").reads_batches, CutRecipe().reads_batches
        (False, True)
        """
        of_weights = self.recipe
        if of_weights is None:
            return self.restore or self.criterion != "weight_norm"
        return self.restore or of_weights.reads_batches
