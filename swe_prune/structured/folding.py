"""Folding a removed unit into the partner that makes it redundant."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from swe_prune import patterns, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.layout import axes_of
from swe_prune.structured.activations import readers
from swe_prune.structured.group import Groups, check_keep
from swe_prune.structured.redundancy import Redundancy, Removal
from swe_prune.structured.refit import bias_name


@checked
def fold_units(
    params: PyTree,
    groups: Groups,
    keep: Mapping[str, Any],
    found: Mapping[str, Redundancy],
    samples: Mapping[str, Array],
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the parameters with removed units folded into their partners, for `cut` to cut.

    Args:
        params: Parameters before the cut.
        groups: Groups by name, without copies.
        keep: Indices of kept units by group, chosen by the scores of `found`.
        found: Order of removal by group.
        samples: Samples of the weights that read the units, by name.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.

    Raises:
        InputError: Errors of `readers`, or kept units that are not what the order of removal
            leaves.
    """
    of_group, leaves = readers(groups, params, layout), dict(tree.named_leaves(params))
    new: dict[str, Any] = {}
    for name, kept in check_keep(groups, keep).items():
        leaf = of_group[name]
        if name not in found or not np.array_equal(found[name].keep(kept.shape[-1]), kept):
            raise InputError(
                f"keep[{name!r}] is not what the order of removal leaves; choose by its scores, so "
                "that every removed unit has a partner"
            )
        removals = found[name].removed[: groups[name].units - len(kept)]
        axes, bias = axes_of(layout)(leaf, leaves[leaf].shape), bias_name(leaf, leaves)
        kernel_FxD, shifted_D = fold(
            patterns.as_matrix(leaves[leaf], axes),
            samples[leaf],
            removals,
            None if bias is None else leaves[bias].reshape(-1),
        )
        new[leaf] = patterns.from_matrix(jnp.asarray(kernel_FxD), leaves[leaf].shape, axes)
        if bias is not None:
            new[bias] = jnp.asarray(shifted_D).reshape(leaves[bias].shape)
    return tree.map_named(lambda name, leaf: new.get(name, leaf), params)


def fold(
    kernel_FxD: Float[Any, "F D"],
    samples_NxF: Float[Any, "N F"],
    removals: Sequence[Removal],
    bias_D: Float[Any, " D"] | None = None,
) -> tuple[Float[np.ndarray, "F D"], Float[np.ndarray, " D"] | None]:
    """Returns the projection that reads the units, with removed ones folded into their partners.

    By least squares over the samples z_k ≈ α z_l + β, so W_l += α W_k, and b += β W_k; without a
    bias β is 0. A partner that goes later takes along what was folded into it.

    Args:
        kernel_FxD: Kernel of the projection.
        samples_NxF: Samples of its inputs, not standardized.
        removals: Units that go, in their order.
        bias_D: Bias of the projection.
    """
    kernel = np.array(kernel_FxD, np.float64)
    bias = None if bias_D is None else np.array(bias_D, np.float64)
    samples = np.asarray(samples_NxF, np.float64)
    mean_F = samples.mean(0) if bias is not None else np.zeros(samples.shape[1])
    for removal in removals:
        unit, partner = removal.unit, removal.partner
        alpha = 0.0
        if partner is not None:
            own, other = samples[:, unit] - mean_F[unit], samples[:, partner] - mean_F[partner]
            power = other @ other
            alpha = own @ other / power if power > 0 else 0.0
            kernel[partner] += alpha * kernel[unit]
        if bias is not None:
            through = 0.0 if partner is None else alpha * mean_F[partner]
            bias += (mean_F[unit] - through) * kernel[unit]
        kernel[unit] = 0
    dtype = np.asarray(kernel_FxD).dtype
    return kernel.astype(dtype), None if bias is None else bias.astype(np.asarray(bias_D).dtype)
