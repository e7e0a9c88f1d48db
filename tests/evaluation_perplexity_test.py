"""Perplexity against a loop in float64 that knows nothing of windows, batches or compilation."""

import dataclasses
import math

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import PerplexityResult, Protocol, gate, perplexity, protocols
from swe_prune.evaluation import token_losses as losses
from swe_prune.models import gpt

VOCABULARY = 11
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, 61)
PLAIN = Protocol("plain", 8, 8)


class Last(nn.Module):
    """Logits that depend on the two tokens seen last, so context matters and a loop is exact."""

    vocab_size: int = VOCABULARY

    @nn.compact
    def __call__(self, tokens_BxL):
        shape = (self.vocab_size, self.vocab_size)
        now = self.param("now", nn.initializers.normal(1.0), shape)
        before = self.param("before", nn.initializers.normal(1.0), shape)
        shifted_BxL = jnp.pad(tokens_BxL, ((0, 0), (1, 0)))[:, :-1]
        seen_BxLx1 = (jnp.arange(tokens_BxL.shape[1]) > 0)[None, :, None]
        return now[tokens_BxL] + jnp.where(seen_BxLx1, before[shifted_BxL], 0)


@pytest.fixture(scope="module")
def last():
    model = Last()
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def small():
    model = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=16), VOCABULARY)
    return model, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]


def naive(params, context, target):
    """-log p(target | context) in float64; the context is a list of the tokens before it."""
    logits = np.asarray(params["now"], np.float64)[context[-1]]
    if len(context) > 1:
        logits = logits + np.asarray(params["before"], np.float64)[context[-2]]
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]


def by_loop(params, tokens, protocol, bos_id):
    """The losses in the order of the text: the protocol in words, token after token."""
    tokens = list(tokens)
    if protocol.bos == "text":
        tokens = [bos_id, *tokens]
    own = [bos_id] if protocol.bos == "window" else []
    size, found, done, start = protocol.window - len(own), [], 0, 0
    while done < len(tokens) and not (
        protocol.limit and start // protocol.stride >= protocol.limit
    ):
        window = tokens[start : start + size]
        if len(window) < size and not protocol.partial:
            break
        for at in range(max(start, done), start + len(window)):
            context = own + tokens[start:at]
            if context:
                found.append(naive(params, context, tokens[at]))
        done, start = start + len(window), start + protocol.stride
    return found


@hypothesis.given(
    window=st.integers(2, 9),
    share=st.integers(1, 9),
    bos=st.sampled_from(protocols.BOS),
    partial=st.booleans(),
    limit=st.none() | st.integers(1, 4),
    length=st.integers(2, 40),
    batch=st.sampled_from([3]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_protocol_is_the_naive_loop(last, window, share, bos, partial, limit, length, batch):
    model, params = last
    of_text = window - (bos == "window")
    protocol = Protocol("any", window, min(share, of_text), bos, partial=partial, limit=limit)
    tokens = TOKENS[:length]
    expected = by_loop(params, tokens, protocol, bos_id=0)
    if not expected:
        with pytest.raises(InputError, match="give more text"):
            perplexity(model, params, tokens, protocol, batch=batch, bos_id=0)
        return
    result = perplexity(model, params, tokens, protocol, batch=batch, bos_id=0)
    assert result.tokens == len(expected)
    np.testing.assert_allclose(result.nats_per_token, np.mean(expected), rtol=1e-5)


def test_windows_that_do_not_overlap_are_the_plain_sum(small):
    model, params = small
    result = perplexity(model, params, TOKENS, PLAIN, batch=3)
    rows = TOKENS[:56].reshape(7, 8)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(rows)), np.float64)[
        :, :-1
    ]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, rows[:, 1:, None], -1)[..., 0]
    assert (result.tokens, result.windows) == (49, 7)
    np.testing.assert_allclose(result.nats_per_token, nats.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(nats.mean()), rtol=1e-6)
    # Windows of one size: the textbook standard error of the mean of their means.
    expected = nats.mean(1).std(ddof=1) / math.sqrt(7)
    np.testing.assert_allclose(result.standard_error, expected, rtol=1e-4)


def test_bits_per_byte_count_the_bytes_of_the_text(last):
    model, params = last
    protocol = Protocol("all", 9, 8, "window", partial=True)
    result = perplexity(model, params, TOKENS, protocol, batch=4, bos_id=0, text_bytes=200)
    total = sum(by_loop(params, TOKENS, protocol, 0))
    assert result.tokens == len(TOKENS)
    np.testing.assert_allclose(result.bits_per_byte, total / math.log(2) / 200, rtol=1e-5)
    assert perplexity(model, params, TOKENS, protocol, batch=4, bos_id=0).bits_per_byte is None


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 50])
def test_batches_change_nothing_and_compile_once(small, batch):
    model, params = small
    before = losses.token_losses._cache_size()
    result = perplexity(model, params, TOKENS, PLAIN, batch=batch)
    assert losses.token_losses._cache_size() - before <= 1
    whole = perplexity(model, params, TOKENS, PLAIN, batch=7)
    np.testing.assert_allclose(result.nats_per_token, whole.nats_per_token, rtol=1e-6)
    assert result.tokens == whole.tokens


def test_no_more_logits_than_fit_are_made_at_once(monkeypatch):
    shapes = []

    def seen(rows):
        shapes.append(rows.shape)
        return rows.sum(1)

    batch = jnp.arange(12 * 8).reshape(12, 8)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 5 * 8 * VOCABULARY * 4)
    result = losses.by_rows(seen, batch, (12, 8, VOCABULARY))
    assert shapes == [(4, 8)]  # the largest part of 12 rows that is no larger than 5
    np.testing.assert_array_equal(result, np.asarray(batch).sum(1))
    monkeypatch.setattr(losses, "LOGITS_BYTES", 1)
    assert losses.by_rows(seen, batch, (12, 8, VOCABULARY)).shape == (12,)
    assert shapes[-1] == (1, 8)


def test_the_limit_takes_the_first_windows_and_shows(small):
    model, params = small
    result = perplexity(model, params, TOKENS, PLAIN, batch=2, windows_limit=3)
    first = perplexity(model, params, TOKENS[:24], PLAIN, batch=2)
    assert result.protocol.name == "plain, 3 windows"
    assert result.nats_per_token == first.nats_per_token
    assert result.standard_error == first.standard_error


def test_one_window_has_no_standard_error(small):
    model, params = small
    assert perplexity(model, params, TOKENS[:8], PLAIN, batch=2).standard_error is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": []}, "0 tokens and protocol 'plain' needs 8"),
        ({"tokens": TOKENS[:7]}, "7 tokens and protocol 'plain' needs 8"),
        ({"tokens": TOKENS.reshape(1, -1)}, r"of shape \(N\), got int64\[1, 61\]"),
        ({"tokens": [*TOKENS, VOCABULARY]}, "vocabulary of 11"),
        ({"tokens": [*TOKENS[:8], -1], "protocol": Protocol("p", 9, 9)}, "ids from -1"),
        ({"protocol": Protocol("long", 17, 17)}, "a context of 16; .* window=16 or less"),
        ({"protocol": Protocol("bos", 8, 8, "text")}, "no bos_id was given"),
        ({"protocol": Protocol("bos", 8, 7, "window"), "bos_id": int(TOKENS[0])}, "start with the"),
        ({"batch": 0}, "batch must be .* got 0"),
        ({"windows_limit": 0}, "limit of .* got 0"),
        ({"text_bytes": 0}, "text_bytes must be .* got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(small, change, sentence):
    model, params = small
    given = {"tokens": TOKENS, "protocol": PLAIN, "batch": 2} | change
    with pytest.raises(InputError, match=sentence):
        perplexity(model, params, given.pop("tokens"), given.pop("protocol"), **given)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"window": 1}, "windows of 1 tokens"),
        ({"stride": 0}, "stride of 0"),
        ({"stride": 9}, "stride of 9"),
        ({"bos": "window"}, "from 1 to the 7 tokens"),
        ({"bos": "windows"}, "did you mean 'window'"),
        ({"limit": 0}, "limit of .* got 0"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(PLAIN, **values)


def test_the_named_protocols_and_their_changes():
    assert protocols.names() == ("wikitext2", "c4", "sliding", "bos_windows")
    for name in protocols.names():
        assert protocols.get(name).name == name
    wikitext = protocols.get("wikitext2")
    assert (wikitext.window, wikitext.stride, wikitext.bos) == (2048, 2048, "text")
    assert wikitext.joined(["a", "", "b"]) == "a\n\n\n\nb"
    assert protocols.get("c4").joined(["a", "b"]) == "a b"
    shorter = protocols.get("sliding", window=256)
    assert (shorter.name, shorter.window, shorter.stride) == ("sliding, window 256", 256, 64)
    assert protocols.get("bos_windows", window=9).stride == 8
    assert protocols.get("bos_windows", bos="none").stride == 2048
    assert protocols.get("sliding", stride=1).name == "sliding, stride 1"
    assert protocols.get("wikitext2", window=2048, bos="text") == wikitext
    with pytest.raises(InputError, match="did you mean 'wikitext2'"):
        protocols.get("wikitext")


def dense(nats):
    return PerplexityResult(PLAIN, nats, None, 10, 1)


@pytest.mark.parametrize(
    ("nats", "at_most", "sentence"),
    [
        (math.nan, None, "not finite"),
        (math.inf, None, "not finite"),
        (math.log(50) + 1e-9, None, "no better than guessing among 50"),
        (800.0, None, "perplexity of inf"),
        (math.log(12.0), 11.9, "above the 11.9"),
        (1.0, math.nan, "at_most must be .* got nan"),
        (1.0, 1.0, "at_most must be .* got 1.0"),
    ],
)
def test_the_gate_refuses_a_dense_model_that_is_wrong(nats, at_most, sentence):
    with pytest.raises(InputError, match=sentence):
        gate(dense(nats), uniform=50, at_most=at_most)


def test_the_gate_lets_a_sound_model_pass():
    gate(dense(math.log(49.0)), uniform=50)
    gate(dense(math.log(11.8)), uniform=50, at_most=11.9)


def test_a_broken_model_gives_a_number_that_the_gate_refuses(last):
    model, params = last
    broken = {"now": params["now"].at[3, 4].set(jnp.nan), "before": params["before"]}
    result = perplexity(model, broken, TOKENS, PLAIN, batch=3)
    assert math.isnan(result.nats_per_token)
    with pytest.raises(InputError, match="not finite"):
        gate(result, uniform=VOCABULARY)
