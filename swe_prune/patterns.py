"""Shapes of what is pruned: single weights, n of m, blocks, rows, columns, neurons.

A pattern groups weights into units that are retained or pruned as a whole. `units` reduces the
scores of each unit to one score, selection ranks the units, and each unit mask is broadcast back
to the weights. n:m does not group weights, but retains exactly n of every m consecutive inputs.

A row is all the inputs of one output, as in PyTorch's (out, in) layout and in `scope="row"`; it is
a column of a Flax kernel. A column is all the outputs of one input. A neuron is a hidden unit with
all the weights that lead into and out of it, in all the tensors that are coupled to it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from swe_prune import select
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, listed
from swe_prune.layout import Axes, AxesOf

NAMES = ("n:m", "block:RxC", "row", "column", "neuron")

FEED_FORWARD: Mapping[str, str] = {
    r"^(.*?)(?:(?:up|gate)(?:_proj)?|gate_up_proj|c_fc|fc_in|wi(?:_\d)?)/kernel(?:/value)?$": "out",
    r"^(.*?)(?:down|mlp/c_proj|fc_out|down_proj|wo)/kernel(?:/value)?$": "in",
}
"""Default couplings of "neuron": the kernels into and out of a feed-forward layer's neurons."""

REDUCTIONS: Mapping[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "l2": lambda x, axis: jnp.sqrt(jnp.sum(x**2, axis=axis)),
    "abs_sum": lambda x, axis: jnp.abs(jnp.sum(x, axis=axis)),
}
"""Reductions from the scores of a unit's weights to the score of the unit."""

ACROSS: Mapping[str, Callable[[Sequence[Array]], Array]] = {
    "sum": lambda xs: sum(xs[1:], xs[0]),
    "mean": lambda xs: sum(xs[1:], xs[0]) / len(xs),
    "max": lambda xs: jnp.max(jnp.stack(xs), axis=0),
    "prod": lambda xs: math.prod(xs[1:], start=xs[0]),
    "first": lambda xs: xs[0],
}
"""Reductions of a neuron's scores over the coupled tensors, with LLM-Pruner's names."""


@dataclasses.dataclass(frozen=True)
class Units:
    """Unit scores to rank, and the mapping from unit masks to weight masks.

    Attributes:
        name: Name of the units in error messages.
        score: Float32 scores, one element per unit.
        weights: Number of weights per unit, over all its tensors.
        tensors: Names of the tensors that the units belong to.
        spread: Function from a bool mask of `score.shape` to the masks of those tensors by name.
        copies: Axes of `score` over copies of the tensors, each with units of its own.
    """

    name: str
    score: Float[Array, "..."]
    weights: int
    tensors: tuple[str, ...]
    spread: Callable[[Array], dict[str, Array]]
    copies: tuple[int, ...] = ()


@checked
def parse_n_of_m(pattern: str) -> tuple[int, int]:
    """Returns (n, m) of the pattern "n:m", which retains n of every m weights.

    Raises:
        InputError: If the pattern is malformed, or n is not between 1 and m.

    >>> parse_n_of_m("2:4")
    (2, 4)
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"pattern must be 'n:m' with 1 ≤ n ≤ m, such as '2:4', got {pattern!r}")
    return int(match[1]), int(match[2])


@checked
def parse_block(pattern: str) -> tuple[int, int]:
    """Returns (r, c) of the pattern "block:rxc", r inputs by c outputs.

    Raises:
        InputError: If the pattern is malformed, or a side is 0.

    >>> parse_block("block:4x2")
    (4, 2)
    """
    match = re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", pattern)
    if not match:
        raise InputError(
            "pattern must be 'block:RxC' with R inputs and C outputs of 1 or more, such as "
            f"'block:4x4', got {pattern!r}"
        )
    return int(match[1]), int(match[2])


def is_n_of_m(pattern: str) -> bool:
    """Returns whether a pattern is of the kind n:m, whether or not it is well formed.

    Raises:
        InputError: If the pattern is of no known kind.
    """
    if not isinstance(pattern, str):
        check_choice(pattern, NAMES, "pattern")
    if pattern in ("row", "column", "neuron") or pattern.startswith("block"):
        return False
    if re.search(r"[a-zA-Z]", pattern) and ":" not in pattern:
        check_choice(pattern, NAMES, "pattern")
    return True


def units(
    pattern: str | None,
    scores: Mapping[str, Array],
    axes_of: AxesOf,
    *,
    copies_of: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: (),
    reduce: str = "sum",
    across: str = "sum",
    couplings: Mapping[str, str] | None = None,
) -> list[Units]:
    """Returns the units of all the tensors.

    Args:
        pattern: Name of the pattern: "block:RxC", "row", "column" or "neuron". If None, every
            weight is a unit.
        scores: Float32 scores of the tensors by name.
        axes_of: Function from a tensor's name and shape to its `layout.Axes`; see
            `layout.axes_of`. Not called without a pattern.
        copies_of: Function from a tensor's name and shape to its axes over copies, for no pattern.
        reduce: Reduction over a unit's weights in one tensor, a key of `REDUCTIONS`.
        across: Reduction over a neuron's tensors, a key of `ACROSS`.
        couplings: Sides of the coupled tensors by rule (`re.search`), for "neuron": "out" where
            neurons are the tensor's outputs, "in" where they are its inputs. Tensors whose rules
            capture the same text are coupled. If None, `FEED_FORWARD`.

    Raises:
        InputError: If a name is unknown, blocks do not divide a tensor, or couplings do not match.
    """
    check_choice(reduce, REDUCTIONS, "reduce")
    check_choice(across, ACROSS, "across")
    # Without a pattern, every weight is a unit.
    if pattern is None:
        return [
            Units(
                name,
                score,
                1,
                (name,),
                lambda mask, name=name: {name: mask},
                copies_of(name, score.shape),
            )
            for name, score in scores.items()
        ]
    # Neurons span several tensors, which the rules couple.
    if pattern == "neuron":
        rules = FEED_FORWARD if couplings is None else couplings
        groups = couple(scores, rules)
        return [
            _neurons(key, members, scores, axes_of, REDUCTIONS[reduce], ACROSS[across])
            for key, members in groups.items()
        ]
    return [
        _of_matrix(pattern, name, score, axes_of(name, score.shape), REDUCTIONS[reduce])
        for name, score in scores.items()
    ]


def _of_matrix(
    pattern: str,
    name: str,
    score: Array,
    axes: Axes,
    reduce: Callable[..., Array],
) -> Units:
    # All other patterns are blocks of r inputs by c outputs of one kernel.
    matrix = as_matrix(score, axes)
    *copies, inputs, outputs = matrix.shape
    whole_row, whole_column = (max(inputs, 1), 1), (1, max(outputs, 1))
    r, c = {"row": whole_row, "column": whole_column}.get(pattern) or parse_block(pattern)
    for side, length, what in ((r, inputs, "inputs"), (c, outputs, "outputs")):
        if length % side:
            raise InputError(
                f"{name!r} has {length} {what}, which are not a multiple of the block's {side}; "
                "exclude it or choose another block"
            )
    blocks = matrix.reshape(*copies, inputs // r, r, outputs // c, c)

    def spread(mask: Array) -> dict[str, Array]:
        whole = jnp.broadcast_to(mask[..., :, None, :, None], blocks.shape).reshape(matrix.shape)
        return {name: from_matrix(whole, score.shape, axes)}

    unit_scores = reduce(blocks, axis=(-3, -1))
    return Units(name, unit_scores, r * c, (name,), spread, tuple(range(len(copies))))


@checked
def couple(names: Iterable[str], rules: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Returns the coupled tensors, as pairs of name and "in" or "out", by captured text.

    Args:
        names: Names of the tensors.
        rules: Side, "in" or "out", by regular expression.

    Raises:
        InputError: If a side is neither "in" nor "out", or a rule is not a regular expression or
            matches nothing.

    >>> couple(["a/up/kernel", "a/down/kernel"], FEED_FORWARD)
    {'a/': [('a/up/kernel', 'out'), ('a/down/kernel', 'in')]}
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for rule, side in rules.items():
        check_choice(side, ("in", "out"), f"side of coupling {rule!r}")
        try:
            found = [(name, match) for name in names if (match := re.search(rule, name))]
        except re.error as error:
            raise InputError(
                f"coupling {rule!r} is not a regular expression: {error}; fix it"
            ) from error
        if not found:
            raise InputError(
                f"coupling {rule!r} matches no scored tensor; give couplings= of rules to 'in' or "
                f"'out' for the kernels around the neurons. Tensors: {listed(names, 8, str)}"
            )
        # Tensors whose rules capture the same text share their neurons.
        for name, match in found:
            groups.setdefault(" ".join(filter(None, match.groups())), []).append((name, side))
    return groups


def _neurons(
    key: str,
    members: list[tuple[str, str]],
    scores: Mapping[str, Array],
    axes_of: AxesOf,
    reduce: Callable[..., Array],
    across: Callable[[Sequence[Array]], Array],
) -> Units:
    # View every tensor as inputs by outputs; its neurons run along one of the two.
    axes = {name: axes_of(name, scores[name].shape) for name, _ in members}
    matrices = {name: as_matrix(scores[name], axes[name]) for name, _ in members}
    counts = {
        name: (*matrices[name].shape[:-2], matrices[name].shape[-1 if side == "out" else -2])
        for name, side in members
    }
    # All coupled tensors must have the same neurons, and both sides must be present.
    if len(set(counts.values())) > 1:
        told = ", ".join(
            f"{name!r} has {' x '.join(map(str, count))}" for name, count in counts.items()
        )
        raise InputError(
            f"coupled tensors differ in their number of neurons: {told}; correct the couplings"
        )
    if len({side for _, side in members}) < 2:
        raise InputError(
            f"the neurons of {members[0][0]!r} are coupled on one side only; give couplings= with "
            "a rule for the kernels before the neurons and one for the kernels after them"
        )
    # Reduce each tensor to one score per neuron.
    parts = [reduce(matrices[name], axis=-1 if side == "in" else -2) for name, side in members]

    def spread(mask: Array) -> dict[str, Array]:
        masks = {}
        for name, side in members:
            whole = jnp.broadcast_to(
                mask[..., None, :] if side == "out" else mask[..., :, None], matrices[name].shape
            )
            masks[name] = from_matrix(whole, scores[name].shape, axes[name])
        return masks

    neurons = next(iter(counts.values()))
    weights = sum(matrix.size for matrix in matrices.values()) // math.prod(neurons)
    tensors = tuple(name for name, _ in members)
    return Units(key, across(parts), weights, tensors, spread, tuple(range(len(neurons) - 1)))


@checked
def n_of_m_mask(
    score_RxC: Float[Array, "*copies R C"], n: int, m: int, name: str = "scores"
) -> Bool[Array, "*copies R C"]:
    """Returns the mask that retains the n largest of every m consecutive inputs of each output.

    Ties are broken in favour of the lower input index.

    Args:
        score_RxC: Scores of a kernel, or of copies of it, with inputs along the last axis but one.
        n: Number of weights to retain per group, 1 ≤ n ≤ m.
        m: Group size, which must divide R.
        name: Name of the scores in error messages.
    """
    *copies, rows, columns = score_RxC.shape
    check_divides(name, rows, m)
    grouped = score_RxC.reshape(*copies, rows // m, m, columns)
    mask = select.top_k_mask(grouped, n, axes=(grouped.ndim - 2,), name=name)
    return mask.reshape(score_RxC.shape)


def check_agrees(pattern: str, sparsity: float) -> None:
    """Raises InputError if a sparsity is not that of a pattern n:m."""
    n, m = parse_n_of_m(pattern)
    if abs(1 - n / m - sparsity) > 1e-6:  # a float32 share has no more digits
        raise InputError(
            f"pattern {pattern!r} keeps {n} of {m}, a sparsity of {1 - n / m:g}, not {sparsity!r}; "
            "make the two agree"
        )


def check_divides(name: str, inputs: int, m: int) -> None:
    """Raises InputError if the number of inputs of a kernel is not a multiple of m."""
    if m < 1 or inputs % m:
        raise InputError(
            f"{name!r} has {inputs} inputs, which are not a multiple of m = {m}; "
            "exclude it or choose another m"
        )


def as_matrix(score: Float[Array, "..."], axes: Axes) -> Float[Array, "*copies R C"]:
    """Reshapes a kernel to a matrix (inputs, outputs), or to one for each of its copies."""
    copies, inputs, outputs = (
        [score.shape[axis] for axis in some] for some in (axes.copies, axes.inputs, axes.outputs)
    )
    return axes.moved(score).reshape(*copies, math.prod(inputs), math.prod(outputs))


def from_matrix(
    mask_RxC: Bool[Array, "*copies R C"], shape: tuple[int, ...], axes: Axes
) -> Bool[Array, "..."]:
    """Reshapes what `as_matrix` made back to the shape of the kernel."""
    order = (*axes.copies, *axes.inputs, *axes.outputs)
    back = [order.index(axis) for axis in range(len(shape))]
    return mask_RxC.reshape([shape[axis] for axis in order]).transpose(back)
