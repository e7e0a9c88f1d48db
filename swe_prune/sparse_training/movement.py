"""Movement pruning: scores that are learned while the weights are.

A score S per weight picks the mask, W' = W ⊙ M(S), and learns by the straight-through estimator:

    ∂L/∂S = ∂L/∂W' ⊙ W        ∂L/∂W = ∂L/∂W' ⊙ M

S falls along its gradient, −lr Σ g w, and so grows where a weight moves away from 0. A weight that
the mask removes gets no gradient of its own; S alone can bring it back. Train S beside the weights
with a learning rate of its own (AdamW at 1e-2 beside 3e-5 in the paper), and the loss plus a
penalty where the number of weights is not fixed:

    hard  M = the top v of each tensor's S           `hard_masks`
    soft  M = sigmoid(S) > τ, plus an L1 penalty     `soft_masks`, `penalty(scores, "l1")`
    L0    a gate in [0, 1], plus an L0 penalty       `l0_gates`, `penalty(scores, "l0")`

`schedules.MovementSchedule` gives v or τ, and the penalty's weight. Once learned, S is a criterion
like any other: `importance.score("movement", params, measured={"learned": scores})`.

Sanh, Wolf and Rush, "Movement pruning" (NeurIPS 2020); Lagunas et al., "Block pruning for faster
transformers" (EMNLP 2021); Louizos, Welling and Kingma, "Learning sparse neural networks through
L0 regularization" (ICLR 2018).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from swe_prune import counting, masks, select, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.masks.fitting import check_fits
from swe_prune.sparse_training.masked import masked, stopped

LEAST_KEPT = 0.005
"""The share of a tensor that a threshold always leaves."""

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution
PENALTIES = ("l1", "l0")


@checked
def init(params: PyTree, prunable: PyTree | None = None, value: float = 0.0) -> PyTree:
    """Returns scores to begin with: float32, one constant, None where dense.

    Args:
        params: Pytree of weights.
        prunable: Bool pytree; None: `tree.prunable(params)`.
        value: Initial value of every score.

    >>> init({"kernel": jnp.ones((1, 2))})["kernel"].tolist()
    [[0.0, 0.0]]
    """
    return tree.map_prunable(lambda _, w: jnp.full_like(w, value, jnp.float32), params, prunable)


def forward(params: PyTree, scores: PyTree, mask: PyTree) -> PyTree:
    """Returns the masked weights, whose gradient reaches the scores straight through the mask.

    Args:
        params: Pytree of weights W.
        scores: S, float32, None where dense.
        mask: M, bool, made from the scores by `hard_masks` or `soft_masks`.

    Raises:
        InputError: The three differ in structure or shape.

    >>> w, s, m = ({"w": jnp.array(x)} for x in ([2.0, 3.0], [0.0, 1.0], [False, True]))
    >>> loss = lambda w, s: (forward(w, s, m)["w"] * 5).sum()
    >>> [g["w"].tolist() for g in jax.grad(loss, argnums=(0, 1))(w, s)]
    [[0.0, 5.0], [10.0, 15.0]]
    """

    def leaf(name: str, weight: Any, keep: Any, score: Any) -> Any:
        if keep is None:
            return weight
        check_fits(name, keep, weight)
        check_fits(name, keep, score, "score")
        return masked(weight, keep, score)

    return tree.map_leaves(leaf, params, mask, scores)


@checked
def hard_masks(
    scores: PyTree,
    sparsity: float | Float[Array, ""],
    *,
    scope: str = "tensor",
    layout: PyTree | None = None,
) -> PyTree:
    """Returns the masks of the largest scores, 1 − sparsity of every tensor.

    Args:
        scores: S, None where dense.
        sparsity: 1 − v, as `MovementSchedule.sparsity` gives; may be traced.
        scope: Scope of `masks.by_sparsity`; "global" ranks all tensors together.
        layout: Pytree of `layout.Axes` like the scores; see `masks.by_sparsity`.

    Raises:
        InputError: Errors of `masks.by_sparsity`.
    """
    return masks.by_sparsity(stopped(scores), sparsity, scope, layout=layout)


@checked
def soft_masks(scores: PyTree, threshold: float | Float[Array, ""]) -> PyTree:
    """Returns the masks sigmoid(S) > τ, with ⌊0.005 n⌋ + 1 of n weights always kept.

    Args:
        scores: S, None where dense.
        threshold: τ in [0, 1]; may be traced.

    >>> soft_masks({"w": jnp.array([-9.0, 0.0, 9.0])}, 0.6)["w"].tolist()
    [False, False, True]
    """
    _check_scores(scores)

    def leaf(name: str, score: Array) -> Bool[Array, "..."]:
        score = jax.lax.stop_gradient(score).astype(jnp.float32)
        least = min(math.floor(LEAST_KEPT * tree.size(score)) + 1, tree.size(score))
        above = jax.nn.sigmoid(score) > threshold
        return jax.lax.cond(
            counting.count_each([above])[0] < least,
            lambda score, _: select.top_k_mask(score, least, name=name),
            lambda _, above: above,
            score,
            above,
        )

    return tree.map_named(leaf, scores)


@checked
def l0_gates(scores: PyTree, key: PRNGKeyArray | None = None) -> PyTree:
    """Returns gates in [0, 1] of the hard concrete distribution, differentiable in the scores.

    clip(1.2 sigmoid((log u − log(1 − u) + S) / (2/3)) − 0.1, 0, 1) with u uniform in (0, 1); to
    evaluate, without a key, clip(1.2 sigmoid(S) − 0.1, 0, 1). Exact zeros have a probability.

    Args:
        scores: S, None where dense.
        key: Random key for training, a new one in every step; None: to evaluate.
    """
    _check_scores(scores)

    def leaf(name: str, score: Array) -> Float[Array, "..."]:
        score = score.astype(jnp.float32)
        logits = score
        if key is not None:
            tiny = float(jnp.finfo(jnp.float32).eps)
            drawn = jax.random.uniform(tree.named_key(key, name), score.shape, minval=tiny)
            logits = (jnp.log(drawn) - jnp.log1p(-drawn) + score) / _TEMPERATURE
        return jnp.clip(jax.nn.sigmoid(logits) * (_HIGH - _LOW) + _LOW, 0.0, 1.0)

    return tree.map_named(leaf, scores)


def gated(params: PyTree, gates: PyTree) -> PyTree:
    """Returns the weights times their gates, dtypes kept, dense tensors as they are."""
    return tree.map_leaves(
        lambda _, gate, w: w if gate is None else (w * gate).astype(w.dtype), gates, params
    )


@checked
def penalty(scores: PyTree, kind: str = "l1") -> Float[Array, ""]:
    """Returns what to add to the loss, times λ, so that scores fall: a mean in [0, 1].

    "l1": sigmoid(S). "l0": sigmoid(S − 2/3 log(0.1 / 1.1)), the probability that a gate is not 0.
    The mean over each tensor, then over the tensors, as in the reference implementation: every
    tensor weighs the same.

    Args:
        scores: S, None where dense.
        kind: "l1" or "l0".

    Raises:
        InputError: An unknown kind, or no scores.

    >>> float(penalty({"w": jnp.zeros(3)}))
    0.5
    """
    check_choice(kind, PENALTIES, "kind")
    _check_scores(scores)
    leaves = jax.tree.leaves(scores)
    if not leaves:
        raise InputError("there are no scores to penalize: every tensor is dense; widen the rules")
    shift = _TEMPERATURE * math.log(-_LOW / _HIGH) if kind == "l0" else 0.0
    means = [jnp.mean(jax.nn.sigmoid(leaf.astype(jnp.float32) - shift)) for leaf in leaves]
    return sum(means[1:], means[0]) / len(means)


def _check_scores(scores: PyTree) -> None:
    for name, score in tree.named_leaves(scores):
        if score is not None and not tree.is_weight(score):
            raise InputError(
                f"the score of {tree.short(name)!r} must be a floating-point array, or None where "
                f"the tensor is dense, got {shown(score)}"
            )
