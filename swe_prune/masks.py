"""Scores to bool masks, and what masks are for: apply, count, and keep zeros zero.

A mask is a bool pytree like the parameters, True where a weight stays, None where the tensor is
dense. Masks made eagerly are checked (NaN, ranges); inside a jit the same code runs unchecked.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from swe_prune import allocation, patterns, select, tree
from swe_prune.errors import InputError

_LARGEST = float(jnp.finfo(jnp.float32).max)
SCOPES = ("tensor", "global", "row")


def by_std(scores: PyTree, rate: float | Array, *, spread: float | None = None) -> PyTree:
    """Returns the masks of the paper's rule, score > std(score) · rate in every tensor.

    The standard deviation is the unbiased one over the whole tensor. The rate is a multiplier: see
    `allocation.gaussian_sparsity` for the sparsity to expect.

    Args:
        scores: float32 pytree, None where dense.
        rate: multiple of the standard deviation, 0 or more.
        spread: compare with this instead of the tensor's std(score); 1.0 for `swe_spread`, whose
            scores come in units of their threshold (`importance.get(name).spread`).

    Raises:
        InputError: a negative or non-finite rate, NaN scores, infinite ones (which have no
            standard deviation), or a rate that keeps no weight.

    >>> by_std({"w": jnp.array([0.0, 1.0, 5.0])}, 1.0)["w"].tolist()
    [False, False, True]
    """
    if not _is_traced([rate]) and not 0 <= float(rate) <= _LARGEST:
        raise InputError(f"rate = {rate!r} is no multiple of a standard deviation; give 0 or more")
    named = _scored(scores)
    traced = _is_traced([*named.values(), rate])
    kept, nans, undefined = (_std_masks if traced else _std_masks_jit)(
        list(named.values()), jnp.asarray(rate, jnp.float32), spread
    )
    if not traced:
        select.reject_nan(list(named), nans)
        allocation.reject_no_spread(list(named), undefined)
        counts = _counts(dict(zip(named, kept, strict=True)))
        if not any(int(n) for n in counts.values()):
            raise InputError(f"rate = {rate!r} prunes every weight; lower it")
    return _like(scores, named, kept)


def _std_masks(
    scores: list[Array], rate: Array, spread: Any
) -> tuple[list[Array], list[Array], list[Array]]:
    spreads, nans, undefined = allocation.spreads(scores, spread)
    masks = [score > of_one * rate for score, of_one in zip(scores, spreads, strict=True)]
    return masks, nans, undefined


_std_masks_jit = jax.jit(_std_masks)


def by_sparsity(
    scores: PyTree,
    sparsity: float,
    scope: str = "tensor",
    *,
    pattern: str | None = None,
    input_axes: Callable[[str, tuple[int, ...]], tuple[int, ...]] = tree.input_axes,
) -> PyTree:
    """Returns masks that remove exactly the requested share of the lowest scores.

    Args:
        scores: float32 pytree, None where dense.
        sparsity: share to remove, in [0, 1); the count is `allocation.removed_count`.
        scope: where the share is met: "tensor", in each tensor; "global", over all together,
            which ranks tensors against each other; "row", in each output of a kernel, over its
            inputs (the rows of a PyTorch weight, the columns of a Flax kernel).
        pattern: "n:m" keeps n of every m consecutive inputs; the sparsity must be 1 − n/m.
        input_axes: along which axes the inputs of a kernel run; the default knows Flax.

    Raises:
        InputError: sparsity outside [0, 1), unknown scope, a pattern that the shapes or the
            sparsity do not admit, NaN scores, or no scores at all.

    >>> by_sparsity({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
    [True, False, False, True]
    """
    allocation.check_sparsity(sparsity)
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r} is none of {', '.join(SCOPES)}; give one of them")
    named = _scored(scores)
    if pattern is not None:
        kept = _by_pattern(named, sparsity, pattern, input_axes)
    elif scope == "global":
        total = sum(map(tree.size, named.values()))
        keep = total - allocation.removed_count(total, sparsity)
        kept = select.top_k_masks(list(named.values()), keep, names=list(named))
    else:
        kept = []
        for name, score in named.items():
            axes = _normal_axes(name, score.shape, input_axes) if scope == "row" else None
            size = tree.size(score) if axes is None else math.prod(score.shape[a] for a in axes)
            keep = size - allocation.removed_count(size, sparsity)
            kept.append(select.top_k_mask(score, keep, axes=axes, name=name))
    return _like(scores, named, kept)


def _by_pattern(
    named: dict[str, Array], sparsity: float, pattern: str, input_axes: Callable[..., Any]
) -> list[Array]:
    n, m = patterns.parse_n_of_m(pattern)
    if abs(1 - n / m - sparsity) > 1e-9:
        raise InputError(
            f"pattern {pattern!r} keeps {n} of {m}, a sparsity of {1 - n / m:g}, not {sparsity!r}; "
            "make the two agree"
        )
    matrices, axes = {}, {}
    for name, score in named.items():
        axes[name] = _normal_axes(name, score.shape, input_axes)
        matrices[name] = patterns.as_matrix(score, axes[name])
        patterns.check_divides(name, matrices[name].shape[0], m)
    return [
        patterns.from_matrix(
            patterns.n_of_m_mask(matrix, n, m, name), named[name].shape, axes[name]
        )
        for name, matrix in matrices.items()
    ]


def _normal_axes(
    name: str, shape: tuple[int, ...], input_axes: Callable[..., Any]
) -> tuple[int, ...]:
    axes = tuple(input_axes(name, shape))
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise InputError(
            f"input_axes gave {axes} for {name!r} of shape {shape}; give axes that it has"
        )
    return tuple(sorted({axis % len(shape) for axis in axes}))


def _is_traced(values: list[Any]) -> bool:
    return any(isinstance(value, Tracer) for value in values)


def _scored(scores: PyTree) -> dict[str, Array]:
    named = {name: leaf for name, leaf in tree.named_leaves(scores) if leaf is not None}
    if not named:
        raise InputError("no scores were given: every leaf is None, that is dense; widen the rules")
    return named


def _like(scores: PyTree, named: dict[str, Array], kept: list[Array]) -> PyTree:
    by_name = dict(zip(named, kept, strict=True))
    return tree.map_named(lambda name, _: by_name[name], scores)


def apply(params: PyTree, mask: PyTree) -> PyTree:
    """Returns the parameters with exact zeros where the mask is False; dtypes are kept.

    A select rather than a product: the same cost in a compiled step, and 0 · inf is NaN, −w · 0 a
    negative zero.

    Raises:
        InputError: mask and parameters differ in structure, or a mask in shape from its weight.
    """

    def leaf(name: str, keep: Any, weight: Any) -> Any:
        if keep is None:
            return weight
        if jnp.shape(keep) != jnp.shape(weight):
            raise InputError(
                f"the mask of {name!r} has shape {jnp.shape(keep)} and the weight "
                f"{jnp.shape(weight)}; make the mask from scores of these parameters"
            )
        return jnp.where(keep, weight, 0)

    return tree.map_leaves(leaf, mask, params)


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


def summary(mask: PyTree) -> Summary:
    """Returns exact counts per tensor and in all.

    >>> summary({"w": jnp.array([True, False, False]), "b": None}).kept
    1
    """
    named = {name: leaf for name, leaf in tree.named_leaves(mask) if leaf is not None}
    counts = jax.device_get(_counts(named))
    tensors = {name: Tally(int(counts[name]), tree.size(leaf)) for name, leaf in named.items()}
    return Summary(
        kept=sum(tally.kept for tally in tensors.values()),
        total=sum(tally.total for tally in tensors.values()),
        tensors=tensors,
    )


@jax.jit
def _counts(masks: dict[str, Array]) -> dict[str, tree.Count]:
    return {name: tree.count_true([mask]) for name, mask in masks.items()}


def keep(
    optimizer: optax.GradientTransformation, mask: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with pruned weights held at exactly 0, and their moments too.

    Gradients of pruned weights are zeroed before the optimizer sees them; after it, their update
    is −w (so the sum is exactly 0 even for a weight that was not 0 yet, if it was finite:
    `apply` the mask first to be rid of an infinity) and every part of its
    state that is laid out like the parameters is zeroed. The state is the inner optimizer's own:
    wrap or unwrap in the middle of a run without converting anything.

    Args:
        optimizer: any optax chain, or anything with `init` and `update`.
        mask: bool pytree, None where dense. It is captured: in a jit of your own, pass the mask
            as an argument and build the optimizer inside, so that it is no constant of the program.
    """
    inner = optax.with_extra_args_support(optimizer)

    def masked(tree_of: PyTree) -> PyTree:
        return apply(tree_of, mask)

    def hold_state(state: PyTree) -> PyTree:
        return optax.tree_utils.tree_map_params(
            # Each part of the state as a whole: inside it, leaves may be missing or divided.
            inner,
            lambda part: _held(part, mask),
            state,
            is_leaf=lambda _: True,
        )

    def init(params: PyTree) -> PyTree:
        return inner.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(masked(updates), state, params, **extra)
        if params is None:
            return masked(updates), hold_state(state)
        # In the wider of the two dtypes, lest −w be rounded and a remainder stay.
        held = tree.map_leaves(
            lambda _, m, u, w: u if m is None else jnp.where(m, u, jnp.negative(w)),
            mask,
            updates,
            params,
        )
        return held, hold_state(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _held(part: PyTree, mask: PyTree) -> PyTree:
    """Returns a part of an optimizer's state with 0 where its leaf at a mask's path is pruned."""
    masks = dict(jax.tree_util.tree_flatten_with_path(mask)[0])

    def hold(path: Any, moment: Any) -> Any:
        kept = masks.get(path)
        if kept is None or jnp.shape(moment) != kept.shape:
            return moment  # dense, or a factored statistic, which is no single weight's
        return jnp.where(kept, moment, jnp.zeros_like(moment))

    return jax.tree_util.tree_map_with_path(hold, part)
