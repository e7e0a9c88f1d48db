"""One kernel: its mask, the update of the weights that stay, and what is said of it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from swe_prune import counting, patterns, select
from swe_prune.blockwise import wanda
from swe_prune.blockwise.admm import admm, squared_error
from swe_prune.blockwise.least_squares import least_squares
from swe_prune.blockwise.sparsegpt import SolverReport, sparsegpt
from swe_prune.layout import Axes

METHODS = ("wanda", "wanda_variant", "sparsegpt", "admm", "magnitude")
RESTORES = (None, "admm", "least_squares")
DAMPING: Mapping[str, float] = {"sparsegpt": 0.01, "admm": 0.1, "least_squares": 0.3}
"""Default share of the Hessian's mean diagonal that is added to it, by method."""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What was done to a kernel.

    Attributes:
        name: of the kernel.
        removed: weights that its mask removes.
        total: weights that it has.
        solver: of SparseGPT and ADMM, else None.
        restored: whether the weights that stay were restored and kept so; see `holdout`.
    """

    name: str
    removed: int
    total: int
    solver: SolverReport | None = None
    restored: bool = False

    @property
    def sparsity(self) -> float:
        """Share removed."""
        return self.removed / self.total


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels are pruned: the method or the masks, the settings, and the sparsity of each."""

    method: str
    masks: Mapping[str, Any] | None
    restore: str | None
    shares: Mapping[str, float]
    pattern: str | None
    block: int
    damping: float | None
    donate: bool
    keep_zeros: bool
    held_out: int = 0

    @property
    def hessian(self) -> bool:
        """Whether Hessians are needed."""
        return self.restore is not None or self.method in ("sparsegpt", "admm")

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
    sums: dict[str, Array] | None,
    guard: dict[str, Array] | None,
    n: int,
    plan: Plan,
) -> tuple[Array, Array, KernelReport]:
    """Returns a kernel pruned, its mask, and the report."""
    weight_RxC = patterns.as_matrix(weight, axes)
    keep = None if plan.masks is None else patterns.as_matrix(plan.masks[name], axes)
    share = plan.shares[name]
    if not axes.copies:
        new, mask, report, restored = _matrix(name, weight_RxC, keep, sums, guard, n, share, plan)
    else:
        # Each copy, such as an expert, is a kernel of its own.
        stacked = weight_RxC.reshape(-1, *weight_RxC.shape[-2:])
        keeps: Any = [None] * len(stacked) if keep is None else keep.reshape(stacked.shape)
        done = []
        for at, one_RxC in enumerate(stacked):
            own, held = (_of_copy(some, at, len(stacked)) for some in (sums, guard))
            label = f"{name}[{at}]"
            done.append(_matrix(label, one_RxC, keeps[at], own, held, n, share, plan))
        news, kept, reports, kept_so = zip(*done, strict=True)
        new, mask = (jnp.stack(some).reshape(weight_RxC.shape) for some in (news, kept))
        report, restored = _joined(reports), any(kept_so)
    removed = mask.size - int(_count_true(mask))
    return (
        patterns.from_matrix(new, weight.shape, axes),
        patterns.from_matrix(mask, weight.shape, axes),
        KernelReport(name, removed, weight.size, report, restored),
    )


def _of_copy(sums: dict[str, Array] | None, at: int, copies: int) -> dict[str, Array] | None:
    """Returns the sums of one copy of a kernel."""
    if sums is None:
        return None
    return {
        kind: value.reshape(copies, *(value.shape[-2:] if kind == "outer" else (-1,)))[at]
        for kind, value in sums.items()
    }


def _matrix(
    name: str,
    weight_RxC: Array,
    keep_RxC: Array | None,
    sums: dict[str, Array] | None,
    guard: dict[str, Array] | None,
    n: int,
    share: float,
    plan: Plan,
) -> tuple[Array, Array, SolverReport | None, bool]:
    """Returns a matrix pruned, its mask, the solver's report, and whether it was restored."""
    if plan.pattern is not None:
        patterns.check_divides(name, len(weight_RxC), patterns.parse_n_of_m(plan.pattern)[1])
    hessian: Any = None  # there where the plan needs it
    if sums is not None and plan.hessian:
        hessian = _scaled(sums.pop("outer").reshape([len(weight_RxC)] * 2), 2 / n)
    zeros = "keep" if plan.keep_zeros else "free"
    report: SolverReport | None = None
    # Choose the mask, unless it is given.
    if keep_RxC is not None:
        pruned_RxC = _zeroed(weight_RxC, keep_RxC)
    elif plan.method == "sparsegpt":
        damping = plan.damping_of("sparsegpt")
        pruned_RxC, keep_RxC, report = sparsegpt(
            weight_RxC, hessian, share, plan.pattern, plan.block, damping, zeros
        )
    elif plan.method == "admm":
        own = share if plan.pattern is None else None
        damping = plan.damping_of("admm")
        pruned_RxC, keep_RxC, report = admm(
            weight_RxC, hessian, own, plan.pattern, damping=damping, zeros=zeros
        )
    else:
        by_input = sums["square"] if sums is not None and plan.method != "magnitude" else None
        score_RxC = _scores(weight_RxC, by_input, n)
        if plan.keep_zeros:
            score_RxC = _zeros_last(score_RxC, weight_RxC)
        keep_RxC = _ranked(name, score_RxC, share, plan)
        pruned_RxC = _zeroed(weight_RxC, keep_RxC)
    if plan.restore is None or (plan.method == "admm" and plan.masks is None):
        return pruned_RxC, keep_RxC, report, False
    # Restore the weights that stay, if that holds on the inputs of the held-out batches.
    damping = plan.damping_of(plan.restore)
    if plan.restore == "admm":
        restored_RxC, _, solved = admm(weight_RxC, hessian, mask=keep_RxC, damping=damping)
    else:  # whole inputs go, and maybe whole outputs
        inputs_R, outputs_C = np.asarray(keep_RxC.any(1)), keep_RxC.any(0)
        restored_RxC, solved = least_squares(weight_RxC, hessian, inputs_R, damping)
        restored_RxC = _zeroed(restored_RxC, jnp.broadcast_to(outputs_C, keep_RxC.shape))
    if guard is not None:
        outer_RxR = guard["outer"].reshape([len(weight_RxC)] * 2)
        alone, with_update = (
            float(squared_error(kernel, weight_RxC, outer_RxR))
            for kernel in (_zeroed(weight_RxC, keep_RxC), restored_RxC)
        )
        if with_update > alone:
            return pruned_RxC, keep_RxC, report, False
    return restored_RxC, keep_RxC, solved, True


def _joined(given: Sequence[SolverReport | None]) -> SolverReport | None:
    """Returns the report of all copies of a kernel, with the largest damping."""
    reports = [report for report in given if report is not None]
    if len(reports) < 2:
        return reports[0] if reports else None
    dead, removed, error = (
        sum(getattr(report, field) for report in reports) for field in ("dead", "removed", "error")
    )
    return SolverReport(max(report.damping for report in reports), dead, removed, error)


@jax.jit
def _scores(weight_RxC: Array, square: Array | None, n: int) -> Array:
    score_RxC = jnp.abs(weight_RxC.astype(jnp.float32))
    return score_RxC if square is None else score_RxC * jnp.sqrt(square / n).reshape(-1, 1)


@jax.jit
def _zeros_last(score_RxC: Array, weight_RxC: Array) -> Array:
    return jnp.where((weight_RxC == 0) & ~jnp.isnan(score_RxC), -jnp.inf, score_RxC)


@jax.jit
def _zeroed(weight_RxC: Array, mask_RxC: Array) -> Array:
    return jnp.where(mask_RxC, weight_RxC, 0)


@jax.jit
def _count_true(mask_RxC: Array) -> counting.Count:
    return counting.count_true([mask_RxC])


@functools.partial(jax.jit, donate_argnums=0)  # a Hessian is large: not twice
def _scaled(sum_RxR: Array, factor: float) -> Array:
    return sum_RxR * factor


def _ranked(name: str, score_RxC: Array, share: float, plan: Plan) -> Array:
    there_RxC = score_RxC != -jnp.inf  # what was 0 before
    if plan.pattern is not None:
        n, m = patterns.parse_n_of_m(plan.pattern)
        return patterns.n_of_m_mask(score_RxC, n, m, name) & there_RxC
    if plan.method == "magnitude":
        keep = score_RxC.size - int(score_RxC.size * share)
        return select.top_k_mask(score_RxC, keep, name=name) & there_RxC
    if plan.method == "wanda":  # rounded and with its ties broken as in the reference
        return wanda.wanda_mask(score_RxC, share, rounding="down", ties="last")
    # The variant adds scores up, to which a weight that is gone adds nothing.
    return wanda.wanda_variant_mask(jnp.where(there_RxC, score_RxC, 0), share) & there_RxC
