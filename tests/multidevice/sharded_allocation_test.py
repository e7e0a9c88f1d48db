"""Allocations on eight devices: those of one device, with no weight gathered to make them."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_core_test import collectives

from swe_prune import allocation, counting, tree
from swe_prune.allocation import by_score, std_rule

# The package has functions under the names of these modules.
alpha_pruning, ecoflap, owl = (
    importlib.import_module(f"swe_prune.allocation.{name}")
    for name in ("alpha_pruning", "ecoflap", "owl")
)

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
SPECS = {"inputs": P("x", None), "outputs": P(None, "y"), "both": P("x", "y"),
         "one axis over all": P(("x", "y"), None), "replicated": P()}  # fmt: skip
SHAPES = {"block_0/up": (32, 64), "block_0/down": (64, 32), "block_1/up": (48, 40)}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def weights():
    """Blocks of unlike tails and outliers; a vector that stays dense."""
    rng = np.random.default_rng(0)
    blocks: dict = {"block_0": {"bias": np.ones(8, np.float32)}, "block_1": {}}
    for power, (name, shape) in enumerate(SHAPES.items()):
        block, tensor = name.split("/")
        spectrum = np.arange(1, shape[1] + 1) ** (-0.3 * power)
        blocks[block][tensor] = (rng.normal(size=shape) * spectrum).astype(np.float32)
    return blocks


def placed(params, mesh, spec):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if np.ndim(x) == 2 else P())), params
    )


def loss(params, batch):
    return batch * sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(params))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", allocation.names())
def test_allocation_is_that_of_one_device(mesh, name, spec):
    options = {
        "table": {"rules": {"up": 0.7, ".*": 0.5}},
        "ecoflap": {"batches": [np.float32(2)], "loss": loss, "epsilon": 0.1},
        "owl": {"m": 2.0},
    }.get(name, {})
    got = []
    for params in (weights(), placed(weights(), mesh, SPECS[spec])):
        scores = tree.map_leaves(lambda _, w: jnp.abs(w) if w.ndim == 2 else None, params)
        given = options | ({"curvature": scores} if name == "curvature" else {})
        got.append(allocation.allocate(name, 0.6, params=params, scores=scores, **given))
    assert got[0] == got[1]
    assert len(set(got[0].sparsities.values())) > 1 or name == "uniform"


SUMS = {
    "global": lambda x: by_score._kept_each([x, x + 1], counting.count(700), None),
    "std": lambda x: std_rule._kept_each([x, x + 1], jnp.float32(1.2), [jnp.std(x), jnp.std(x)]),
    "owl": lambda x: owl._outliers([x, x + 1], 5.0),
    "sum of powers": lambda x: ecoflap._power_sum(x, 2),
}


def abstract(mesh, spec, shape=(32, 64)):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[spec]))


@pytest.mark.parametrize("spec", ["inputs", "outputs", "both", "one axis over all"])
@pytest.mark.parametrize("name", SUMS)
def test_only_sums_leave_a_device(mesh, name, spec):
    text = jax.jit(SUMS[name]).lower(abstract(mesh, spec)).compile().as_text()
    found = list(collectives(text))
    assert found
    assert {operation for operation, _ in found} == {"all-reduce"}
    assert all(elements <= 8 for _, elements in found), found


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(spec, shape) for shape in [(32, 64), (64, 32), (48, 40)]
     for spec in ("inputs", "outputs", "both", "one axis over all")]
    + [("outputs", (42, 12)), ("outputs", (12, 42))],
)  # fmt: skip
def test_of_a_weight_only_its_square_on_the_small_side_is_gathered(mesh, spec, shape):
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x = jax.device_put(weight, NamedSharding(mesh, SPECS[spec]))
    text = alpha_pruning._matrix.lower(x, (0,), 8).compile().as_text()
    matrix = alpha_pruning._matrix(x, (0,), 8)
    sharding = alpha_pruning._mesh_sharding(x)
    found = list(collectives(alpha_pruning._gram.lower(matrix, sharding).compile().as_text()))
    assert ("all-reduce", min(shape) ** 2) in found, "the square, summed over the devices"
    parts = [n for kind, n in [*found, *collectives(text)] if kind != "all-reduce"]
    assert all(n < math.prod(shape) for n in parts), (found, list(collectives(text)))
    long = weight.astype(np.float64) if shape[0] >= shape[1] else weight.T.astype(np.float64)
    np.testing.assert_allclose(alpha_pruning._gram(matrix, sharding), long.T @ long, rtol=1e-5,
                               atol=1e-5 * max(shape))  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_perturbed_weight_lies_as_the_weight_and_is_that_of_one_device(mesh, spec):
    weight = weights()["block_0"]["up"]
    key = ecoflap._key(0, 0, "block_0/up")
    alone = ecoflap._perturbed(weight, key, 0.1, None)
    x = jax.device_put(weight, NamedSharding(mesh, SPECS[spec]))
    spread = ecoflap._perturbed(x, key, 0.1, x.sharding)
    assert spread.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(spread, alone)
    text = ecoflap._perturbed.lower(x, key, 0.1, x.sharding).compile().as_text()
    assert list(collectives(text)) == []
