"""Scores of units from their activations, and from the norms of their weights.

Like `unit_scores`, all return scores by group, float32 (units,) or (copies, units), for `choose`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from swe_prune import patterns, tree
from swe_prune.arguments import checked
from swe_prune.calibration import Moments
from swe_prune.errors import InputError, check_choice
from swe_prune.layout import axes_of
from swe_prune.structured.group import Group, Groups, placed
from swe_prune.structured.unit_scores import unit_scores

KINDS = ("activation_norm", "activation_variance", "input_norm_product", "weight_norm", "random")
OF_UNITS = tuple(kind for kind in KINDS if kind != "random")
"""Those that a command or a config offers: "random" is a criterion of weights there."""


@checked
def readers(groups: Groups, params: PyTree, layout: PyTree | None = None) -> dict[str, str]:
    """Returns the weight that reads the units of each group, by group.

    It is the one that has the units along its inputs: the down projection of an MLP, the output
    projection of attention. Its inputs are the activations of the units.

    Args:
        groups: Groups by name.
        params: Parameters, which may be abstract.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.

    Raises:
        InputError: A group has no such weight, or several, or the axes of a weight are not known.

    >>> groups = {"mlp": Group(4, {r"up/kernel$": -1, r"down/kernel$": -2})}
    >>> weights = {"up": {"kernel": jnp.ones((2, 4))}, "down": {"kernel": jnp.ones((4, 2))}}
    >>> readers(groups, weights)
    {'mlp': 'down/kernel'}
    """
    of, leaves = axes_of(layout), dict(tree.named_leaves(params))
    found: dict[str, list[str]] = {name: [] for name in groups}
    for name, places in placed(groups, params).items():
        for one in places:
            if leaves[name].ndim > 1 and one.along.axis in of(name, leaves[name].shape).inputs:
                found[one.group].append(name)
    for group, names in found.items():
        if len(names) != 1:
            many = f"several weights read ({', '.join(names)})" if names else "no weight reads"
            raise InputError(
                f"the units of group {group!r} are what {many}, so their activations cannot be "
                "told; score them by weights with structured.unit_scores"
            )
    return {group: names[0] for group, names in found.items()}


@checked
def activation_scores(
    groups: Groups,
    params: PyTree,
    kind: str,
    moments: Mapping[str, Moments] | None = None,
    *,
    layout: PyTree | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Returns the score of each unit by group, the lowest of which are to go.

    "activation_norm": √Σ over the sequences of the squared mean of |z| over a sequence (ModelOpt's
    Minitron). "activation_variance": the variance of z over the tokens. "input_norm_product":
    √(mean z²) ‖w_out‖, Wanda's score summed up over the outputs, as in FASP. "weight_norm":
    ‖w_in‖ ‖w_out‖, of the weights that write a unit and that read it. "random": uniform. A unit of
    several values, such as a head, has the root of the sum of the squares of the first, and the sum
    of the second.

    Args:
        groups: Groups by name.
        params: Parameters before the cut.
        kind: One of `KINDS`.
        moments: Moments of the weights that read the units (`readers`), by name, as
            `calibration.moments` returns them; for the kinds of activations.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.
        seed: Seed of "random".

    Raises:
        InputError: An unknown kind, a group whose units no one weight reads, or missing moments.
    """
    check_choice(kind, KINDS, "kind")
    if kind == "random":
        key = jax.random.key(seed)
        return {
            name: jax.random.uniform(tree.named_key(key, name), group.shape)
            for name, group in groups.items()
        }
    of_group = readers(groups, params, layout)
    if kind == "weight_norm":
        reading = set(of_group.values())
        written, read = (
            tree.map_leaves(
                lambda name, leaf, end=end: (
                    jnp.abs(leaf) if leaf.ndim > 1 and (name in reading) == end else None
                ),
                params,
            )
            for end in (False, True)
        )
        into, out = unit_scores(groups, written, "l2"), unit_scores(groups, read, "l2")
        return {name: into[name] * out[name] for name in groups}
    leaves, of = dict(tree.named_leaves(params)), axes_of(layout)
    found = {}
    for name, group in groups.items():
        leaf = of_group[name]
        if leaf not in (moments or {}):
            raise InputError(
                f"the activations of group {name!r} were not measured; give moments="
                f"calibration.moments(fn, params, batches, leaves={leaf!r})"
            )
        assert moments is not None
        own, weight = moments[leaf], leaves[leaf]
        matrix_RxC = patterns.as_matrix(weight, of(leaf, weight.shape))
        if own.mean.shape != matrix_RxC.shape[:-1]:
            raise InputError(
                f"the moments of {leaf!r} have shape {own.mean.shape}, and it has inputs "
                f"{matrix_RxC.shape[:-1]}; measure them on these parameters"
            )
        if kind == "activation_variance":
            found[name] = by_unit(group, own.variance).sum(-1)
            continue
        value_R = own.sequence
        if kind == "input_norm_product":
            norm_R = jnp.linalg.norm(matrix_RxC.astype(jnp.float32), axis=-1)
            value_R = norm_R * jnp.sqrt(own.square)
        found[name] = jnp.linalg.norm(by_unit(group, value_R), axis=-1)
    return found


def by_unit(group: Group, values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns values of the inputs of a weight as (units, width) or (copies, units, width)."""
    return values.reshape(*group.shape, -1)
