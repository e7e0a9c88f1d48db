"""The divergence from the dense model, against float64, and the count of what repeats."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import Protocol, distance, kl_to_dense, repetition
from swe_prune.evaluation import token_losses as losses
from swe_prune.models import gpt

VOCABULARY = 13
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 60)
PROTOCOL = Protocol("overlapping", 8, 3, partial=True)


@pytest.fixture(scope="module")
def pair():
    """A model, its weights, and weights that differ from them."""
    model = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=8), VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    scaled = jax.tree.map(lambda w: 8 * w, params)
    return model, scaled, jax.tree.map(lambda w: jnp.where(jnp.abs(w) < 0.1, 0, w), scaled)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def log_p(model, params, rows):
    filled = np.pad(rows, ((0, 0), (0, 8 - rows.shape[1])))  # one shape, one program
    logits = np.asarray(logits_of(model, params, filled), np.float64)[:, : rows.shape[1]]
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def scored(model, dense, pruned):
    """The divergence and agreement of each scored token, from the protocol in words."""
    divergence, same, done = [], [], 1
    for start in range(0, len(TOKENS), 3):
        window = TOKENS[start : start + 8]
        p, q = log_p(model, dense, window[None])[0], log_p(model, pruned, window[None])[0]
        for at in range(done - start, len(window)):
            divergence.append((np.exp(p[at - 1]) * (p[at - 1] - q[at - 1])).sum())
            same.append(p[at - 1].argmax() == q[at - 1].argmax())
        done = start + len(window)
        if done == len(TOKENS):
            return divergence, same


@pytest.mark.quick(1)
@pytest.mark.parametrize("bytes_at_once", [losses.LOGITS_BYTES, 1])
def test_the_divergence_is_that_of_float64(pair, bytes_at_once, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", bytes_at_once)
    distance._compared.clear_cache()
    model, dense, pruned = pair
    divergence, same = scored(model, dense, pruned)
    result = kl_to_dense(model, dense, pruned, TOKENS, PROTOCOL, batch=4)
    assert result.tokens == len(divergence) == len(TOKENS) - 1
    assert 0.01 < np.mean(divergence) < 5
    assert 0 < np.mean(same) < 1
    np.testing.assert_allclose(result.nats_per_token, np.mean(divergence), rtol=1e-5)
    assert result.agreement == np.mean(same)
    assert result.standard_error > 0


def test_a_model_is_at_no_distance_from_itself(pair):
    model, dense, _ = pair
    result = kl_to_dense(model, dense, dense, TOKENS, PROTOCOL, batch=4)
    assert result.nats_per_token == 0
    assert result.agreement == 1


def test_the_direction_is_from_the_dense_model(pair):
    model, dense, pruned = pair
    there = kl_to_dense(model, dense, pruned, TOKENS, PROTOCOL, batch=4)
    back = kl_to_dense(model, pruned, dense, TOKENS, PROTOCOL, batch=4)
    assert abs(there.nats_per_token - back.nats_per_token) > 1e-3
    assert there.agreement == back.agreement


def test_a_narrower_model_is_held_against_the_dense_one(pair):
    model, dense, _ = pair
    narrow = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=8, hidden=4), VOCABULARY)
    params = jax.jit(narrow.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    result = kl_to_dense(model, dense, params, TOKENS, PROTOCOL, batch=4, pruned_model=narrow)
    p, q = (log_p(m, w, TOKENS[None, :8]) for m, w in ((model, dense), (narrow, params)))
    first = kl_to_dense(model, dense, params, TOKENS[:8], PROTOCOL, batch=4, pruned_model=narrow)
    expected = (np.exp(p) * (p - q)).sum(-1)[0, :-1].mean()
    np.testing.assert_allclose(first.nats_per_token, expected, rtol=1e-5)
    assert result.nats_per_token > 0


def test_a_text_too_short_for_the_protocol_is_refused(pair):
    model, dense, pruned = pair
    with pytest.raises(InputError, match="give more text"):
        kl_to_dense(model, dense, pruned, TOKENS[:1], PROTOCOL, batch=4)
    with pytest.raises(InputError, match=r"batch must be .* got 0"):
        kl_to_dense(model, dense, pruned, TOKENS, PROTOCOL, batch=0)


def looped(tokens):
    """The longest stretch made of one block, at least twice in full, by looking at them all."""
    best = (0, 0)
    for period in range(1, len(tokens) // 2 + 1):
        for start in range(len(tokens) - 2 * period + 1):
            stop = start + period
            while stop < len(tokens) and tokens[stop] == tokens[stop - period]:
                stop += 1
            if stop - start >= 2 * period and stop - start > best[0]:
                best = (stop - start, period)
    return best


@hypothesis.given(tokens=st.lists(st.integers(0, 2), max_size=20))
@hypothesis.settings(deadline=None)
def test_repetition_counts_what_repeats(tokens):
    found = repetition(tokens)
    for n, share in enumerate(found.shares, start=1):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        expected = sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(1, len(grams))
        np.testing.assert_allclose(share, expected, rtol=1e-12)
    assert (found.loop, found.period) == looped(tokens)


def test_repetition_of_plain_cases():
    assert repetition(range(50)).shares == (0, 0, 0, 0)
    assert repetition(range(50)).loop == 0
    assert repetition([7] * 9).shares == (8 / 9, 7 / 8, 6 / 7, 5 / 6)
    assert (repetition([7] * 9).loop, repetition([7] * 9).period) == (9, 1)
    assert (repetition([9, 1, 2, 3, 1, 2, 3, 1, 8]).loop) == 7
    assert repetition([]).shares == (0, 0, 0, 0)
    assert len(repetition([1, 2], longest=2).shares) == 2


@pytest.mark.parametrize(
    ("tokens", "longest", "sentence"),
    [
        ([[1, 2]], 4, r"tokens must be a sequence of integers .*got \[\[1, 2\]\]"),
        ([1], 0, "longest must be an integer of at least 1"),
    ],
)
def test_repetition_refuses_what_is_no_sequence(tokens, longest, sentence):
    with pytest.raises(InputError, match=sentence):
        repetition(tokens, longest=longest)
