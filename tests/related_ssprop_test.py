"""ssProp against the formula written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.related import ssprop

N, D, OUT = 6, 5, 10


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    shapes = ((2, 3, D), (D, OUT), (OUT,), (2, 3, OUT))
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def gradients(arrays, **how):
    x, kernel, bias, dy = arrays
    _, pull = jax.vjp(lambda *a: ssprop.dense(*a, **how), x, kernel, bias)
    return pull(dy)


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.8])
def test_gradients_pass_through_the_largest_channels_alone(arrays, keep):
    x, kernel, _, dy = (np.asarray(a, np.float64) for a in arrays)
    flat, grad = x.reshape(N, D), dy.reshape(N, OUT)
    kept = np.argsort(-np.abs(grad).mean(0))[: max(1, int(keep * OUT))]
    dkernel, dbias = np.zeros((D, OUT)), np.zeros(OUT)
    dkernel[:, kept] = flat.T @ grad[:, kept]
    dbias[kept] = grad[:, kept].sum(0)
    dx = grad[:, kept] @ kernel[:, kept].T
    found = gradients(arrays, keep=keep)
    for got, exact in zip(found, (dx.reshape(x.shape), dkernel, dbias), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_the_forward_pass_is_dense_and_all_channels_give_the_exact_gradient(arrays):
    x, kernel, bias, dy = arrays
    y, pull = jax.vjp(lambda x, k, b: x @ k + b, x, kernel, bias)
    np.testing.assert_array_equal(ssprop.dense(x, kernel, bias, keep=0.2), y)
    for got, exact in zip(gradients(arrays, keep=1.0), pull(dy), strict=True):
        np.testing.assert_array_equal(got, exact)


def test_random_channels_and_an_exact_input_gradient(arrays):
    x, kernel, _, dy = arrays
    dx, dkernel, _ = gradients(arrays, keep=0.3, key=jax.random.key(1), only_weights=True)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-5, atol=1e-5)
    assert int((jnp.abs(dkernel).sum(0) > 0).sum()) == 3
    exact = jnp.einsum("bnd,bno->do", x, dy)
    np.testing.assert_allclose(dkernel, jnp.where(dkernel == 0, 0, exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((2, 2), "VALID")])
def test_a_convolution_drops_the_same_channels(strides, padding):
    random = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(random.normal(size=s), jnp.float32) for s in ((2, 6, 6, 3), (3, 3, 3, 8))
    )
    how = {"strides": strides, "padding": padding}
    y, pull = jax.vjp(lambda x, k: ssprop.conv(x, k, keep=1.0, **how), x, kernel)
    dy = jnp.asarray(random.normal(size=y.shape), jnp.float32)
    kept = np.argsort(-np.abs(np.asarray(dy)).mean((0, 1, 2)))[:2]
    masked = jnp.zeros_like(dy).at[..., kept].set(dy[..., kept])
    z, sparse = jax.vjp(lambda x, k: ssprop.conv(x, k, keep=0.25, **how), x, kernel)
    np.testing.assert_array_equal(z, y)
    for got, exact in zip(sparse(dy), pull(masked), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_the_backward_products_of_a_step_are_smaller():
    x, kernel = jnp.ones((64, 128)), jnp.ones((128, 256))

    def flops(keep):
        grad = jax.grad(lambda k: (ssprop.dense(x, k, keep=keep) ** 2).sum())
        return jax.jit(grad).lower(kernel).compile().cost_analysis()["flops"]

    assert flops(0.25) < 0.65 * flops(1.0)  # forward 1, backward of the kernel 1: 1.25 / 2


@pytest.mark.slow
def test_a_model_trains_through_it_and_skipped_layers_stay_exact():
    config = ModelConfig(layers=1, heads=2, width=8, context=4, tied_head=False)
    model = gpt.build(config, vocab_size=5)
    tokens = jnp.arange(8).reshape(2, 4) % 5
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss(params, keep):
        with nn.intercept_methods(ssprop.interceptor(keep)):
            return model.apply({"params": params}, tokens).astype(jnp.float32).var()

    exact = jax.grad(lambda p: model.apply({"params": p}, tokens).astype(jnp.float32).var())(params)
    same, sparse = jax.grad(loss)(params, 1.0), jax.grad(loss)(params, 0.25)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sparse["head"]["kernel"], exact["head"]["kernel"], rtol=1e-5)
    up = sparse["block_0"]["mlp"]["up"]["kernel"]
    assert int((jnp.abs(up).sum(0) > 0).sum()) == up.shape[1] // 4


@pytest.mark.slow
def test_convolutions_of_a_model_are_covered():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2), name="conv")(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    model, images = CNN(), jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    params = model.init(jax.random.key(1), images)["params"]

    def loss(params, keep):
        with nn.intercept_methods(ssprop.interceptor(keep)):
            return model.apply({"params": params}, images).var()

    exact = jax.grad(lambda p: model.apply({"params": p}, images).var())(params)
    same, sparse = jax.grad(loss)(params, 1.0), jax.grad(loss)(params, 0.25)
    for name in ("conv", "head"):
        np.testing.assert_allclose(
            same[name]["kernel"], exact[name]["kernel"], rtol=1e-5, atol=1e-7
        )
    kernel, whole = sparse["conv"]["kernel"], exact["conv"]["kernel"]
    assert int((jnp.abs(kernel).sum((0, 1, 2)) > 0).sum()) == 2
    np.testing.assert_allclose(kernel, jnp.where(kernel == 0, 0, whole), rtol=1e-5, atol=1e-7)


def test_schedules_are_what_they_say():
    def shares(**how):
        return [round(ssprop.Schedule(**how)(n), 3) for n in range(how["length"])]

    assert shares(keep=0.2, length=3) == [0.2] * 3
    assert shares(keep=0.8, last=0.2, length=4, kind="linear") == [0.8, 0.6, 0.4, 0.2]
    assert shares(keep=0.8, last=0.2, length=3, kind="cosine") == [0.8, 0.5, 0.2]
    assert shares(keep=0.8, last=0.2, length=4, kind="bar") == [0.8, 0.8, 0.2, 0.2]
    assert shares(keep=0.2, length=5, warmup=2) == [1.0, 1.0, 0.2, 0.2, 0.2]
    headline = ssprop.Schedule(0.2, length=300, interleaved=True)
    assert headline.mean == pytest.approx(0.6)  # 40 % dropped on average


def convolved(x=None, **how):
    x = jnp.ones((1, 4, 4, 2)) if x is None else x
    return ssprop.conv(x, jnp.ones((3, 3, 2, 4)), keep=0.5, **how)


def test_a_last_share_needs_a_schedule_that_reaches_it():
    with pytest.raises(InputError, match="constant schedule has no last share"):
        ssprop.Schedule(0.2, last=0.8)


def test_a_share_of_whole_channels_is_no_channel_less():
    for count in range(1, 130):
        for kept in range(1, count + 1):
            assert ssprop.channels(kept / count, count) == kept
            assert ssprop.channels(np.float32(kept / count), count) == kept


def test_padding_may_be_lists_and_dtypes_are_promoted():
    assert convolved(padding=[[1, 1], [0, 1]]).shape == (1, 4, 3, 4)
    assert convolved(jnp.ones((1, 4, 4, 2), jnp.bfloat16)).dtype == jnp.float32
    assert convolved(jnp.ones((1, 4, 4, 2), int)).dtype == jnp.float32
    grad = jax.grad(lambda x: ssprop.dense(x, jnp.ones((2, 4), int), keep=0.5).sum())
    np.testing.assert_allclose(grad(jnp.ones((3, 2))), 2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ssprop.channels(0, 4),
        lambda: ssprop.channels(1.5, 4),
        lambda: ssprop.channels("0.5", 4),
        lambda: ssprop.channels(float("nan"), 4),
        lambda: ssprop.interceptor(-1),
        lambda: ssprop.Schedule(0.0),
        lambda: ssprop.Schedule(0.5, last=2.0),
        lambda: ssprop.Schedule(0.5, kind="step"),
        lambda: ssprop.Schedule(0.5, length=0),
        lambda: ssprop.Schedule(0.5)(-1),
        lambda: ssprop.Schedule(0.5)(1.5),
        lambda: ssprop.Schedule(0.5)("1"),
        lambda: convolved(strides=(0, 1)),
        lambda: convolved(strides=(1, -1)),
        lambda: convolved(padding=((-9, 0), (0, 0))),
    ],
)
def test_settings_out_of_range_are_refused(call):
    with pytest.raises(InputError, match="must be"):
        call()
