"""Training under a teacher: how much its predictions and its hidden states count in the loss."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.bounds import COUNT, NOT_NEGATIVE, PART, POSITIVE
from swe_prune.errors import InputError
from swe_prune.training import losses

_BLOCK = re.compile(r"block_(\d+)")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How much of the loss is the distance to a teacher.

        (1 − w) · cross entropy + w · `divergence` + features · mean of `feature_distance`

    both of `training.losses`.

    Attributes:
        weight: Weight w at the first step, in [0, 1]; 1 is the teacher alone.
        temperature: Temperature of the divergence, above 0. More than 1 compares more of what the
            models think of unlikely tokens.
        final_weight: Weight w after `steps` steps, which it approaches linearly. None: `weight`.
        steps: Number of steps from `weight` to `final_weight`.
        features: Weight of the distance between the outputs of blocks, mean over the blocks; 0:
            they are not compared. Both models must have the same residual width.
        layers: For each block of the model, the block of the teacher with which it is compared, as
            from `depth_map`. None: the block of the same number.

    Raises:
        InputError: A number is out of its range, or of `final_weight` and `steps` one is missing.
    """

    weight: float = 0.5
    temperature: float = 1.0
    final_weight: float | None = None
    steps: int | None = None
    features: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        PART.check(self.weight, "distillation.weight")
        POSITIVE.check(self.temperature, "distillation.temperature")
        if (self.final_weight is None) != (self.steps is None):
            raise InputError(
                "distillation.final_weight and distillation.steps say together how the weight "
                "changes; give both or neither"
            )
        if self.final_weight is not None:
            PART.check(self.final_weight, "distillation.final_weight")
            COUNT.check(self.steps, "distillation.steps")
        NOT_NEGATIVE.check(self.features, "distillation.features")

    def weight_at(self, step: Array | int) -> Array | float:
        """Returns w at a step, counted from 0."""
        if self.final_weight is None or self.steps is None:
            return self.weight
        done = jnp.minimum(jnp.asarray(step, jnp.float32) / self.steps, 1.0)
        return self.weight + done * (self.final_weight - self.weight)


def depth_map(kept: Sequence[int], teacher_layers: int) -> tuple[int, ...]:
    """Returns the block of the teacher that each block that was kept is compared with.

    That is the last one before the next block that was kept, so that what is handed on to it is
    compared.

    Args:
        kept: Indices of the teacher's blocks that the model has, ascending.
        teacher_layers: Number of blocks of the teacher.

    Raises:
        InputError: `kept` is empty, not ascending, or beyond the teacher's blocks.

    >>> depth_map([0, 1, 4], 6)
    (0, 3, 5)
    """
    rising = all(a < b for a, b in itertools.pairwise(kept))
    if not len(kept) or not rising or kept[0] < 0 or kept[-1] >= teacher_layers:
        raise InputError(
            f"the blocks that were kept must be ascending numbers below the teacher's "
            f"{teacher_layers}, got {list(kept)}"
        )
    return tuple(int(after) - 1 for after in [*kept[1:], teacher_layers])


def distilled_losses(
    model: nn.Module,
    params: PyTree,
    teacher_model: nn.Module,
    teacher: PyTree,
    batch: dict[str, Any],
    distillation: Distillation,
    step: Array | int,
    **options: Any,
) -> Array:
    """Returns the loss of every token, (B, L) float32.

    Args:
        model: Linen model of tokens to logits.
        params: Its weights.
        teacher_model: Linen model of the teacher.
        teacher: Weights of the teacher.
        batch: "inputs" and "targets", each (B, L).
        distillation: What counts how much.
        step: Number of the step, from 0.
        **options: Arguments of the model besides its inputs.

    Raises:
        InputError: Hidden states are to be compared and cannot be seen, or do not go together.
    """
    compare = distillation.features > 0
    logits_BxLxV, own = _run(model, params, batch, compare, options)
    teacher_BxLxV, theirs = _run(teacher_model, teacher, batch, compare, {})
    w = distillation.weight_at(step)
    text_BxL = losses.cross_entropy(logits_BxLxV, batch["targets"])
    apart_BxL: Any = losses.divergence(logits_BxLxV, teacher_BxLxV, distillation.temperature)
    found_BxL = (1 - w) * text_BxL + w * apart_BxL
    if not compare:
        return found_BxL
    of_each = [
        losses.feature_distance(x.reshape(*found_BxL.shape, -1), y.reshape(*found_BxL.shape, -1))
        for x, y in _pairs(own, theirs, distillation.layers)
    ]
    return found_BxL + distillation.features * sum(of_each) / len(of_each)


def _run(
    model: nn.Module, params: PyTree, batch: dict[str, Any], compare: bool, options: dict[str, Any]
) -> tuple[Any, list[Array]]:
    """Returns the logits, and the outputs of the blocks in their order where they are compared."""
    if not compare:
        return model.apply({"params": params}, batch["inputs"], **options), []
    logits, captured = model.apply(
        {"params": params},
        batch["inputs"],
        capture_intermediates=lambda module, _: bool(_BLOCK.fullmatch(module.name or "")),
        mutable=["intermediates"],
        **options,
    )
    numbered = {}
    for name, leaf in tree.named_leaves(captured.get("intermediates", {})):
        numbered[int(_BLOCK.findall(name)[-1])] = leaf
    if not numbered:
        raise InputError(
            "the outputs of the blocks are to be compared and cannot be seen in this model; set "
            "scan_layers=False, name the blocks block_0, block_1, …, or give features=0"
        )
    return logits, [numbered[number] for number in sorted(numbered)]


def _pairs(
    own: list[Array], theirs: list[Array], layers: tuple[int, ...] | None
) -> list[tuple[Array, Array]]:
    if layers is None and len(own) != len(theirs):
        raise InputError(
            f"the model has {len(own)} blocks and the teacher {len(theirs)}; say with layers= "
            "which of them are compared, as distillation.depth_map does"
        )
    chosen = range(len(own)) if layers is None else layers
    if len(chosen) != len(own) or not all(0 <= at < len(theirs) for at in chosen):
        raise InputError(
            f"layers= must name one of the teacher's {len(theirs)} blocks for each of the model's "
            f"{len(own)}, got {list(chosen)}"
        )
    pairs = [(x, theirs[at]) for x, at in zip(own, chosen, strict=True)]
    if pairs[0][0].shape != pairs[0][1].shape:
        raise InputError(
            f"the model's hidden states have {pairs[0][0].shape[-1]} numbers and the teacher's "
            f"{pairs[0][1].shape[-1]}; give features=0"
        )
    return pairs
