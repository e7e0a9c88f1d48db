"""Sparse training on eight devices: the same masks as on one, and no weight leaves its device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_core_test import collectives

from swe_prune import masks, schedules, sparse_training
from swe_prune.sparse_training import movement

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
SPECS = {"inputs": P("x", None), "outputs": P(None, "y"), "both": P("x", "y"),
         "one axis over all": P(("x", "y"), None), "replicated": P()}  # fmt: skip
ROWS, COLUMNS = 32, 64
OPTIMIZER = optax.adam(1e-2)
PRUNE = sparse_training.prune_on_schedule(
    schedules.Cubic(0.8, begin=1, end=3, every=1), "magnitude", scope="global"
)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def drawn(seed, ties=True):
    """Few distinct values, so that ties are cut."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(ROWS, COLUMNS)).round(1 if ties else 9).astype(np.float32)
        for name in "ab"
    }


def placed(arrays, mesh, spec):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if np.ndim(x) == 2 else P())), arrays
    )


def rigl(t, params, mask, state, grads, key):
    return sparse_training.rigl_update(params, mask, state, 0.1 * t, grads)


def evolve(t, params, mask, state, grads, key):
    return sparse_training.set_update(params, mask, state, 0.1 * t, key, regrown="reset")


def scheduled(t, params, mask, state, grads, key):
    mask = PRUNE(t, mask, params)
    return masks.apply(params, mask), mask, masks.hold_moments(state, mask)


def straight(t, params, mask, state, grads, key):
    def loss(p):
        seen = sparse_training.ste_magnitude(p, None, 0.2 * t)
        return sum(jnp.sum((seen[n] - grads[n]) ** 2) for n in seen)

    return jax.grad(loss)(params), mask, state


def learned(t, params, mask, state, grads, key):
    hard = movement.hard_masks(grads, 0.2 * t)
    soft = movement.soft_masks(grads, 0.25 * t)

    def loss(p, s):
        seen = [movement.forward(p, s, m) for m in (hard, soft)]
        return sum(jnp.sum((s[n] - grads[n]) ** 2) for s in seen for n in s)

    return jax.grad(loss, argnums=(0, 1))(params, grads), (hard, soft), state


STEPS = {f.__name__: f for f in (rigl, evolve, scheduled, straight, learned)}


def given(place):
    mask = masks.by_sparsity(drawn(2), 0.6)
    params = masks.apply(drawn(0), mask)
    params, mask, grads = (place(x) for x in (params, mask, drawn(1)))
    state = place(jax.tree.map(lambda x: x + jnp.ones_like(x), OPTIMIZER.init(params)))
    return params, mask, state, grads, jax.random.key(0)


@pytest.mark.parametrize("name", STEPS)
def test_everything_is_as_on_one_device(mesh, name):
    alone = given(lambda x: x)
    step = jax.jit(STEPS[name])
    for t in (1, 3):
        expected = step(jnp.int32(t), *alone)
        for spec in ("both", "outputs", "replicated"):
            got = step(jnp.int32(t), *given(lambda x, spec=spec: placed(x, mesh, SPECS[spec])))
            jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("spec", ["both", "one axis over all"])
@pytest.mark.parametrize("name", STEPS)
def test_no_weight_leaves_its_device_and_results_stay_laid_out(mesh, name, spec):
    args = given(lambda x: placed(x, mesh, SPECS[spec]))
    compiled = jax.jit(STEPS[name]).lower(jnp.int32(1), *args).compile()
    found = list(collectives(compiled.as_text()))
    assert {operation for operation, _ in found} <= {"all-reduce"}, found
    assert found
    # What is reduced are counts: a few candidates and the sums of a loss.
    assert all(elements <= 8 for _, elements in found), found
    for leaf in jax.tree.leaves(compiled(jnp.int32(1), *args)):
        if leaf.ndim == 2:
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[spec]), 2)


def test_masks_to_begin_with_and_rewound_weights_lie_as_the_weights(mesh):
    for spec in SPECS.values():
        params = placed(drawn(0), mesh, spec)
        mask = sparse_training.all_kept(params)
        scores = movement.init(params)
        rewound = sparse_training.rewind(params, drawn(1), mask)
        for leaf in jax.tree.leaves((mask, scores, rewound)):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        jax.tree.map(np.testing.assert_array_equal, rewound, drawn(1))
