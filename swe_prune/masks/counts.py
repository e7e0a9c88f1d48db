"""How many weights a mask keeps, exactly, per tensor and in all."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import counting, tree
from swe_prune.arguments import checked
from swe_prune.masks.fitting import check_mask, map_masked


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many weights a mask keeps of how many, as Python ints."""

    kept: int
    total: int

    @property
    def pruned(self) -> int:
        """Weights removed."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """Share removed; 0 of nothing."""
        return self.pruned / self.total if self.total else 0.0


@dataclasses.dataclass(frozen=True)
class Summary(Tally):
    """The whole mask, and each masked tensor by name; dense tensors are not in it."""

    tensors: dict[str, Tally] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, tensors: dict[str, Tally]) -> "Summary":
        """Returns the tallies with their sum."""
        kept, total = (sum(getattr(one, n) for one in tensors.values()) for n in ("kept", "total"))
        return cls(kept, total, tensors)


def summary(mask: PyTree) -> Summary:
    """Returns exact counts per tensor and in all.

    Args:
        mask: Bool pytree, None where dense.

    Raises:
        InputError: A leaf is neither a bool array nor None.

    >>> import jax.numpy as jnp
    >>> summary({"w": jnp.array([True, False, False]), "b": None}).kept
    1
    """
    check_mask(mask)
    named = tree.present(mask)
    counts = jax.device_get(kept_counts(named))
    return Summary.of(
        {name: Tally(int(counts[name]), tree.size(leaf)) for name, leaf in named.items()}
    )


@jax.jit
def kept_counts(masks: dict[str, Array]) -> dict[str, counting.Count]:
    """Returns how many are True of each, by name."""
    return {name: counting.count_true([mask]) for name, mask in masks.items()}


@checked
def revived(params: PyTree, mask: PyTree) -> counting.Count:
    """Returns how many pruned weights are not 0, exactly: a proof to compute inside a step.

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.

    Raises:
        InputError: The mask is not one of these parameters.

    >>> import jax.numpy as jnp
    >>> int(revived({"w": jnp.array([0.5, 0.0])}, {"w": jnp.array([False, False])}))
    1
    """
    return _count(lambda weight, keep: ~keep & (weight != 0), params, mask)


@checked
def zeros(params: PyTree, mask: PyTree) -> int:
    """Returns how many of the weights that have a mask are exactly 0.

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.

    Raises:
        InputError: The mask is not one of these parameters.

    >>> import jax.numpy as jnp
    >>> zeros({"w": jnp.array([0.5, 0.0])}, {"w": jnp.array([False, True])})
    1
    """
    return int(_count(lambda weight, _: jnp.equal(weight, 0), params, mask))


def _count(
    condition: Callable[[Array, Array], Array], params: PyTree, mask: PyTree
) -> counting.Count:
    """Returns for how many masked weights a condition of weight and mask holds."""
    found: list[Array] = []
    map_masked(lambda weight, keep: found.append(condition(weight, keep)), params, mask)
    return counting.count_true(found)
