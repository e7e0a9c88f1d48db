"""Calibration with batches over eight devices: the same statistics, gradients and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from swe_prune import blockwise, calibration
from swe_prune.calibration import layer_inputs

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
KEYS = ("input_norm", "hessian")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="down")(jnp.tanh(nn.Dense(16, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        x = x.reshape(batch * length, width)  # as models that flatten their batch do
        for layer in range(3):
            x = Block(name=f"block_{layer}")(x)
        return nn.Dense(2, name="head")(x).reshape(batch, length, 2)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCHES = [drawn(8, 5, 8, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def variables():
    return Model().init(jax.random.key(0), BATCHES[0])


def over_data(mesh, batches=BATCHES):
    """Lazily, as a data pipeline gives them."""
    return (jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in batches)


def placed(variables, mesh, spec):
    def place(x):
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else P()))

    return jax.tree.map(place, variables)


def assert_close(got, expected):
    # atol: the devices add their sums in another order, and an entry may be nearly 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("spec", [P(), P(None, "model")], ids=["replicated", "outputs"])
def test_statistics_are_those_of_one_device(mesh, variables, spec):
    alone = calibration.inputs(Model(), variables, BATCHES, hessian=True)
    spread = calibration.inputs(
        Model(), placed(variables, mesh, spec), over_data(mesh), hessian=True
    )
    for key in KEYS:
        assert_close(spread[key], alone[key])


def test_no_input_leaves_its_device(mesh, variables):
    wanted = {f"block_{i}/{name}/kernel": None for i in range(3) for name in ("up", "down")}
    tracing = layer_inputs.Tracing(lambda own, batch: layer_inputs.applied(Model(), own, batch))
    measure = layer_inputs.make_measure_fn(tracing, wanted, hessian=True)
    batch = jax.ShapeDtypeStruct((8, 5, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(measure).lower(placed(variables, mesh, P()), batch).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_gradients_are_those_of_one_device(mesh, variables):
    def loss(params, batch):
        return jnp.mean(Model().apply({"params": params}, batch) ** 2)

    alone = calibration.gradients(loss, variables["params"], BATCHES)
    params = placed(variables["params"], mesh, P(None, "model"))
    assert_close(calibration.gradients(loss, params, over_data(mesh)), alone)


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=["outputs", "both"])
def test_solver_gives_the_mask_and_the_weights_of_one_device(mesh, spec):
    x, weight = drawn(64, 24), drawn(24, 16, seed=1)
    hessian = jnp.asarray(2 / 64 * x.T @ x)
    alone = blockwise.sparsegpt(weight, hessian, 0.5, block=10)
    spread = blockwise.sparsegpt(
        jax.device_put(weight, NamedSharding(mesh, spec)),
        jax.device_put(hessian, NamedSharding(mesh, P())), 0.5, block=10,
    )  # fmt: skip
    np.testing.assert_array_equal(spread[1], alone[1])
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("offload", [False, True])
def test_blocks_are_pruned_as_on_one_device(mesh, variables, method, offload):
    options = {"blocks": r"block_\d", "method": method, "sparsity": 0.5}
    alone = blockwise.prune_blocks(Model(), variables, BATCHES, **options)
    spread = blockwise.prune_blocks(
        Model(), placed(variables, mesh, P()), over_data(mesh), offload=offload, **options
    )
    jax.tree.map(np.testing.assert_array_equal, spread[1], alone[1])
    assert_close(spread[0], alone[0])


def test_activations_come_back_from_host_memory_divided_as_they_were(mesh, variables, monkeypatch):
    seen, back = [], blockwise.runner.on_device

    def watched(state):
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        seen.extend(jax.tree.leaves(back(state)))
        return back(state)

    monkeypatch.setattr(blockwise.runner, "on_device", watched)
    blockwise.prune_blocks(
        Model(), placed(variables, mesh, P()), over_data(mesh), blocks=r"block_\d", sparsity=0.5,
        offload=True,
    )  # fmt: skip
    assert len(seen) == 3 * (3 + 2)  # batches, to be measured and to go on, the last not
    assert all(len(leaf.sharding.device_set) == 8 for leaf in seen)
    assert all(len({str(s.index) for s in leaf.addressable_shards}) == 4 for leaf in seen)
