"""Every criterion, allocation and pattern on eight devices: the masks of one, no weight moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_core_test import collectives

from swe_prune import allocation, importance, masks, trajectory, tree

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
SPECS = {"inputs": P(("x", "y"), None), "outputs": P(None, ("x", "y")), "both": P("x", "y")}
SHAPES = {"up": (32, 64), "down": (64, 32), "query": (32, 32)}
MEASURES = tuple(trajectory.BUFFERS)
RULES = {
    "tensor": lambda s: masks.by_sparsity(s, 0.6),
    "global": lambda s: masks.by_sparsity(s, 0.6, "global"),
    "row": lambda s: masks.by_sparsity(s, 0.6, "row"),
    "2:4": lambda s: masks.by_sparsity(s, 0.5, pattern="2:4"),
    "block": lambda s: masks.by_sparsity(s, 0.6, "global", pattern="block:4x4"),
    "output rows": lambda s: masks.by_sparsity(s, 0.6, pattern="row"),
    "input columns": lambda s: masks.by_sparsity(s, 0.6, pattern="column"),
    "neuron": lambda s: masks.by_sparsity(s, 0.6, pattern="neuron"),
    **{
        name: lambda s, name=name: masks.by_sparsity(s, allocation.allocate(name, 0.6, scores=s))
        for name in ("uniform", "erk")
    },
    "erk in rows": lambda s: masks.by_sparsity(s, allocation.erk(s, 0.6), "row"),
}
UNITS = ("block", "output rows", "input columns", "neuron")  # whose scores are sums


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def drawn(seed, positive=False):
    rng = np.random.default_rng(seed)
    values = {name: {"kernel": rng.normal(size=shape)} for name, shape in SHAPES.items()}
    return jax.tree.map(lambda x: np.float32(np.abs(x) if positive else x), values)


def everything(place):
    """Weights, statistics, Adam's state and what calibration gives, each placed."""
    params = place(drawn(0))
    stats = trajectory.init(params, MEASURES)
    for seed in range(3):
        stats = jax.jit(trajectory.update)(stats, place(drawn(seed)))
    adam = optax.adam(1e-3)
    _, opt_state = jax.jit(adam.update)(place(drawn(4)), adam.init(params), params)
    x = {n: np.random.default_rng(5).normal(size=(200, s[0])) for n, s in SHAPES.items()}
    measured = {
        "gradient": place(drawn(6)),
        "gradient_square": place(drawn(7, positive=True)),
        "learned": place(drawn(8)),
        "input_norm": {
            n: {"kernel": np.float32(np.linalg.norm(x[n], axis=0))[:, None]} for n in SHAPES
        },
        "hessian": {n: {"kernel": np.float32(x[n].T @ x[n] / 100)} for n in SHAPES},
    }
    return params, stats, opt_state, measured


def placed(mesh, spec):
    def place(values):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), values)

    return place


def score(name, params, stats, opt_state, measured):
    return importance.score(
        name,
        params,
        stats=stats,
        opt_state=opt_state,
        measured=measured,
        prunable=jax.tree.map(lambda _: True, params),
    )


@pytest.fixture(scope="module")
def alone():
    return everything(lambda values: jax.tree.map(jnp.asarray, values))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "both")) for name in SPECS],
)
def spread(request, mesh):
    return everything(placed(mesh, SPECS[request.param]))


@pytest.fixture(scope="module")
def expected_of(alone):
    """The scores of a criterion on one device, computed once for all the layouts."""
    return functools.cache(lambda name: jax.jit(lambda *given: score(name, *given))(*alone))


@pytest.fixture(scope="module")
def scored_alone(alone):
    return score("forecast_curvature", *alone)


@pytest.fixture(scope="module")
def scored(spread):
    return score("forecast_curvature", *spread)


# Scores that divide by a sum over the tensor may differ in their last digit between devices, as
# any sum of floats in another order does; their masks are then those of equal scores.
SUMS = {"swe_spread", "snip", "votes", "ria"}


@pytest.mark.quick(9)
@pytest.mark.parametrize("name", importance.names())
def test_every_criterion_scores_and_masks_as_on_one_device(expected_of, spread, name):
    compiled = jax.jit(lambda *given: score(name, *given)).lower(*spread).compile()
    expected, got = expected_of(name), compiled(*spread)
    for path, leaf in tree.named_leaves(expected):
        other = dict(tree.named_leaves(got))[path]
        if name in SUMS:
            np.testing.assert_allclose(other, leaf, rtol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(other, leaf, err_msg=path)
    one, many = masks.by_sparsity(expected, 0.6), masks.by_sparsity(got, 0.6)
    jax.tree.map(np.testing.assert_array_equal, many, one)
    if not importance.get(name).sorts:  # which is to say that it gathers
        found = list(collectives(compiled.as_text()))
        assert {operation for operation, _ in found} <= {"all-reduce"}, found
        assert all(elements <= 64 for _, elements in found), found


@pytest.mark.quick(9)
@pytest.mark.parametrize("rule", RULES)
def test_every_pattern_and_allocation_masks_as_on_one_device(scored_alone, scored, rule):
    one, many = scored_alone, scored
    if rule in UNITS:
        # Powers of two within a factor of 2^12 sum exactly in any order.
        one, many = (
            jax.tree.map(lambda x: jnp.exp2(jnp.clip(jnp.round(jnp.log2(x)), -6, 6)), scores)
            for scores in (one, many)
        )
    expected = RULES[rule](one)
    compiled = jax.jit(RULES[rule]).lower(many).compile()
    for got in (RULES[rule](many), compiled(many)):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert masks.summary(got) == masks.summary(expected)
    found = list(collectives(compiled.as_text()))
    largest = max((n for operation, n in found if operation != "all-reduce"), default=0)
    # The scores of blocks, rows, columns and neurons may move; those of weights may not.
    assert largest <= (256 if rule in UNITS or rule == "2:4" else 0), found
