"""The shape of what goes: single weights, n of m, blocks, rows, columns, neurons.

A pattern ties weights together into units that stay or go as one. `units` makes one score of each
unit's scores, selection ranks the units, and each mask is spread back over its weights. n:m ties
nothing together but fixes how many of every m consecutive inputs stay.

A row is all the inputs of one output, as in PyTorch's (out, in) and in `scope="row"`: a column of
a Flax kernel. A column is all the outputs of one input. A neuron is a hidden unit with all the
weights that lead into it and out of it, in every tensor that is coupled to it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from swe_prune import select
from swe_prune.errors import InputError, check_choice

NAMES = ("n:m", "block:RxC", "row", "column", "neuron")

FEED_FORWARD: Mapping[str, str] = {
    r"^(.*?)(?:(?:up|gate)(?:_proj)?|gate_up_proj|c_fc|fc_in|wi(?:_\d)?)/kernel(?:/value)?$": "out",
    r"^(.*?)(?:down|mlp/c_proj|fc_out|down_proj|wo)/kernel(?:/value)?$": "in",
}
"""The couplings of "neuron" unless others are given: a feed-forward layer's kernels in and out."""

REDUCTIONS: Mapping[str, Callable[..., Array]] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "l2": lambda x, axis: jnp.sqrt(jnp.sum(x**2, axis=axis)),
    "abs_sum": lambda x, axis: jnp.abs(jnp.sum(x, axis=axis)),
}
"""How the scores of a unit's weights become the unit's."""

ACROSS: Mapping[str, Callable[[Sequence[Array]], Array]] = {
    "sum": lambda xs: sum(xs[1:], xs[0]),
    "mean": lambda xs: sum(xs[1:], xs[0]) / len(xs),
    "max": lambda xs: jnp.max(jnp.stack(xs), axis=0),
    "prod": lambda xs: math.prod(xs[1:], start=xs[0]),
    "first": lambda xs: xs[0],
}
"""How a neuron's scores in coupled tensors become one, by LLM-Pruner's names."""


@dataclasses.dataclass(frozen=True)
class Units:
    """Scores to rank, and what a mask of them means for the weights.

    Attributes:
        name: what an error calls them.
        score: float32, one element a unit.
        weights: how many weights each unit has, in all its tensors.
        tensors: the names of the tensors that they are of.
        spread: from a bool mask of `score.shape` to the masks of those tensors, by name.
    """

    name: str
    score: Float[Array, "..."]
    weights: int
    tensors: tuple[str, ...]
    spread: Callable[[Array], dict[str, Array]]


def parse_n_of_m(pattern: str) -> tuple[int, int]:
    """Returns (n, m) of "n:m", which keeps n of every m.

    Raises:
        InputError: malformed, or n not between 1 and m.

    >>> parse_n_of_m("2:4")
    (2, 4)
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"pattern {pattern!r} is not 'n:m' with 1 ≤ n ≤ m; give e.g. '2:4'")
    return int(match[1]), int(match[2])


def parse_block(pattern: str) -> tuple[int, int]:
    """Returns (r, c) of "block:rxc", r inputs by c outputs.

    Raises:
        InputError: malformed, or a side of 0.

    >>> parse_block("block:4x2")
    (4, 2)
    """
    match = re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", pattern)
    if not match:
        raise InputError(
            f"pattern {pattern!r} is not 'block:RxC' with R inputs and C outputs of 1 or more; "
            "give e.g. 'block:4x4'"
        )
    return int(match[1]), int(match[2])


def is_n_of_m(pattern: str) -> bool:
    """Returns whether a pattern is of the kind n:m, well formed or not.

    Raises:
        InputError: it is of no kind that there is.
    """
    if pattern in ("row", "column", "neuron") or pattern.startswith("block"):
        return False
    if re.search(r"[a-zA-Z]", pattern) and ":" not in pattern:
        check_choice(pattern, NAMES, "pattern")
    return True


def units(
    pattern: str | None,
    scores: Mapping[str, Array],
    input_axes: Callable[[str, tuple[int, ...]], tuple[int, ...]],
    *,
    reduce: str = "sum",
    across: str = "sum",
    couplings: Mapping[str, str] | None = None,
) -> list[Units]:
    """Returns the units of all the tensors; with None every weight is its own.

    Args:
        pattern: None, "block:RxC", "row", "column" or "neuron".
        scores: by name, float32.
        input_axes: as in `tree.input_axes`.
        reduce: of `REDUCTIONS`, over a unit's weights in one tensor.
        across: of `ACROSS`, over a neuron's tensors.
        couplings: for "neuron": rules (`re.search`) to "out", where neurons are the tensor's
            outputs, or "in"; tensors whose rules capture the same text belong together.

    Raises:
        InputError: an unknown name, blocks that do not fill a tensor, or couplings that fit none.
    """
    check_choice(reduce, REDUCTIONS, "reduce")
    check_choice(across, ACROSS, "across")
    if pattern is None:
        return [
            Units(name, score, 1, (name,), lambda mask, name=name: {name: mask})
            for name, score in scores.items()
        ]
    if pattern == "neuron":
        rules = FEED_FORWARD if couplings is None else couplings
        groups = couple(scores, rules)
        return [
            _neurons(key, members, scores, input_axes, REDUCTIONS[reduce], ACROSS[across])
            for key, members in groups.items()
        ]
    return [
        _of_matrix(pattern, name, score, input_axes(name, score.shape), REDUCTIONS[reduce])
        for name, score in scores.items()
    ]


def _of_matrix(
    pattern: str,
    name: str,
    score: Array,
    axes: tuple[int, ...],
    reduce: Callable[..., Array],
) -> Units:
    matrix = as_matrix(score, axes)
    inputs, outputs = matrix.shape
    r, c = {"row": (inputs, 1), "column": (1, outputs)}.get(pattern) or parse_block(pattern)
    for side, length, what in ((r, inputs, "inputs"), (c, outputs, "outputs")):
        if length % side:
            raise InputError(
                f"{name!r} has {length} {what}, which blocks of {side} do not divide; exclude it "
                "or choose another block"
            )
    blocks = matrix.reshape(inputs // r, r, outputs // c, c)

    def spread(mask: Array) -> dict[str, Array]:
        whole = jnp.broadcast_to(mask[:, None, :, None], blocks.shape).reshape(matrix.shape)
        return {name: from_matrix(whole, score.shape, axes)}

    return Units(name, reduce(blocks, axis=(1, 3)), r * c, (name,), spread)


def couple(names: Any, rules: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Returns by captured text the (tensor, "in" or "out") that belong together.

    Raises:
        InputError: a side that is neither, no regular expression, or a rule that matches nothing.

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
                f"coupling {rule!r} is no regular expression: {error}; correct it"
            ) from error
        if not found:
            raise InputError(
                f"coupling {rule!r} matches no scored tensor; give couplings= of rules to 'in' or "
                f"'out' for the kernels around the neurons. Tensors: {', '.join(list(names)[:8])}"
            )
        for name, match in found:
            groups.setdefault(" ".join(filter(None, match.groups())), []).append((name, side))
    return groups


def _neurons(
    key: str,
    members: list[tuple[str, str]],
    scores: Mapping[str, Array],
    input_axes: Callable[..., tuple[int, ...]],
    reduce: Callable[..., Array],
    across: Callable[[Sequence[Array]], Array],
) -> Units:
    axes = {name: input_axes(name, scores[name].shape) for name, _ in members}
    matrices = {name: as_matrix(scores[name], axes[name]) for name, _ in members}
    counts = {name: matrices[name].shape[side == "out"] for name, side in members}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise InputError(f"coupled tensors differ in neurons: {told}; correct the couplings")
    if len({side for _, side in members}) < 2:
        raise InputError(
            f"the neurons of {members[0][0]!r} are coupled to nothing on their other side; give "
            "couplings= with a rule for the kernels before and one for those after"
        )
    parts = [reduce(matrices[name], axis=int(side == "in")) for name, side in members]

    def spread(mask: Array) -> dict[str, Array]:
        masks = {}
        for name, side in members:
            whole = jnp.broadcast_to(
                mask[None, :] if side == "out" else mask[:, None], matrices[name].shape
            )
            masks[name] = from_matrix(whole, scores[name].shape, axes[name])
        return masks

    weights = sum(matrix.size for matrix in matrices.values()) // next(iter(counts.values()))
    return Units(key, across(parts), weights, tuple(name for name, _ in members), spread)


def n_of_m_mask(
    score_RxC: Float[Array, "R C"], n: int, m: int, name: str = "scores"
) -> Bool[Array, "R C"]:
    """Returns the mask that keeps the n largest of every m consecutive inputs of each output.

    Ties are broken by the lower input index.

    Args:
        score_RxC: scores of a kernel, inputs along the first axis.
        n: kept of each group, 1 ≤ n ≤ m.
        m: group size; must divide R.
        name: what an error calls the scores.
    """
    rows, columns = score_RxC.shape
    grouped = score_RxC.reshape(rows // m, m, columns)
    return select.top_k_mask(grouped, n, axes=(1,), name=name).reshape(rows, columns)


def check_divides(name: str, inputs: int, m: int) -> None:
    """Raises InputError when groups of m do not fill the inputs of a kernel."""
    if inputs % m:
        raise InputError(
            f"{name!r} has {inputs} inputs, which groups of {m} do not divide; "
            "exclude it or choose another m"
        )


def as_matrix(score: Float[Array, "..."], inputs: tuple[int, ...]) -> Float[Array, "R C"]:
    """Returns a kernel as (inputs, outputs), given the axes along which its inputs run."""
    return jnp.transpose(score, _inputs_first(score.ndim, inputs)).reshape(
        math.prod(score.shape[axis] for axis in inputs), -1
    )


def from_matrix(
    mask_RxC: Bool[Array, "R C"], shape: tuple[int, ...], inputs: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Returns what `as_matrix` made a matrix of, back in the kernel's shape."""
    order = _inputs_first(len(shape), inputs)
    back = [order.index(axis) for axis in range(len(shape))]
    return mask_RxC.reshape([shape[axis] for axis in order]).transpose(back)


def _inputs_first(ndim: int, inputs: tuple[int, ...]) -> list[int]:
    return [*inputs, *(axis for axis in range(ndim) if axis not in inputs)]
