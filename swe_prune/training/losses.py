"""Losses in nats per token."""

import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits_BxLxV: Float[Array, "B L V"], targets_BxL: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Returns −log p(target) of every token in nats, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)
