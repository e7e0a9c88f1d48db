"""The pruning request."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swe_prune import allocation, importance, patterns
from swe_prune.blockwise.sparsegpt import BLOCK, check_sparsity
from swe_prune.calibration.measures import MEASURES
from swe_prune.choices import Method, Restore, Scope, Zeros

METHOD_OPTIONS: Mapping[str, Any] = {"block": BLOCK, "damping": 0.01}
"""Options of the block-by-block methods, with their defaults; see `blockwise.prune_blocks`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pruning request.

    Attributes:
        criterion: Name of a registered criterion, by whose scores all tensors are pruned at once.
        options: Options of the criterion or of the method, by name.
        allocation: Name of the rule that distributes the sparsity over tensors. None: the scope
            does.
        sparsity: Share of the prunable weights to remove, in [0, 1). None with a rate, or with an
            n:m pattern, which fixes it.
        rate: Multiple of the standard deviation, for the rule of arXiv 2502.17071: per tensor,
            weights whose score does not exceed `rate` standard deviations are removed.
        scope: Where the sparsity is met: "tensor", "global" or "row"; see `masks.by_sparsity`.
        pattern: Shape of what is removed, such as "2:4" or "row"; see `masks.by_sparsity`. None:
            single weights.
        method: Name of a method of `blockwise.METHODS`, which prunes one block after the other and
            takes the place of a criterion.
        seed: Seed of random draws.
        zeros: What becomes of weights that are 0 already: "keep" counts them as removed first,
            "free" treats them like the others; see `importance.score`.
        restore: "admm": the weights that stay make up for those that go, block after block, for
            the mask that the criterion or the method chose; "local": each block is trained towards
            the dense model's activations; "admm+local": both; see `blockwise.prune_blocks`.
            "least_squares": the exact update for masks of whole inputs.
        max_sparsity: Largest share that any tensor loses, with scope "global" and allocations that
            rank all tensors together; None: of the scope everything, of an allocation its default.
    """

    criterion: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allocation: str | None = None
    sparsity: float | None = None
    rate: float | None = None
    scope: Scope = "tensor"
    pattern: str | None = None
    method: Method | None = None
    seed: int = 0
    zeros: Zeros = "keep"
    restore: Restore | None = None
    max_sparsity: float | None = None

    @property
    def name(self) -> str:
        """What ranks the weights, as tables show it.

        >>> Recipe("swe", sparsity=0.5).name, Recipe(method="wanda", sparsity=0.5).name
        ('swe', 'blockwise:wanda')
        """
        ranked = str(self.criterion) if self.method is None else f"blockwise:{self.method}"
        return ranked if self.restore is None else f"{ranked}+{self.restore}"

    @property
    def n_of_m(self) -> bool:
        """Whether the pattern is n:m, which fixes the sparsity."""
        return self.pattern is not None and patterns.is_n_of_m(self.pattern)

    @property
    def target(self) -> float | None:
        """Share to remove; None with a rate.

        >>> Recipe("magnitude", pattern="1:4").target
        0.75
        """
        if self.rate is not None:
            return None
        return check_sparsity(self.sparsity, self.pattern if self.n_of_m else None)[0]

    @property
    def option_text(self) -> str:
        """Options and the largest sparsity as `name=value`, sorted by name and joined by commas.

        >>> Recipe("forecast", {"horizon": 1.0}, sparsity=0.5).option_text
        'horizon=1'
        """
        given = dict(self.options)
        if self.max_sparsity is not None:
            given["max_sparsity"] = self.max_sparsity
        shown = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in given.items()}
        return ",".join(f"{name}={shown[name]}" for name in sorted(shown))

    @property
    def needs(self) -> frozenset[str]:
        """What the scores read besides the weights: trajectory measures and `MEASURED` names."""
        # An allocation by curvature takes the optimizer's where the criterion does.
        curved = {"gradient_square"} if self.allocates_by("curvature") else set()
        if self.method is not None:
            # OWL reads Wanda's scores of the dense model, for SparseGPT as well.
            return frozenset(curved | ({"input_norm"} if self.allocates_by("scores") else set()))
        criterion = importance.get(str(self.criterion))
        own = {*criterion.measures, *criterion.measured}
        return frozenset(own if "second_moment" in own else own | curved)

    @property
    def reads_batches(self) -> bool:
        """Whether calibration batches are needed."""
        by_allocation = self.allocates_by("batches")
        return self.updates_weights or by_allocation or bool(self.needs & MEASURES)

    @property
    def updates_weights(self) -> bool:
        """Whether the weights that stay may change too."""
        return self.method is not None or self.restore is not None

    @property
    def scores_follow_weights(self) -> bool:
        """Whether scores can be computed again from the weights alone, while they still train."""
        if self.method is not None:
            return False
        return not set(importance.get(str(self.criterion)).needs) - {"weight", "key", "inputs"}

    def allocates_by(self, need: str) -> bool:
        """Returns whether the allocation reads something, such as "curvature"."""
        return self.allocation is not None and need in allocation.get(self.allocation).needs
