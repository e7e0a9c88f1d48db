"""ECoFLaP's importance of a block by forward passes alone, and the allocation that follows.

ECoFLaP (Sung, Yoon and Bansal, "Efficient coarse-to-fine layer-wise pruning for vision-language
models", ICLR 2024; ylsung/ECoFLaP), with the perturbations of MeZO (Malladi et al., 2023).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.allocation import rounding
from swe_prune.allocation.filling import water_fill, within_groups
from swe_prune.allocation.groups import Groups, grouped
from swe_prune.allocation.rounding import Allocation
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice

MEASURES = ("gradient", "weight_gradient", "weight_gradient_square")
REDUCTIONS = ("sum", "mean")


@checked
def ecoflap(
    loss: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    batches: Iterable[PyTree],
    sparsity: float,
    *,
    max_sparsity: float | None = None,
    groups: Groups = "block",
    reduce: str = "sum",
    measure: str = "gradient",
    epsilon: float = 1e-3,
    seed: int = 0,
    prunable: PyTree | None = None,
) -> Allocation:
    """Returns ECoFLaP's coarse allocation: blocks keep weights in proportion to their importance.

    The importance of a group is that of its tensors (`zeroth_order_importance`) taken together;
    `water_fill` makes of it how many weights each keeps. Every tensor of a group loses the same
    share. The fine step is yours: Wanda's scores within each row, at these sparsities.

    Args:
        loss: (params, batch) → scalar; compiled once for each shape of batch.
        params: Pytree of weights.
        batches: Pytrees of arrays, streamed; each draws its own perturbations. The paper takes
            batches of 8, 128 examples in all.
        sparsity: Share to remove of all the prunable weights, in [0, 1).
        max_sparsity: Largest share that a group may lose; None: sparsity + 0.1, at most 1.
        groups: Which tensors share a sparsity; see `grouped`.
        reduce: "sum" of the importances of a group's tensors, as the paper mostly does; "mean"
            divides it by the group's weights.
        measure: Measure of importance, one of `MEASURES`; see `zeroth_order_importance`.
        epsilon: Size ε of the perturbations, positive.
        seed: Seed of the perturbations.
        prunable: Bool pytree; None: `tree.prunable(params)`.

    Raises:
        InputError: An unknown name, a sparsity out of range or reach, groups that do not cover the
            tensors, no batches, or a loss that is not a finite scalar.
    """
    rounding.check_sparsity(sparsity)
    check_choice(reduce, REDUCTIONS, "reduce")
    sizes = {
        name: tree.size(leaf)
        for name, leaf in tree.prunable_leaves(params, prunable, "allocate").items()
    }
    members = grouped(sizes, groups)
    whole = [sum(sizes[name] for name in names) for names in members.values()]
    water_fill([0.0] * len(whole), whole, sparsity, max_sparsity)  # bad input shows before work
    importance = zeroth_order_importance(
        loss, params, batches, measure=measure, epsilon=epsilon, seed=seed, prunable=prunable
    )
    scores = [math.fsum(importance[name] for name in names) for names in members.values()]
    if reduce == "mean":
        scores = [score / max(n, 1) for score, n in zip(scores, whole, strict=True)]
    return within_groups(water_fill(scores, whole, sparsity, max_sparsity), members, sizes)


@checked
def zeroth_order_importance(
    loss: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    measure: str = "gradient",
    epsilon: float = 1e-3,
    seed: int = 0,
    prunable: PyTree | None = None,
) -> dict[str, float]:
    """Returns the importance of every prunable tensor by forward passes, without a gradient.

    g = |L(W + ε z) − L(W − ε z)| / (2 ε), z ~ N(0, 1) for this tensor alone and the same on both
    sides, summed over the batches, a z for each. "gradient" is Σ g; "weight_gradient" Σ g Σ|w|;
    "weight_gradient_square" Σ g² Σ w².

    Two forward passes for each tensor and batch. Beside the parameters there is one tensor in
    memory: z is drawn again from its key for the second side, which is
    `fold_in(fold_in(key(seed), number of the batch), crc32(name))`, so that neither the order nor
    the sharding of the tensors changes it.

    Args:
        loss: (params, batch) → scalar.
        params: Pytree of weights, any floating dtype; the perturbed tensor keeps its own.
        batches: Pytrees of arrays, streamed.
        measure: Measure of importance, one of `MEASURES`.
        epsilon: Size ε of the perturbations, positive.
        seed: Seed of the perturbations.
        prunable: Bool pytree; None: `tree.prunable(params)`.

    Raises:
        InputError: An unknown measure, an epsilon that is not positive, no batches, or a loss that
            is not a finite scalar.
    """
    check_choice(measure, MEASURES, "measure")
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon = {epsilon} is not positive and finite; give one such as 1e-3")
    probed = tree.prunable_leaves(params, prunable, "allocate")
    names = [name for name, _ in tree.named_leaves(params)]
    leaves, treedef = jax.tree.flatten(params, is_leaf=tree.is_none)
    loss = jax.jit(loss)

    def at(i: int, key: Array, scale: float, batch: PyTree, number: int) -> float:
        moved = list(leaves)
        moved[i] = _perturbed(leaves[i], key, scale, _named_sharding(leaves[i]))
        return _scalar(loss(treedef.unflatten(moved), batch), names[i], number)

    power = 2 if measure == "weight_gradient_square" else 1
    sums = dict.fromkeys(probed, 0.0)
    number = -1
    for number, batch in enumerate(batches):
        for i, name in enumerate(names):
            if name in probed:
                key = _key(seed, number, name)
                ends = [at(i, key, scale, batch, number) for scale in (epsilon, -epsilon)]
                sums[name] += (abs(ends[0] - ends[1]) / (2 * epsilon)) ** power
    if number < 0:
        raise InputError("no batches were given, so there is no loss to probe; give at least one")
    if measure == "gradient":
        return sums
    return {name: sums[name] * float(_power_sum(leaf, power)) for name, leaf in probed.items()}


def _key(seed: int, number: int, name: str) -> Array:
    drawn = jax.random.fold_in(jax.random.key(seed), number)
    return tree.named_key(drawn, name)


def _perturbed_traced(
    weight: Float[Array, "..."], key: Array, scale: Array, sharding: NamedSharding | None
) -> Float[Array, "..."]:
    noise = jax.random.normal(key, weight.shape, jnp.float32)
    moved = (weight.astype(jnp.float32) + scale * noise).astype(weight.dtype)
    return moved if sharding is None else jax.lax.with_sharding_constraint(moved, sharding)


_perturbed = jax.jit(_perturbed_traced, static_argnums=3)


@jax.jit
def _power_sum(weight: Array, power: int) -> Array:
    return jnp.sum(jnp.abs(weight.astype(jnp.float32)) ** power)


def _named_sharding(weight: Any) -> NamedSharding | None:
    sharding = getattr(weight, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _scalar(value: Any, name: str, number: int) -> float:
    if jnp.shape(value) != ():
        raise InputError(
            f"loss must return a scalar, got shape {jnp.shape(value)}; return its mean"
        )
    if not math.isfinite(value):
        raise InputError(
            f"the loss is {float(value)} on batch {number} with {name!r} perturbed; find the bad "
            "batch, or perturb by a smaller epsilon"
        )
    return float(value)
