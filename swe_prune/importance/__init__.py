"""A score per weight: the larger, the more it is worth keeping.

One module per family; importing them here fills the registry.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.errors import InputError
from swe_prune.importance import magnitude, trajectory
from swe_prune.importance.registry import Criterion, get, names, register
from swe_prune.trajectory import TrajectoryStats, read

__all__ = ["Criterion", "get", "magnitude", "names", "register", "score", "trajectory"]


def score(
    name: str,
    params: PyTree,
    *,
    stats: TrajectoryStats | None = None,
    prunable: PyTree | None = None,
    seed: int = 0,
    **options: Any,
) -> PyTree:
    """Returns the scores of a criterion: a float32 pytree like the parameters, None where dense.

    A pure function of its arrays; call it eagerly or inside your own jit.

    Args:
        name: one of `names()`.
        params: pytree of weights, floating, any dtype.
        stats: trajectory statistics, for a criterion that reads them.
        prunable: bool pytree; None: the weights that `stats` tracks, or without statistics
            `tree.prunable(params)`.
        seed: for `random`; each tensor draws from its own stream, named by its path.
        **options: of the criterion, such as `rate`.

    Raises:
        InputError: unknown name or option, or a need that was not given.

    >>> score("magnitude", {"up": {"kernel": jnp.array([[1.0, -2.0]])}})["up"]["kernel"].tolist()
    [[1.0, 2.0]]
    """
    criterion = get(name)
    for option in options:
        if option not in criterion.options:
            has = ", ".join(criterion.options) or "none"
            raise InputError(f"criterion {name!r} has no option {option!r}; its options: {has}")
    if criterion.measures and stats is None:
        raise InputError(
            f"criterion {name!r} needs trajectory statistics; pass stats= from "
            f"trajectory.init(params, measures={criterion.measures!r}) updated while training"
        )
    inputs = {m: read(stats, m) for m in criterion.measures if stats is not None}
    if prunable is not None and not any(jax.tree.leaves(prunable)):
        raise InputError("no weight is prunable, so there is nothing to score; widen the rules")
    if prunable is None:
        prunable = _tracked(params, stats) if stats is not None else tree.prunable(params)

    def leaf(path: str, weight: Any, chosen: bool, *measured: Any) -> Any:
        if not chosen:
            return None
        given: dict[str, Any] = dict(zip(inputs, measured, strict=True))
        for measure, value in given.items():
            if value is None:
                raise InputError(
                    f"{path!r} is prunable but {measure!r} was not tracked for it; pass the same "
                    "prunable= to trajectory.init and importance.score"
                )
        if "weight" in criterion.needs:
            given["weight"] = weight.astype(jnp.float32)
        if "key" in criterion.needs:
            given["key"] = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return criterion.function(**given, **options).astype(jnp.float32)

    return tree.map_named(leaf, params, prunable, *inputs.values())


def _tracked(params: PyTree, stats: TrajectoryStats) -> PyTree:
    buffer = next(iter(stats.buffers.values()))
    return tree.map_named(lambda _, weight, tracked: tracked is not None, params, buffer)
