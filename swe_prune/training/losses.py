"""Losses in nats per token, and their mean over a batch."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

AT_ONCE = 2**20
"""How many logits `divergence` compares at a time, 4 MiB in float32; at least one position's."""


def cross_entropy(
    logits_BxLxV: Float[Array, "B L V"], targets_BxL: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Returns −log p(target) of every token in nats, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def divergence(
    logits_BxLxV: Float[Array, "B L V"],
    teacher_BxLxV: Float[Array, "B L V"],
    temperature: float = 1.0,
) -> Float[Array, "B L"]:
    """Returns how far every token's distribution is from a teacher's, in nats, float32.

        T² · KL(softmax(t / T) ‖ softmax(s / T)),  s the logits, t the teacher's

    The factor T² keeps the gradient's size when the temperature changes; that is
    T · (softmax(s / T) − softmax(t / T)), and none flows into the teacher. A long sequence over a
    large vocabulary is taken a few positions at a time, and the backward pass keeps the two logits
    alone, so nothing else as large as they is made but the gradient.

    Args:
        logits_BxLxV: Logits s, floating; computed in float32.
        teacher_BxLxV: Teacher's logits t, likewise; −inf for symbols that it excludes.
        temperature: T, above 0.

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.

    >>> s, t = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> round(float(divergence(s, t)[0, 0]), 4)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
    0.1308
    """
    started_BxL = jnp.zeros(logits_BxLxV.shape[:2], jnp.float32)
    compare = functools.partial(_divergence, temperature=temperature)
    return _by_parts(compare, started_BxL, logits_BxLxV, teacher_BxLxV)


def _by_parts(compare: Callable[..., Array], found: Array, logits: Array, *more: Array) -> Array:
    """Returns `found` with what compare(logits, *more) gives, a few positions at a time."""
    batch, length, symbols = logits.shape
    part = min(length, max(1, AT_ONCE // (batch * symbols)))
    if part == length:
        return compare(logits, *more)

    # Along L, since B may be divided over devices. A last part that would end beyond L is moved
    # back, by dynamic_slice as by its update, and overlaps the one before.
    def add(number: Array, found: Array) -> Array:
        start = number * part
        given = (jax.lax.dynamic_slice_in_dim(x, start, part, axis=1) for x in (logits, *more))
        return jax.lax.dynamic_update_slice_in_dim(found, compare(*given), start, axis=1)

    return jax.lax.fori_loop(0, math.ceil(length / part), add, found)


def _divergence(s_BxLxV: Array, t_BxLxV: Array, temperature: float) -> Array:
    s_log_BxLxV, t_log_BxLxV = (_log_softmax(x, temperature) for x in (s_BxLxV, t_BxLxV))
    # A finite lowest, so that a symbol that both exclude adds 0 and not 0 · (inf − inf).
    lowest = jnp.finfo(jnp.float32).min
    apart_BxLxV = jnp.maximum(t_log_BxLxV, lowest) - jnp.maximum(s_log_BxLxV, lowest)
    return temperature**2 * jnp.sum(jnp.exp(t_log_BxLxV) * apart_BxLxV, axis=-1)


def _slope(s_BxLxV: Array, t_BxLxV: Array, slope_BxL: Array, temperature: float) -> Array:
    p_BxLxV, q_BxLxV = (jnp.exp(_log_softmax(x, temperature)) for x in (s_BxLxV, t_BxLxV))
    slope_BxLxV = temperature * slope_BxL[..., None] * (p_BxLxV - q_BxLxV)
    return slope_BxLxV.astype(s_BxLxV.dtype)


def _log_softmax(logits_BxLxV: Array, temperature: float) -> Array:
    """Returns log softmax(logits / T), float32."""
    logits_BxLxV = logits_BxLxV.astype(jnp.float32)
    scaled_BxLxV = (logits_BxLxV - logits_BxLxV.max(axis=-1, keepdims=True)) / temperature
    return scaled_BxLxV - jnp.log(jnp.sum(jnp.exp(scaled_BxLxV), axis=-1, keepdims=True))


def _forward(s_BxLxV: Array, t_BxLxV: Array, temperature: float) -> tuple[Array, Any]:
    return divergence(s_BxLxV, t_BxLxV, temperature), (s_BxLxV, t_BxLxV)


def _backward(temperature: float, kept: tuple[Array, Array], slope_BxL: Array) -> Any:
    s_BxLxV, t_BxLxV = kept
    compare = functools.partial(_slope, temperature=temperature)
    slope_BxLxV = _by_parts(compare, jnp.zeros_like(s_BxLxV), s_BxLxV, t_BxLxV, slope_BxL)
    return slope_BxLxV, jnp.zeros_like(t_BxLxV)


divergence.defvjp(_forward, _backward)


def feature_distance(
    student_BxLxD: Float[Array, "B L D"], teacher_BxLxD: Float[Array, "B L D"]
) -> Float[Array, "B L"]:
    """Returns the relative squared distance of every token's hidden state, float32.

        ‖s − t‖² / ‖t‖²

    No gradient flows into the teacher.

    Args:
        student_BxLxD: Hidden states s, floating; computed in float32.
        teacher_BxLxD: Teacher's hidden states t, likewise.

    >>> feature_distance(jnp.array([[[1.0, 2.0]]]), jnp.array([[[0.0, 2.0]]])).tolist()
    [[0.25]]
    """
    s_BxLxD = student_BxLxD.astype(jnp.float32)
    t_BxLxD = jax.lax.stop_gradient(teacher_BxLxD).astype(jnp.float32)
    size_BxL = jnp.sum(t_BxLxD**2, axis=-1)
    return jnp.sum((s_BxLxD - t_BxLxD) ** 2, axis=-1) / jnp.maximum(
        size_BxL, jnp.finfo(jnp.float32).tiny
    )


def weighted_mean(
    losses_BxL: Float[Array, "B L"],
    weights_BxL: Float[Array, "B L"] | None,
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Weighted mean loss; None weights all tokens equally.

        Σ weight · loss / total

    A token of weight 0 adds nothing to the loss or its gradient, whatever stands there. When all
    weights are 0 there is no mean: NaN.

    Args:
        losses_BxL: Loss of every token.
        weights_BxL: 0 or more, of any dtype, such as bool: False where there is padding.
        total: Sum of the weights; None: computed from them.
    """
    if weights_BxL is None:
        return losses_BxL.mean()
    counted_BxL = jnp.where(weights_BxL > 0, losses_BxL, 0.0) * weights_BxL
    return counted_BxL.sum() / (jnp.sum(weights_BxL) if total is None else total)
