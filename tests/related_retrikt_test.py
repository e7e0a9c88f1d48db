"""The stand-in for RetriKT against the formula written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.related import retrikt

M, N, D, V = 20, 7, 5, 4


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    keys, queries = random.normal(size=(M, D)), random.normal(size=(N, D))
    values = random.dirichlet(np.ones(V), M)
    return tuple(jnp.asarray(one, jnp.float32) for one in (keys, values, queries))


def neighbors(keys, values, queries, k, temperature):
    keys, values, queries = (np.asarray(one, np.float64) for one in (keys, values, queries))
    found = np.zeros((len(queries), values.shape[1]))
    for n, query in enumerate(queries):
        far = ((keys - query) ** 2).sum(1)
        near = np.argsort(far)[:k]
        weight = np.exp(-far[near] / temperature)
        found[n] = weight / weight.sum() @ values[near]
    return found


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 0.5), (M, 4.0)])
def test_the_nearest_values_count_by_their_distance(arrays, k, temperature, monkeypatch):
    keys, values, queries = arrays
    exact = neighbors(keys, values, queries, k, temperature)
    monkeypatch.setattr(retrikt, "AT_ONCE", 3 * M)  # in parts
    found = retrikt.retrieved(retrikt.store(keys, values), queries, k=k, temperature=temperature)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)


def test_tokens_are_distributions_and_a_key_finds_itself(arrays):
    keys, _, _ = arrays
    tokens = jnp.arange(M) % V
    made = retrikt.store(keys, tokens, symbols=V)
    assert (made.size, made.bytes) == (M, 4 * M * (D + V))
    found = retrikt.retrieved(made, keys, k=1)
    np.testing.assert_array_equal(found.argmax(1), tokens)


def test_the_student_is_mixed_with_what_was_found(arrays):
    _, values, _ = arrays
    random = np.random.default_rng(1)
    logits = jnp.asarray(random.normal(size=(N, V)), jnp.float32)
    p = np.exp(np.float64(logits))
    p = p / p.sum(1, keepdims=True)
    for share in (0.25, 0.9):
        exact = np.log(share * np.float64(values[:N]) + (1 - share) * p)
        found = retrikt.interpolated(logits, values[:N], share)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    # The limits: the student alone, and a token that no neighbor has.
    np.testing.assert_allclose(
        retrikt.interpolated(logits, values[:N], 0.0), np.log(p), rtol=1e-5, atol=1e-6
    )
    sure = jnp.zeros((N, V)).at[:, 0].set(1.0)
    np.testing.assert_array_equal(retrikt.interpolated(logits, sure, 1.0)[:, 1:], -np.inf)
    np.testing.assert_allclose(
        retrikt.interpolated(logits, sure, 0.5)[:, 1:], np.log(p / 2)[:, 1:], rtol=1e-5
    )


def test_states_are_what_the_head_reads():
    model = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=4), vocab_size=V)
    tokens = jnp.arange(8).reshape(2, 4) % V
    params = model.init(jax.random.key(0), tokens)["params"]
    hidden, logits = retrikt.states(model, params, tokens)
    assert hidden.shape == (8, 8)
    np.testing.assert_allclose(hidden @ params["embedding"]["embedding"].T, logits, atol=1e-5)


ENTRIES = retrikt.Store(jnp.ones((M, D)), jnp.ones((M, V)) / V)
QUERIES = jnp.ones((N, D))
MODEL = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=4), V)


def test_neighbors_far_from_the_origin_are_found(arrays):
    keys, values, _ = arrays
    far = retrikt.store(keys + 1e4, values)
    np.testing.assert_array_equal(retrikt.retrieved(far, far.keys, k=1), values)
    near = retrikt.retrieved(retrikt.store(keys, values), keys, k=2, temperature=1e-36)
    np.testing.assert_array_equal(near, values)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: retrikt.store(jnp.ones((0, D)), jnp.ones((0, V))), "at least one, got 0 keys"),
        (lambda: retrikt.store(jnp.ones((2, D)), jnp.ones((3, V))), "values must have shape"),
        (lambda: retrikt.store(jnp.ones((2, D)), jnp.ones(2, int)), "need symbols="),
        (lambda: retrikt.retrieved(ENTRIES, QUERIES, k=0), "k must be between 1 and the store's"),
        (lambda: retrikt.retrieved(ENTRIES, QUERIES, k=M + 1), "k must be between 1 and"),
        (lambda: retrikt.retrieved(ENTRIES, QUERIES[:, 1:]), "as wide as the keys, 5, got 4"),
        (lambda: retrikt.retrieved(ENTRIES, QUERIES, temperature=0.0), "temperature must be"),
        (lambda: retrikt.interpolated(QUERIES, QUERIES, 1.5), "share must be between 0 and 1"),
        (lambda: retrikt.interpolated(QUERIES, QUERIES[1:], 0.5), "must have shape"),
        (lambda: retrikt.interpolated(QUERIES, QUERIES, 0.5), "found must be distributions"),
        (lambda: retrikt.interpolated(QUERIES, -QUERIES / D, 0.5), "found must be distributions"),
        (lambda: retrikt.store(QUERIES, jnp.log(QUERIES / D)), "values must be distributions"),
        (lambda: retrikt.store(QUERIES, QUERIES * jnp.nan), "values must be distributions"),
        (lambda: retrikt.store(QUERIES * jnp.nan, QUERIES / D), "the array of keys has NaN"),
        (lambda: retrikt.store(QUERIES, QUERIES / D, D + 1), "symbols = 6 columns, got 5"),
        (lambda: retrikt.store(QUERIES, -jnp.ones(N, int), 3), "got -1 to -1"),
        (lambda: retrikt.store(QUERIES, jnp.ones(N, int), 10**10), "symbols must be between"),
        (lambda: retrikt.retrieved(ENTRIES, QUERIES, temperature=1e-40), "temperature must be"),
        (lambda: retrikt.states(MODEL, {}, jnp.full((1, 2), V)), "a vocabulary of 4"),
        (lambda: retrikt.states(MODEL, {}, jnp.full((1, 2), -1)), "ids from -1"),
    ],
)
def test_what_cannot_be_retrieved_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
