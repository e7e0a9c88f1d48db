"""Perplexity of a text under a named protocol, and the gate that a dense model has to pass."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int, PyTree

from swe_prune.errors import InputError
from swe_prune.evaluation import scored_windows
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.token_losses import token_losses


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """What a model makes of a text.

    Attributes:
        protocol: how it was measured.
        nats_per_token: the mean loss of the scored tokens, Σ loss / n.
        standard_error: of nats_per_token, over the windows, as of a ratio of two means; None with
            one window. Windows of one text are not independent, so it is rather too small.
        tokens: scored ones, n.
        windows: that they lie in.
        bits_per_byte: nats_per_token / ln 2 · tokens of the text / bytes of the text, which
            compares models of different tokenizers; None where the bytes were not given.
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

    One program is compiled for all batches: the last is filled up with windows that do not count.
    Losses are float32 and summed in float64.

    Args:
        model: a Flax Linen module, called with {"params": params} and int32 tokens_BxL.
        params: its weights.
        tokens: of the whole text, without special tokens.
        protocol: which windows are cut and which tokens scored.
        batch: windows at a time.
        bos_id: of the tokenizer; needed where the protocol has a BOS.
        text_bytes: of the text in UTF-8, for bits_per_byte.
        windows_limit: no more than the first so many windows, instead of the protocol's own limit;
            the protocol's name in the result says so.

    Raises:
        InputError: no or too little text, windows beyond the model's context, tokens that it does
            not have, a missing BOS, or a batch or limit below 1.
    """
    if windows_limit is not None:
        protocol = dataclasses.replace(
            protocol, name=f"{protocol.name}, {windows_limit} windows", limit=windows_limit
        )
    if text_bytes is not None and text_bytes < 1:
        raise InputError(f"text_bytes = {text_bytes} cannot be; give the bytes of the text")
    windows = scored_windows.of_text(model, tokens, protocol, bos_id)

    def losses(tokens_BxL: np.ndarray) -> Any:
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


def gate(dense: PerplexityResult, *, uniform: int, at_most: float | None = None) -> None:
    """Refuses to go on with a dense model whose perplexity shows that something is wrong.

    No number of a pruned model means anything beside a dense one that was read wrongly, fed by
    another tokenizer or measured under another protocol than the figure it is held against.

    Args:
        dense: of the model before pruning.
        uniform: symbols of the vocabulary; guessing among them has this perplexity.
        at_most: the largest perplexity to accept, such as a published figure with a tolerance;
            None: only guessing is refused.

    Raises:
        InputError: the perplexity is not finite, not below `uniform`, or above `at_most`.
    """
    found = f"the dense model has a perplexity of {dense.perplexity:.6g} ({dense.protocol.name})"
    if at_most is not None and not (math.isfinite(at_most) and at_most > 1):
        raise InputError(
            f"at_most = {at_most} bounds no perplexity; give a finite number above 1, or None"
        )
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
            f"{found}, above the {at_most:.6g} that it should have at most, so nothing pruned from "
            "it can be judged; check the text, the protocol and the import, or correct at_most"
        )
