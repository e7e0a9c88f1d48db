"""How far the predictions of a pruned model are from the dense one's, token by token.

Perplexity asks only for the token that the text has next; these ask for the whole distribution.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from swe_prune.evaluation import scored_windows as of_windows
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.token_losses import by_rows, logits_shape


@dataclasses.dataclass(frozen=True)
class Distance:
    """From the dense model to the pruned one.

    Attributes:
        nats_per_token: mean of KL(dense ‖ pruned) = Σ_v p_v (log p_v - log q_v).
        standard_error: of it, over the windows; None with one window.
        agreement: share of the tokens for which both have the same likeliest next token.
        tokens: that the means are over.
        protocol: which tokens those are.
    """

    nats_per_token: float
    standard_error: float | None
    agreement: float
    tokens: int
    protocol: Protocol


def kl_to_dense(
    model: Any,
    dense_params: PyTree,
    pruned_params: PyTree,
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    *,
    batch: int,
    bos_id: int | None = None,
    pruned_model: Any = None,
) -> Distance:
    """Returns the divergence from the dense model's next-token distributions and their agreement.

    Over the tokens that the perplexity of the same protocol scores; computed in float32, a few
    windows' logits at a time, and summed in float64.

    Args:
        model: a Flax Linen module, called with {"params": params} and int32 tokens_BxL.
        dense_params: its weights before pruning.
        pruned_params: and after.
        tokens: of the whole text, without special tokens.
        protocol: which windows are cut and which tokens scored.
        batch: windows at a time.
        bos_id: of the tokenizer; needed where the protocol has a BOS.
        pruned_model: the module of pruned_params where units were cut out of it; None: `model`.

    Raises:
        InputError: as `perplexity` does.
    """
    windows = of_windows.of_text(model, tokens, protocol, bos_id)
    pruned_model = model if pruned_model is None else pruned_model
    divergence_WxM, same_WxM = of_windows.in_batches(
        lambda tokens_BxL: _compared(model, pruned_model, dense_params, pruned_params, tokens_BxL),
        windows,
        batch,
    )
    mean, error = of_windows.mean_of_scored(divergence_WxM, windows)
    agreement, _ = of_windows.mean_of_scored(same_WxM, windows)
    return Distance(mean, error, agreement, int(windows.scored_WxL.sum()), protocol)


@functools.partial(jax.jit, static_argnames=("model", "pruned_model"))
def _compared(
    model: Any,
    pruned_model: Any,
    dense_params: PyTree,
    pruned_params: PyTree,
    tokens_BxL: Int[Array, "B L"],
) -> tuple[Array, Array]:
    """Returns the divergence and whether the likeliest agree, B x (L - 1) both."""

    def of_rows(tokens_RxL: Array) -> tuple[Array, Array]:
        def log_p(model: Any, params: PyTree) -> Array:
            logits_RxMxV = model.apply({"params": params}, tokens_RxL)[:, :-1]
            return jax.nn.log_softmax(logits_RxMxV.astype(jnp.float32), axis=-1)

        dense_RxMxV = log_p(model, dense_params)
        pruned_RxMxV = log_p(pruned_model, pruned_params)
        terms_RxMxV = jnp.exp(dense_RxMxV) * (dense_RxMxV - pruned_RxMxV)
        same_RxM = jnp.argmax(dense_RxMxV, axis=-1) == jnp.argmax(pruned_RxMxV, axis=-1)
        return terms_RxMxV.sum(axis=-1), same_RxM

    shape = logits_shape(model, dense_params, tokens_BxL.shape)
    return by_rows(of_rows, tokens_BxL, shape, copies=2)
