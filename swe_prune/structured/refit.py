"""Making up for cut units: the projections that read the units that stay are refitted.

Source: FASP, arXiv 2501.09412; the solver is `blockwise.least_squares`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune import patterns, tree
from swe_prune.arguments import checked
from swe_prune.blockwise.admm import squared_error
from swe_prune.blockwise.least_squares import DAMPING, least_squares
from swe_prune.calibration import Moments
from swe_prune.errors import InputError
from swe_prune.layout import Axes, axes_of
from swe_prune.masks.fitting import check_mask
from swe_prune.structured.cutting import unit_mask
from swe_prune.structured.group import Groups


@dataclasses.dataclass(frozen=True)
class RefitReport:
    """What a refit did to a weight, or to one copy of it.

    Attributes:
        name: Name of the weight, with the number of the copy.
        removed: Number of inputs that are gone.
        inputs: Number of inputs that it had.
        before: Mean square of what the outputs lose without the refit, relative to theirs.
        after: The same with what was kept.
        refitted: Whether the refit was kept.
    """

    name: str
    removed: int
    inputs: int
    before: float
    after: float
    refitted: bool


@checked
def refit(
    params: PyTree,
    groups: Groups,
    keep: Mapping[str, Any],
    measured: Mapping[str, Any],
    *,
    holdout: Mapping[str, Moments] | None = None,
    layout: PyTree | None = None,
    damping: float | Sequence[float] = DAMPING,
) -> tuple[PyTree, tuple[RefitReport, ...]]:
    """Returns the parameters with the weights that read units refitted, for `cut` to cut.

    Each weight W of which units are inputs, such as the down projection of an MLP or the output
    projection of attention, becomes the W' that minimizes ‖X W' − X W‖² with 0 for what is removed.
    With the means of the inputs, its bias, if it has one, takes up the mean of the difference. With
    nothing removed nothing changes.

    Args:
        params: Parameters before the cut.
        groups: Groups by name.
        keep: Indices of kept units by group, as `choose` returns them.
        measured: Moments with Gram matrices by the names of those weights, from
            `calibration.moments(gram=True)`; or what `calibration.inputs(hessian=True)`
            returns, which has no means.
        holdout: Moments of other text, on which a refit must be the better one to be kept. None:
            it must be so on `measured`.
        layout: Pytree of `Axes` like the parameters. None: Flax's convention by name.
        damping: Share of the mean of a Gram matrix's diagonal that pulls to the weights as they
            are. Of several, each weight takes the best one on `holdout`.

    Returns:
        Parameters of the same shapes, in which the refitted weights are 0 for removed inputs, and
        a report for each weight.

    Raises:
        InputError: Errors of `cut` and `blockwise.least_squares`, a weight that was not measured,
            or several dampings without other text.

    >>> from swe_prune.structured import Group
    >>> params = {"down": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}}
    >>> x = jnp.array([[1.0, 1.0], [3.0, 2.0]])
    >>> mean, gram = x.mean(0), x.T @ x / 2
    >>> moments = Moments(jnp.array(2.0), mean, jnp.diag(gram), mean, gram)
    >>> new, _ = refit(params, {"mlp": Group(2, {"down/kernel": 0})}, {"mlp": [1]},
    ...                {"down/kernel": moments}, damping=0.0)
    >>> new["down"]["kernel"].ravel().tolist(), new["down"]["bias"].tolist()
    ([0.0, 4.0], [-1.0])
    """
    dampings = tuple(np.ravel(damping).tolist())
    if not dampings or (len(dampings) > 1 and holdout is None):
        raise InputError(
            f"damping must be one number, or several to choose from on holdout=, got {damping!r}"
        )
    mask = unit_mask(params, groups, keep)
    check_mask(mask, params)
    leaves = dict(tree.named_leaves(params))
    of = axes_of(layout)
    new: dict[str, Any] = {}
    reports: list[RefitReport] = []
    for name, kept in tree.named_leaves(mask):
        if kept is None or kept.ndim < 2 or bool(kept.all()):
            continue
        axes = of(name, leaves[name].shape)
        kept_xRxC = np.asarray(patterns.as_matrix(kept, axes))
        rows_xR = np.asarray(kept_xRxC.any(-1))
        if rows_xR.all():
            continue  # only outputs go
        moments = _moments(name, measured, rows_xR.shape)
        held = None if holdout is None else _moments(name, holdout, rows_xR.shape)
        made = _refitted(
            name, leaves, bias_name(name, leaves), axes, rows_xR, moments, held, dampings
        )
        new |= made[0]
        reports += made[1]
    return tree.map_named(lambda name, leaf: new.get(name, leaf), params), tuple(reports)


def _refitted(
    name: str,
    leaves: Mapping[str, Any],
    of_bias: str | None,
    axes: Axes,
    rows_xR: np.ndarray,
    moments: Moments,
    held: Moments | None,
    dampings: Sequence[float],
) -> tuple[dict[str, Any], list[RefitReport]]:
    """Returns a weight and its bias, each copy refitted, and the reports."""
    weight = leaves[name]
    weight_xRxC = patterns.as_matrix(weight, axes)
    width, inputs = weight_xRxC.shape[-1], weight_xRxC.shape[-2]
    copies = weight_xRxC.reshape(-1, inputs, width)
    keeps = rows_xR.reshape(-1, inputs)
    bias = None if of_bias is None else leaves[of_bias]
    if bias is not None and bias.size != len(copies) * width:
        bias = None  # of another shape, such as one that copies share
    biases: Any = [None] * len(copies) if bias is None else bias.reshape(len(copies), width)
    kernels, shifted, reports = [], [], []
    for at, (one_RxC, keep_R) in enumerate(zip(copies, keeps, strict=True)):
        label = name if len(copies) == 1 else f"{name}[{at}]"
        own, other = (_of_copy(some, at) for some in (moments, held))
        assert own is not None
        kernel_RxC, bias_C, report = _one(label, one_RxC, biases[at], keep_R, own, other, dampings)
        kernels.append(kernel_RxC)
        shifted.append(bias_C)
        reports.append(report)
    matrix_xRxC = jnp.stack(kernels).reshape(weight_xRxC.shape)
    found = {name: patterns.from_matrix(matrix_xRxC, weight.shape, axes)}
    if bias is not None and of_bias is not None:
        found[of_bias] = jnp.stack(shifted).reshape(bias.shape)
    return found, reports


def _one(
    name: str,
    weight_RxC: Array,
    bias_C: Array | None,
    keep_R: np.ndarray,
    moments: Moments,
    held: Moments | None,
    dampings: Sequence[float],
) -> tuple[Array, Array | None, RefitReport]:
    """Returns a kernel and its bias, refitted if that is better than without, and the report."""
    gram_RxR, mean_R = moments.gram, None if bias_C is None else moments.mean
    assert gram_RxR is not None
    # With a bias the means are made up for by it, so what varies is fitted.
    varying_RxR = gram_RxR if mean_R is None else gram_RxR - jnp.outer(mean_R, mean_R)
    alone_RxC = jnp.where(keep_R[:, None], weight_RxC, 0)
    judge = moments if held is None else held
    before = after = _lost(weight_RxC, bias_C, alone_RxC, bias_C, judge)
    best_RxC, best_C, better = alone_RxC, bias_C, False
    for damping in dampings:
        new_RxC, _ = least_squares(weight_RxC, varying_RxR, keep_R, damping)
        new_C = bias_C
        if bias_C is not None and mean_R is not None:
            lost_RxC = weight_RxC.astype(jnp.float32) - new_RxC.astype(jnp.float32)
            new_C = (bias_C + mean_R @ lost_RxC).astype(bias_C.dtype)
        error = _lost(weight_RxC, bias_C, new_RxC, new_C, judge)
        if error < after:
            best_RxC, best_C, after, better = new_RxC, new_C, error, True
    whole = _lost(weight_RxC, None, jnp.zeros_like(weight_RxC), None, judge)
    before, after = (error / whole if whole > 0 else 0.0 for error in (before, after))
    gone = int((~keep_R).sum())
    return best_RxC, best_C, RefitReport(name, gone, len(keep_R), before, after, better)


def _lost(
    weight_RxC: Array,
    bias_C: Array | None,
    new_RxC: Array,
    new_C: Array | None,
    moments: Moments,
) -> float:
    """Returns the mean over the tokens of ‖x (W' − W) + b' − b‖², from their moments."""
    assert moments.gram is not None
    error = squared_error(new_RxC, weight_RxC, moments.gram)
    if bias_C is not None and new_C is not None:
        shift_C = (new_C - bias_C).astype(jnp.float32)
        apart_RxC = new_RxC.astype(jnp.float32) - weight_RxC.astype(jnp.float32)
        error += shift_C @ (2 * moments.mean @ apart_RxC + shift_C)
    return max(float(error), 0.0)


def _moments(name: str, measured: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """Returns the moments of a weight, one row for each copy."""
    found = measured.get(name)
    hessian = measured.get("hessian")
    if found is None and hessian is not None:
        gram = dict(tree.named_leaves(hessian)).get(name)
        if gram is not None:
            square = jnp.diagonal(gram, axis1=-2, axis2=-1)
            found = Moments(jnp.ones(gram.shape[:-2]), square * jnp.nan, square, square, gram)
    if not isinstance(found, Moments) or found.gram is None:
        raise InputError(
            f"the inputs of {name!r} were not measured, and their Gram matrix is needed; give "
            f"calibration.moments(fn, params, batches, leaves={name!r}, gram=True)"
        )
    if found.gram.shape != (*shape, shape[-1]):
        raise InputError(
            f"the Gram matrix of {name!r} has shape {found.gram.shape}, and it has inputs {shape}; "
            "measure it on these parameters"
        )
    return found


def _of_copy(moments: Moments | None, at: int) -> Moments | None:
    if moments is None:
        return None
    gram = moments.gram
    assert gram is not None
    mean, square, sequence = (
        x.reshape(-1, x.shape[-1])[at] for x in (moments.mean, moments.square, moments.sequence)
    )
    gram = gram.reshape(-1, *gram.shape[-2:])[at]
    return Moments(moments.tokens.reshape(-1)[at], mean, square, sequence, gram)


def bias_name(name: str, leaves: Mapping[str, Any]) -> str | None:
    """Returns the name of the bias next to a kernel, or None."""
    bias = "/".join([*name.split("/")[:-1], "bias"])
    return bias if leaves.get(bias) is not None else None
