"""ADMM over the training itself, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune import masks, sparse_training
from swe_prune.errors import InputError

TARGET = {"kernel": np.linspace(-2.0, 3.0, 12).reshape(4, 3), "bias": np.array([1.0, 2.0, 3.0])}
START = {name: 0.1 + 0.01 * value for name, value in TARGET.items()}  # no two alike
RATE, PENALTY, EVERY, STEPS = 0.1, 0.5, 3, 14


def projected(x, kept):
    small = np.argsort(np.abs(x).ravel(), kind="stable")[: x.size - kept]
    out = x.copy().ravel()
    out[small] = 0
    return out.reshape(x.shape)


def reference():
    """Returns x, z and u after every step of plain gradient descent, float64."""
    x = dict(START)
    z, u = projected(x["kernel"], 6), np.zeros_like(x["kernel"])
    seen = []
    for step in range(1, STEPS + 1):
        slopes = {name: x[name] - TARGET[name] for name in x}
        slopes["kernel"] = slopes["kernel"] + PENALTY * (x["kernel"] - z + u)
        x = {name: x[name] - RATE * slopes[name] for name in x}
        if step % EVERY == 0:
            z = projected(x["kernel"] + u, 6)
            u = u + x["kernel"] - z
        seen.append((x, z, u))
    return seen


def trained(optimizer, steps=STEPS):
    params = {name: jnp.asarray(value, jnp.float32) for name, value in START.items()}
    state = optimizer.init(params)
    seen = []

    @jax.jit
    def step(params, state):
        slopes = jax.tree.map(lambda p, t: p - jnp.float32(t), params, TARGET)
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen.append((params, state))
    return seen


def test_it_is_the_float64_one():
    optimizer = sparse_training.elsa(optax.sgd(RATE), 0.5, penalty=PENALTY, every=EVERY)
    for (params, state), (x, z, u) in zip(trained(optimizer), reference(), strict=True):
        np.testing.assert_allclose(params["kernel"], x["kernel"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(params["bias"], x["bias"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.sparse["kernel"], z, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.dual["kernel"], u, rtol=2e-5, atol=1e-6)
        assert state.sparse["bias"] is None  # dense by default


def test_the_masks_are_of_the_largest_weights_with_their_dual():
    optimizer = sparse_training.elsa(optax.sgd(RATE), 0.5, penalty=PENALTY, every=EVERY)
    params, state = trained(optimizer)[-1]
    x, _, u = reference()[-1]
    mask = sparse_training.elsa_masks(state, params, 0.5)
    np.testing.assert_array_equal(mask["kernel"], projected(x["kernel"] + u, 6) != 0)
    assert masks.summary(mask).pruned == 6
    # What went has been drawn towards 0 meanwhile.
    gone = ~np.asarray(mask["kernel"])
    plain = trained(optax.sgd(RATE))[-1][0]["kernel"]
    assert np.abs(params["kernel"])[gone].max() < np.abs(np.asarray(plain))[gone].max()


def test_without_a_penalty_it_is_the_optimizer():
    wrapped = trained(sparse_training.elsa(optax.adam(RATE), 0.5, penalty=0.0))
    for (params, _), (plain, _) in zip(wrapped, trained(optax.adam(RATE)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"penalty": -1.0}, "penalty must be"),
        ({"every": 0}, "every must be"),
        ({"every": 2.5}, "every must be"),
        ({"penalty": float("nan")}, "penalty must be"),
    ],
)
def test_numbers_are_checked(given, match):
    with pytest.raises(InputError, match=match):
        sparse_training.elsa(optax.sgd(0.1), 0.5, **given)


def test_it_needs_the_parameters():
    optimizer = sparse_training.elsa(optax.sgd(0.1), 0.5)
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(InputError, match="elsa needs the parameters"):
        optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "x"])
def test_the_sparsity_is_checked_before_training(sparsity):
    with pytest.raises(InputError, match="sparsity"):
        sparse_training.elsa(optax.sgd(0.1), sparsity).init({"kernel": jnp.ones((2, 2))})


def test_what_is_prunable_must_be_said_by_true_and_false():
    start = {name: jnp.asarray(value, jnp.float32) for name, value in START.items()}
    marks = {"kernel": np.ones((4, 3), bool), "bias": False}  # a mask
    optimizer = sparse_training.elsa(optax.sgd(RATE), 0.5, prunable=marks)
    with pytest.raises(InputError, match="prunable of 'kernel' must be True or False"):
        optimizer.init(start)
