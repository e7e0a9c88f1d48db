"""Distance of a pruned model's predictions from the dense model's, token by token.

Perplexity depends on the probability of the next token of the text alone; these depend on the
whole distribution.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from swe_prune.arguments import checked
from swe_prune.evaluation import scored_windows as of_windows
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.token_losses import by_rows, check_model, logits_shape
from swe_prune.training import losses


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance between the predictions of a dense model and a pruned one.

    Attributes:
        nats_per_token: Mean of KL(dense ‖ pruned) = Σ_v p_v (log p_v - log q_v).
        standard_error: Standard error of that mean over the windows; None with one window.
        agreement: Share of the tokens for which both models have the same most likely next token.
        tokens: Number of tokens in the means.
        protocol: Protocol that says which tokens those are.
    """

    nats_per_token: float
    standard_error: float | None
    agreement: float
    tokens: int
    protocol: Protocol


@checked
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
        model: Flax Linen module, called with {"params": params} and int32 tokens_BxL.
        dense_params: Weights before pruning.
        pruned_params: Weights after pruning.
        tokens: Token ids of the whole text, without special tokens.
        protocol: Protocol that says how windows are cut and which tokens are scored.
        batch: Number of windows per forward pass.
        bos_id: Id of the tokenizer's BOS token; needed if the protocol has a BOS.
        pruned_model: Module of `pruned_params` if units were cut out of it; None means `model`.

    Raises:
        InputError: Errors of `perplexity`.
    """
    check_model(model, dense_params)
    check_model(model if pruned_model is None else pruned_model, pruned_params)
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
        dense_RxMxV = model.apply({"params": dense_params}, tokens_RxL)[:, :-1]
        pruned_RxMxV = pruned_model.apply({"params": pruned_params}, tokens_RxL)[:, :-1]
        same_RxM = jnp.argmax(dense_RxMxV, axis=-1) == jnp.argmax(pruned_RxMxV, axis=-1)
        return losses.divergence(pruned_RxMxV, dense_RxMxV), same_RxM

    shape = logits_shape(model, dense_params, tokens_BxL.shape)
    return by_rows(of_rows, tokens_BxL, shape, copies=2)
