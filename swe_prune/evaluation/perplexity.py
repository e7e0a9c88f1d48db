"""Perplexity of a text under a named protocol, and a sanity check for dense models."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int, PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.evaluation import scored_windows
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.token_losses import check_model, token_losses


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a model on a text.

    Attributes:
        protocol: Protocol of the measurement.
        nats_per_token: Mean loss of the scored tokens, Σ loss / n.
        standard_error: Standard error of nats_per_token over the windows, as a ratio of two means;
            None with one window. Windows of one text are not independent, so it is too small.
        tokens: Number n of scored tokens.
        windows: Number of windows.
        bits_per_byte: Ratio nats_per_token / ln 2 · tokens of the text / bytes of the text, for
            comparing models with different tokenizers; None if the bytes were not given.
    """

    protocol: Protocol
    nats_per_token: float
    standard_error: float | None
    tokens: int
    windows: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token); inf beyond float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


@checked
def perplexity(
    model: Any,
    params: PyTree,
    tokens: Int[np.ndarray, " N"],
    protocol: Protocol,
    *,
    batch: int,
    bos_id: int | None = None,
    text_bytes: int | None = None,
    windows_limit: int | None = None,
) -> PerplexityResult:
    """Returns the perplexity of a text, exp of the mean loss of its scored tokens.

    One program is compiled for all batches; the last one is padded with windows that do not count.
    Losses are float32 and summed in float64.

    Args:
        model: Linen module, applied to {"params": params} and int32 tokens_BxL.
        params: Parameters of the model.
        tokens: Token ids of the whole text, without special tokens.
        protocol: Protocol that determines windows and scored tokens.
        batch: Number of windows per batch.
        bos_id: Id of the tokenizer's BOS token, required if the protocol has a BOS.
        text_bytes: Number of bytes of the text in UTF-8, for bits_per_byte.
        windows_limit: Maximal number of windows, replacing the protocol's limit; the protocol's
            name in the result says so.

    Raises:
        InputError: If there are too few tokens or tokens outside the vocabulary, the windows exceed
            the model's context, the BOS is missing, or batch or limit is below 1.
    """
    check_model(model, params)
    if windows_limit is not None:
        protocol = dataclasses.replace(
            protocol, name=f"{protocol.name}, {windows_limit} windows", limit=windows_limit
        )
    if text_bytes is not None and text_bytes < 1:
        raise InputError(f"text_bytes must be the number of bytes of the text, got {text_bytes}")
    windows = scored_windows.of_text(model, tokens, protocol, bos_id)

    def losses(tokens_BxL: np.ndarray) -> Any:
        # The target at each position is the next token; the last position has none.
        following_BxL = np.roll(tokens_BxL, -1, axis=1)
        return token_losses(model, params, tokens_BxL, following_BxL)[0][:, :-1]

    loss_WxM = scored_windows.in_batches(losses, windows, batch)
    mean, error = scored_windows.mean_of_scored(loss_WxM, windows)
    return PerplexityResult(
        protocol,
        nats_per_token=mean,
        standard_error=error,
        tokens=int(windows.scored_WxL.sum()),
        windows=len(windows.tokens_WxL),
        bits_per_byte=text_bytes and mean / math.log(2) * len(tokens) / text_bytes,
    )


@checked
def gate(dense: PerplexityResult, *, uniform: int, at_most: float | None = None) -> None:
    """Raises an error if the perplexity of a dense model shows that something is wrong.

    Results of pruned models are meaningless if the dense model was loaded wrongly, used with the
    wrong tokenizer, or measured under a different protocol than the reference figure.

    Args:
        dense: Perplexity of the model before pruning.
        uniform: Size of the vocabulary, which is the perplexity of guessing.
        at_most: Largest acceptable perplexity, such as a published figure with a tolerance. If
            None, only models no better than guessing are rejected.

    Raises:
        InputError: If the perplexity is not finite, not below `uniform`, or above `at_most`.
    """
    found = f"the dense model has a perplexity of {dense.perplexity:.6g} ({dense.protocol.name})"
    if at_most is not None and not (math.isfinite(at_most) and at_most > 1):
        raise InputError(f"at_most must be a finite number above 1, or None, got {at_most}")
    if not math.isfinite(dense.nats_per_token):
        raise InputError(
            f"{found}, which is not finite, so nothing pruned from it can be judged; look for NaN "
            "or inf in its weights, or compute in float32"
        )
    if dense.perplexity >= uniform:
        raise InputError(
            f"{found}, no better than guessing among {uniform} symbols, so nothing pruned from it "
            "can be judged; check that tokenizer, weights and architecture belong together"
        )
    if at_most is not None and dense.perplexity > at_most:
        raise InputError(
            f"{found}, above the {at_most:.6g} allowed, so nothing pruned from it can be judged; "
            "check the text, the protocol and the import, or correct at_most"
        )
