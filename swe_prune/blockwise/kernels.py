"""One kernel: its mask, the update of the weights that stay, and what is said of it."""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from swe_prune import counting, importance, masks, patterns
from swe_prune.blockwise import wanda
from swe_prune.blockwise.admm import admm
from swe_prune.blockwise.least_squares import DAMPING as REFIT_DAMPING
from swe_prune.blockwise.least_squares import least_squares
from swe_prune.blockwise.sparsegpt import SolverReport, sparsegpt
from swe_prune.choices import Method, Restore
from swe_prune.layout import Axes

METHODS = typing.get_args(Method)
CRITERIA = {"wanda": "wanda", "wanda_variant": "wanda", "magnitude": "magnitude"}
"""Criterion that a method ranks by, where no solver chooses the mask."""
RESTORES = (None, *typing.get_args(Restore))
DAMPING: Mapping[str, float] = {"sparsegpt": 0.01, "admm": 0.1, "least_squares": REFIT_DAMPING}
"""Default share of the Hessian's mean diagonal that is added to it, by method."""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What was done to a kernel.

    Attributes:
        name: Name of the kernel.
        removed: Number of weights that the mask removes.
        total: Number of weights.
        solver: Report of SparseGPT's or ADMM's solver; None for other methods.
        restored: Whether the remaining weights were restored and the restored values retained.
        held_out: How far the block's outputs on the held-out batches are from the dense model's
            with the masks alone, with every kernel restored, and with what was kept; a mean over
            tokens of squared distances relative to the dense outputs. None: nothing was judged.
        gave_up: What was better off with the masks alone on the held-out batches, "kernel", "block"
            or "model", so that the weights are those; None: they are restored, or nothing was.
    """

    name: str
    removed: int
    total: int
    solver: SolverReport | None = None
    restored: bool = False
    held_out: tuple[float, float, float] | None = None
    gave_up: str | None = None

    @property
    def sparsity(self) -> float:
        """Share removed."""
        return self.removed / self.total


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over a kernel's inputs by kind, "square", "outer" or "cross", of n sequences."""

    of: dict[str, Array]
    n: int

    def taken(self, kind: str, weight_RxC: Array) -> Array | None:
        """Pops an R x R sum and returns it scaled by 2/n; None if absent."""
        if kind not in self.of:
            return None
        return _scaled(self.of.pop(kind).reshape([len(weight_RxC)] * 2), 2 / self.n)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels are pruned: the method or the masks, the settings, and the sparsity of each."""

    method: str
    masks: Mapping[str, Any] | None
    restore: str | None
    target: str
    shares: Mapping[str, float]
    pattern: str | None
    block: int
    damping: float | None
    donate: bool
    keep_zeros: bool

    @property
    def hessian(self) -> bool:
        """Whether Hessians are needed."""
        return self.solver is not None or self.method in ("sparsegpt", "admm")

    @property
    def steps(self) -> list[str]:
        """What restoring does, in its order."""
        return [] if self.restore is None else self.restore.split("+")

    @property
    def solver(self) -> str | None:
        """What restores each kernel by itself, "admm" or "least_squares"."""
        return next((step for step in self.steps if step != "local"), None)

    @property
    def paired(self) -> bool:
        """Whether the inputs that the dense model has are needed beside those of the result."""
        return self.solver == "admm" and self.target == "dense_outputs"

    @property
    def calibrated(self) -> bool:
        """Whether anything about the inputs is needed."""
        return self.hessian or (self.masks is None and self.method != "magnitude")

    def damping_of(self, solver: str) -> float:
        """Damping of a solver."""
        return DAMPING[solver] if self.damping is None else self.damping


def prune_kernel(
    name: str,
    weight: Array,
    axes: Axes,
    sums: Sums | None,
    plan: Plan,
) -> tuple[Array, Array, Array, KernelReport]:
    """Returns a kernel pruned, the same with its mask alone, the mask, and the report."""
    weight_RxC = patterns.as_matrix(weight, axes)
    keep = None if plan.masks is None else patterns.as_matrix(plan.masks[name], axes)
    share = plan.shares[name]
    if sums is not None and "square" in sums.of:
        sums.of["square"] = patterns.as_matrix(sums.of["square"], axes)
    if not axes.copies:
        done = [_matrix(name, weight_RxC, keep, sums, share, plan)]
        new, alone, mask = done[0][:3]
    else:
        # Each copy, such as an expert, is a kernel of its own.
        stacked = weight_RxC.reshape(-1, *weight_RxC.shape[-2:])
        keeps: Any = [None] * len(stacked) if keep is None else keep.reshape(stacked.shape)
        done = []
        for at, one_RxC in enumerate(stacked):
            own = _of_copy(sums, at, len(stacked))
            done.append(_matrix(f"{name}[{at}]", one_RxC, keeps[at], own, share, plan))
        new, alone, mask = (
            jnp.stack(some).reshape(weight_RxC.shape) for some in list(zip(*done, strict=True))[:3]
        )
    removed = mask.size - int(_count_true(mask))
    solver = _joined([one.solver for *_, one in done])
    report = KernelReport(name, removed, weight.size, solver, any(d.restored for *_, d in done))
    new, alone, mask = (
        patterns.from_matrix(some, weight.shape, axes) for some in (new, alone, mask)
    )
    return new, alone, mask, report


def _of_copy(sums: Sums | None, at: int, copies: int) -> Sums | None:
    """Returns the sums of one copy of a kernel."""
    if sums is None:
        return None
    return Sums(
        {kind: value.reshape(copies, *value.shape[-2:])[at] for kind, value in sums.of.items()},
        sums.n,
    )


class _Done(NamedTuple):
    """What was done to one matrix, as in `KernelReport`."""

    solver: SolverReport | None
    restored: bool = False


def _matrix(
    name: str,
    weight_RxC: Array,
    keep_RxC: Array | None,
    sums: Sums | None,
    share: float,
    plan: Plan,
) -> tuple[Array, Array, Array, _Done]:
    """Returns a matrix pruned, the same with its mask alone, the mask, and what was done."""
    if plan.pattern is not None:
        patterns.check_divides(name, len(weight_RxC), patterns.parse_n_of_m(plan.pattern)[1])
    hessian = cross = None  # there where the plan needs them
    if sums is not None and plan.hessian:
        hessian, cross = sums.taken("outer", weight_RxC), sums.taken("cross", weight_RxC)
    zeros = "keep" if plan.keep_zeros else "free"
    report: SolverReport | None = None
    # Choose the mask, unless it is given.
    if keep_RxC is not None:
        pruned_RxC = zeroed(weight_RxC, keep_RxC)
    elif plan.method == "sparsegpt":
        damping = plan.damping_of("sparsegpt")
        assert hessian is not None
        pruned_RxC, keep_RxC, report = sparsegpt(
            weight_RxC, hessian, share, plan.pattern, plan.block, damping, zeros
        )
    elif plan.method == "admm":
        own = share if plan.pattern is None else None
        damping = plan.damping_of("admm")
        assert hessian is not None
        pruned_RxC, keep_RxC, report = admm(
            weight_RxC, hessian, own, plan.pattern, damping=damping, zeros=zeros
        )
    else:
        square, n = (None, 1) if sums is None else (sums.of["square"], sums.n)
        score_RxC = _score(CRITERIA[plan.method], weight_RxC, square, n, zeros)
        keep_RxC = _ranked(name, score_RxC, share, plan)
        pruned_RxC = zeroed(weight_RxC, keep_RxC)
    if plan.solver is None or (plan.method == "admm" and plan.masks is None):
        return pruned_RxC, pruned_RxC, keep_RxC, _Done(report)
    # Restore the weights that stay.
    assert hessian is not None
    damping = plan.damping_of(plan.solver)
    if plan.solver == "admm":
        restored_RxC, _, solved = admm(
            weight_RxC, hessian, mask=keep_RxC, damping=damping, cross_RxR=cross
        )
    else:  # whole inputs go, and maybe whole outputs
        inputs_R, outputs_C = np.asarray(keep_RxC.any(1)), keep_RxC.any(0)
        restored_RxC, solved = least_squares(weight_RxC, hessian, inputs_R, damping)
        restored_RxC = zeroed(restored_RxC, jnp.broadcast_to(outputs_C, keep_RxC.shape))
    return restored_RxC, pruned_RxC, keep_RxC, _Done(solved, True)


def _joined(given: Sequence[SolverReport | None]) -> SolverReport | None:
    """Returns the report of all copies of a kernel, with the largest damping."""
    reports = [report for report in given if report is not None]
    if len(reports) < 2:
        return reports[0] if reports else None
    dead, removed, error = (
        sum(getattr(report, field) for report in reports) for field in ("dead", "removed", "error")
    )
    return SolverReport(max(report.damping for report in reports), dead, removed, error)


@functools.partial(jax.jit, static_argnames=("criterion", "zeros"))
def _score(criterion: str, weight_RxC: Array, square: Array | None, n: int, zeros: str) -> Array:
    """Returns a criterion's scores of a matrix whose inputs are squared and summed over n.

    Subnormal weights, below 1.2e-38, count as 0 in bfloat16 too, as in a ranking of all at once.
    """
    norm = None if square is None else jnp.sqrt(square / n)
    return importance.score(
        criterion,
        {"kernel": weight_RxC},
        measured={"input_norm": {"kernel": norm}},
        prunable={"kernel": True},
        zeros=zeros,
    )["kernel"]


@jax.jit
def zeroed(weight_RxC: Array, mask_RxC: Array) -> Array:
    """Returns the weights that a mask keeps, 0 elsewhere."""
    return jnp.where(mask_RxC, weight_RxC, 0)


@jax.jit
def _count_true(mask_RxC: Array) -> counting.Count:
    return counting.count_true([mask_RxC])


@functools.partial(jax.jit, donate_argnums=0)  # a Hessian is large: not twice
def _scaled(sum_RxR: Array, factor: float) -> Array:
    return sum_RxR * factor


def _ranked(name: str, score_RxC: Array, share: float, plan: Plan) -> Array:
    """Returns the mask of a matrix by its scores, counted as the method's reference does."""
    if plan.method == "wanda_variant" and plan.pattern is None:
        # Its count is not fixed, so `masks.by_sparsity` has no such rule. It adds scores up, to
        # which a weight that is gone (−inf) adds nothing.
        there_RxC = score_RxC != -jnp.inf
        return wanda.wanda_variant_mask(jnp.where(there_RxC, score_RxC, 0), share) & there_RxC
    by_output = plan.pattern is None and plan.method == "wanda"
    return masks.by_sparsity(
        {name: score_RxC},
        share,
        "row" if by_output else "tensor",
        pattern=plan.pattern,
        rounding="down",
        ties="last" if by_output else "first",
        input_axes=lambda name, shape: (0,),
    )[name]
