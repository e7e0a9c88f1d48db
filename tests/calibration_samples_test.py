"""Samples and moments of the inputs of weights, against the activations of the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from swe_prune import calibration
from swe_prune.errors import InputError


class MLP(nn.Module):
    """An MLP on sequences, whose hidden values are relu(up(x))."""

    twice: bool = False

    @nn.compact
    def __call__(self, x):
        down = nn.Dense(3, name="down")
        y = down(nn.relu(nn.Dense(5, name="up")(x)))
        return down(jnp.tile(y, 2)[..., :5]) if self.twice else y


BATCHES = np.split(np.random.default_rng(0).normal(size=(12, 4, 3)).astype(np.float32), 3)
MODEL = MLP()
VARIABLES = MODEL.init(jax.random.key(0), BATCHES[0])
DOWN = "down/kernel"


def hidden(batches, params=VARIABLES["params"]):
    up = jax.tree.map(lambda x: np.asarray(x, np.float64), params["up"])
    x = np.concatenate([np.asarray(batch, np.float64).reshape(-1, 3) for batch in batches])
    return np.maximum(x @ up["kernel"] + up["bias"], 0)


def rows_of(sample, whole):
    """For each row of a sample, the row of the whole that it is."""
    near = np.abs(np.asarray(sample)[:, None] - whole[None]).max(-1)
    assert near.min(1).max() < 1e-6
    return near.argmin(1)


def drawn(**options):
    return calibration.samples(MODEL, VARIABLES, BATCHES, leaves="down/kernel", **options)[DOWN]


def test_samples_are_distinct_tokens_of_all_batches_by_seed():
    whole = hidden(BATCHES)
    sample = drawn(tokens=24)
    assert sample.shape == (24, 5)
    assert sample.dtype == jnp.float32
    found = rows_of(sample, whole)
    assert len(set(found)) == 24
    assert set(found // 16) == {0, 1, 2}
    np.testing.assert_array_equal(drawn(tokens=24), sample)
    assert set(rows_of(drawn(tokens=24, seed=1), whole)) != set(found)


def test_fewer_tokens_than_wanted_are_all_taken():
    assert sorted(rows_of(drawn(tokens=100), hidden(BATCHES))) == list(range(48))


def test_every_token_is_as_likely():
    """Of 600 tokens of 6,000 each batch and each half gives its part (5 deviations)."""
    batches = [np.full((2, 2000, 1), 1.0), np.full((2, 1000, 1), 2.0)]
    for batch in batches:
        batch[1] *= -1
    drawn = calibration.samples(
        lambda w, x: x @ w, jnp.ones((1, 1)), batches, leaves="", tokens=600
    )[""]  # fmt: skip
    counts = [int((np.asarray(drawn) == value).sum()) for value in (1, -1, 2, -2)]
    assert sum(counts) == 600
    assert np.abs(np.array(counts) - [200, 200, 100, 100]).max() < 5 * np.sqrt(600 * 2 / 9)


def test_padding_is_not_drawn_and_not_counted():
    weights = np.ones((4, 4), np.float32)
    weights[:, 2:] = 0
    batches = [{"inputs": x, "weights": weights} for x in BATCHES]
    counted = hidden([x[:, :2] for x in BATCHES])
    sample = calibration.samples(MODEL, VARIABLES, batches, leaves=DOWN, tokens=100)[DOWN]
    assert sorted(rows_of(sample, counted)) == list(range(24))
    found = calibration.moments(MODEL, VARIABLES, batches, leaves=DOWN, gram=True)[DOWN]
    assert_moments(found, counted, sequences=12)


def assert_moments(found, x_NxR, sequences):
    mean = np.abs(x_NxR).reshape(sequences, -1, x_NxR.shape[-1]).mean(1)
    np.testing.assert_allclose(found.tokens, len(x_NxR))
    np.testing.assert_allclose(found.mean, x_NxR.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.variance, x_NxR.var(0), rtol=1e-5)
    np.testing.assert_allclose(found.sequence, np.sqrt((mean**2).sum(0)), rtol=1e-5)
    np.testing.assert_allclose(found.gram, x_NxR.T @ x_NxR / len(x_NxR), rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_all_tokens():
    found = calibration.moments(MODEL, VARIABLES, BATCHES, leaves=DOWN, gram=True)[DOWN]
    assert_moments(found, hidden(BATCHES), sequences=12)
    assert calibration.moments(MODEL, VARIABLES, BATCHES, leaves=DOWN)[DOWN].gram is None


def test_each_layer_of_a_scan_has_its_own():
    """Stacked in front and at axis 1, with a plain function."""
    up, down = (np.random.default_rng(n).normal(size=(2, 3, 3)).astype(np.float32) for n in (1, 2))

    def run(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x, (params["up"], jnp.moveaxis(params["down"], 1, 0)))[0]

    params = {"up": jnp.asarray(up), "down": jnp.moveaxis(jnp.asarray(down), 0, 1)}
    x = np.concatenate(BATCHES).reshape(-1, 3).astype(np.float64)
    sample = calibration.samples(run, params, BATCHES, leaves="down", tokens=100)["down"]
    found = calibration.moments(run, params, BATCHES, leaves="down", gram=True)["down"]
    for layer in range(2):
        h = np.tanh(x @ up[layer])
        assert sorted(rows_of(sample[layer], h)) == list(range(48))
        own = jax.tree.map(lambda leaf: leaf[layer], vars(found))  # noqa: B023
        assert_moments(type(found)(**own), h, sequences=12)
        x = x + h @ down[layer]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leaves": "nothing"}, "matches no weight"),
        ({"leaves": "down/bias"}, "no product used 'down/bias'"),
        ({"leaves": DOWN, "tokens": 1}, "tokens must be 2 or more"),
        ({"leaves": DOWN, "batches": []}, "the calibration set is empty"),
        ({"leaves": DOWN, "batches": [BATCHES[0][:1, :1]]}, "hold 1 tokens that count"),
        ({"leaves": DOWN, "batches": [BATCHES[0] * np.inf]}, "has NaN or inf"),
        ({"leaves": DOWN, "fn": MLP(twice=True)}, "is used in 2 products"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_said(options, said):
    given = {"fn": MODEL, "params": VARIABLES, "batches": BATCHES, **options}
    with pytest.raises(InputError, match=said):
        calibration.samples(given.pop("fn"), given.pop("params"), given.pop("batches"), **given)
