"""Redundant units of all layers of a model, from samples of their activations."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from swe_prune import patterns, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.layout import axes_of
from swe_prune.structured.activations import readers
from swe_prune.structured.group import Groups
from swe_prune.structured.redundancy import PATIENCE, Redundancy, Similarity, rank, similarity
from swe_prune.structured.unit_clusters import clusters_of

Found = dict[str, Redundancy]


@checked
def redundant_units(
    groups: Groups,
    params: PyTree,
    samples: Mapping[str, Array],
    kind: str = "mutual_information",
    *,
    method: str = "greedy",
    width: str = "alignment_unsupervised",
    clusters: int | None = None,
    threshold: float | None = None,
    patience: int = PATIENCE,
    seeds: Sequence[int] = (0,),
    distance: Callable[[Found], float] | None = None,
    layout: PyTree | None = None,
    progress: Callable[[str, Redundancy], None] | None = None,
    known: dict[str, Similarity] | None = None,
    **options: Any,
) -> Found:
    """Returns the order in which the units of each group go, each with its partner.

    Of a redundant pair goes the unit of the smaller ‖w_out‖ · std. The kernel widths are aligned to
    the outputs of the layer, the samples times w_out. One layer's similarities are in memory at a
    time.

    Args:
        groups: Groups by name, whose units are single values, such as the neurons of MLPs.
        params: Parameters before the cut.
        samples: Samples of the weights that read the units (`readers`) by name, as
            `calibration.samples` returns them.
        kind: What makes two units alike, of `similarity`.
        method: "greedy" or "pairs", of `rank`.
        width: Rule for the kernel widths.
        clusters: Number of clusters in which pairs are looked for first. None: all units are one.
        threshold: Threshold of "pairs".
        patience: Draws in vain of "pairs" after which the threshold is lowered.
        seeds: Seeds of "pairs" and of the clusters, of which the nearest to the dense model is
            taken.
        distance: Function from the order of removal by group to the divergence KL(dense ‖ pruned)
            of a model pruned by it, in nats; needed with several seeds.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.
        progress: Called with a group and its result.
        known: Similarities by group from an earlier call with the same samples, `kind` and widths,
            to which missing ones are added, F² numbers a layer. None: computed again.
        **options: Options of `kernel_width.widths`.

    Returns:
        Redundancies by group; of a group with copies by "group[copy]".

    Raises:
        InputError: Errors of `readers`, `similarity` and `rank`, samples that are missing or do not
            fit, or several seeds without a distance.
    """
    if not seeds or (len(seeds) > 1 and distance is None):
        raise InputError(
            f"seeds must be one, or several with distance= to compare them by, got {seeds!r}"
        )
    found: dict[int, Found] = {seed: {} for seed in seeds}
    for group, label, weight_FxD, own_NxF in _units(groups, params, samples, layout):
        similar = None if known is None else known.get(label)
        if similar is None:
            outputs_NxD = own_NxF @ weight_FxD
            similar = similarity(own_NxF, kind, width=width, reference=outputs_NxD, **options)
        if known is not None:
            known[label] = similar
        importance_F = np.linalg.norm(weight_FxD, axis=1) * np.std(own_NxF, axis=0)
        for seed in seeds:
            member_F = None if clusters is None else clusters_of(own_NxF, clusters, seed=seed)
            found[seed][label] = rank(
                similar, importance_F, method=method, threshold=threshold, patience=patience,
                clusters=member_F, seed=seed,
            )  # fmt: skip
        if progress is not None:
            progress(group, found[seeds[0]][label])
    return found[seeds[0]] if distance is None else best_of_seeds(found, distance)


def best_of_seeds(found: Mapping[int, Found], distance: Callable[[Found], float]) -> Found:
    """Returns the result of the seed whose pruned model is nearest to the dense one.

    Args:
        found: Order of removal by group, by seed.
        distance: Function from one of these to KL(dense ‖ pruned) on calibration text, in nats.

    Raises:
        InputError: A distance that is not a number.
    """
    apart = {seed: float(distance(one)) for seed, one in found.items()}
    for seed, value in apart.items():
        if math.isnan(value):
            raise InputError(f"the distance of seed {seed} is NaN; check the model and its text")
    best = min(apart, key=lambda seed: apart[seed])
    return {
        name: dataclasses.replace(one, distance=apart[best]) for name, one in found[best].items()
    }


@checked
def redundancy_scores(groups: Groups, found: Mapping[str, Redundancy]) -> dict[str, Array]:
    """Returns the place of each unit in the order of removal, scores for `choose`."""
    for name, group in groups.items():
        copies = [name] if group.copies is None else [f"{name}[{n}]" for n in range(group.copies)]
        lacking = [one for one in copies if one not in found]
        if lacking:
            raise InputError(
                f"found has no {lacking[0]!r}; give what redundant_units returns for these groups"
            )
    return {
        name: jnp.asarray(
            found[name].scores()
            if group.copies is None
            else np.stack([found[f"{name}[{at}]"].scores() for at in range(group.copies)])
        )
        for name, group in groups.items()
    }


def _units(
    groups: Groups, params: PyTree, samples: Mapping[str, Array], layout: PyTree | None
) -> list[tuple[str, str, Float[np.ndarray, "F D"], Float[np.ndarray, "N F"]]]:
    """Returns the name, label, reading weight and samples of each group and copy."""
    leaves, of = dict(tree.named_leaves(params)), axes_of(layout)
    found = []
    for name, leaf in readers(groups, params, layout).items():
        group = groups[name]
        if leaf not in samples:
            raise InputError(
                f"the activations of group {name!r} were not sampled; give "
                f"calibration.samples(fn, params, batches, leaves={leaf!r})"
            )
        own, weight = np.asarray(samples[leaf], np.float32), leaves[leaf]
        matrix = np.asarray(patterns.as_matrix(weight, of(leaf, weight.shape)), np.float32)
        copies = matrix.shape[:-2]
        if own.shape[:-2] != copies or own.shape[-1] != matrix.shape[-2]:
            raise InputError(
                f"the samples of {leaf!r} have shape {own.shape}, and it has inputs "
                f"{matrix.shape[:-1]}; sample them on these parameters"
            )
        if group.shape != (*copies, matrix.shape[-2]):
            raise InputError(
                f"a unit of group {name!r} is not a single activation, so units cannot be compared "
                "by pairs; take the neurons of an MLP"
            )
        if not copies:
            found.append((name, name, matrix, own))
            continue
        flat = own.reshape(-1, *own.shape[-2:]), matrix.reshape(-1, *matrix.shape[-2:])
        found += [
            (name, f"{name}[{at}]", weight_FxD, own_NxF)
            for at, (own_NxF, weight_FxD) in enumerate(zip(*flat, strict=True))
        ]
    return found
