"""The core on eight devices: the same masks, no gathered weight, statistics laid out as weights."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from swe_prune import importance, masks, radix, select, trajectory
from swe_prune.errors import InputError

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
SPECS = {"inputs": P("x", None), "outputs": P(None, "y"), "both": P("x", "y"),
         "one axis over all": P(("x", "y"), None), "replicated": P()}  # fmt: skip
ROWS, COLUMNS = 32, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def weights(seed=0):
    """Few distinct values, so that ties are cut; a vector that stays dense."""
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(ROWS, COLUMNS)).round(1).astype(np.float32)},
        "b": {"kernel": rng.normal(size=(ROWS, COLUMNS)).astype(np.float32), "bias": np.ones(8)},
    }


def placed(params, mesh, spec):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if np.ndim(x) == 2 else P())), params
    )


MAKE = {
    "tensor": lambda s: masks.by_sparsity(s, 0.6, "tensor"),
    "global": lambda s: masks.by_sparsity(s, 0.6, "global"),
    "row": lambda s: masks.by_sparsity(s, 0.6, "row"),
    "2:4": lambda s: masks.by_sparsity(s, 0.5, pattern="2:4"),
    "std": lambda s: masks.by_std(s, 1.4),
}


@pytest.mark.quick(10)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rule", MAKE)
def test_mask_is_that_of_one_device(mesh, rule, spec):
    alone = importance.score("magnitude", weights())
    spread = importance.score("magnitude", placed(weights(), mesh, SPECS[spec]))
    expected, got = MAKE[rule](alone), MAKE[rule](spread)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    inside = jax.jit(MAKE[rule])(spread)
    jax.tree.map(np.testing.assert_array_equal, inside, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_masks_are_laid_out_as_the_scores(mesh, spec):
    scores = placed({"w": weights()["a"]["kernel"]}, mesh, SPECS[spec])
    for rule in ("tensor", "global", "std"):
        mask = MAKE[rule](scores)
        assert mask["w"].sharding.is_equivalent_to(scores["w"].sharding, 2), rule


@pytest.mark.quick(2)
@pytest.mark.parametrize("spec", SPECS)
def test_statistics_are_laid_out_as_the_weights(mesh, spec):
    params = placed(weights(), mesh, SPECS[spec])
    measures = tuple(trajectory.BUFFERS)
    stats = trajectory.init(params, measures, compensated=True)
    updated = jax.jit(trajectory.update)(stats, params)
    later = trajectory.init(params, measures, start=1, compensated=True)
    merged = jax.jit(trajectory.merge)(updated, later)
    for each in (stats, updated, merged, trajectory.update(stats, params)):
        for name, buffer in each.buffers.items():
            for tensor in "ab":
                buffered, weight = buffer[tensor]["kernel"], params[tensor]["kernel"]
                assert buffered.sharding.is_equivalent_to(weight.sharding, 2), name


@pytest.mark.quick(2)
@pytest.mark.parametrize("spec", SPECS)
def test_statistics_are_those_of_one_device(mesh, spec):
    step, measures = jax.jit(trajectory.update), tuple(trajectory.BUFFERS)
    alone = trajectory.init(weights(), measures)
    spread = trajectory.init(placed(weights(), mesh, SPECS[spec]), measures)
    for seed in range(4):
        alone = step(alone, weights(seed))
        spread = step(spread, placed(weights(seed), mesh, SPECS[spec]))
    for measure in measures:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            trajectory.read(spread, measure), trajectory.read(alone, measure),
        )  # fmt: skip


def collectives(text):
    """(operation, elements of its result) of every collective in a compiled text."""
    pattern = (
        r"= ([^=]*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\w*\("
    )
    for shapes, operation in re.findall(pattern, text.replace("-start", "")):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        yield operation, max(math.prod(map(int, filter(None, s.split(",")))) for s in sizes)


def compiled(f, *args, out=None):
    return jax.jit(f, out_shardings=out).lower(*args).compile().as_text()


PROGRAMS = {
    "top_k_mask": lambda x, k: select.top_k_mask(x, k),
    "top_k_mask by rows": lambda x, k: select.top_k_mask(x, k % 8, axes=(0,)),
    "top_k_masks": lambda x, k: select.top_k_masks([x, x + 1], k),
    "by_std": lambda x, k: masks.by_std({"w": jnp.abs(x)}, k / 100),
    "update": lambda x, k: trajectory.update(
        trajectory.init({"w": x}, tuple(trajectory.BUFFERS), compensated=True), {"w": x * k}
    ),
}


@pytest.mark.quick(10)
@pytest.mark.parametrize("spec", ["inputs", "outputs", "both", "one axis over all"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_weight_leaves_its_device(mesh, name, spec):
    sharding = NamedSharding(mesh, SPECS[spec])
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=sharding)
    k = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    found = list(collectives(compiled(PROGRAMS[name], x, k)))
    assert "all-gather" not in {operation for operation, _ in found}
    assert "all-to-all" not in {operation for operation, _ in found}
    # What is reduced are counts: a few candidates, for rows one of each for every column.
    most = 8 * COLUMNS if "rows" in name else 8
    assert all(elements <= most for _, elements in found), found


def test_the_check_sees_a_gather(mesh):
    x = jax.device_put(jnp.ones((ROWS, COLUMNS)), NamedSharding(mesh, P("x", "y")))
    gathered = compiled(lambda x: x + 1, x, out=NamedSharding(mesh, P()))
    assert ("all-gather", ROWS * COLUMNS) in list(collectives(gathered))
    assert "all-gather" in dict(collectives(compiled(jnp.sort, x.ravel())))
    turned = compiled(lambda x: x * 2, x, out=NamedSharding(mesh, P(("x", "y"), None)))
    assert {operation for operation, _ in collectives(turned)} & {"all-to-all", "all-gather",
                                                                  "collective-permute"}  # fmt: skip


def test_selection_reduces_its_candidates_together(mesh):
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32,
                             sharding=NamedSharding(mesh, P("x", "y")))  # fmt: skip
    text = compiled(PROGRAMS["top_k_mask"], x, jax.ShapeDtypeStruct((), jnp.int32))
    assert "all-reduce" in {operation for operation, _ in collectives(text)}


MIXED = (P("x", "y"), P(None, ("y", "x")), P(), P(("x", "y")), P("y", None))
MIXED_SHAPES = ((8, 6), (3, 16), (5, 7), (24,), (4, 3))


def mixed(mesh, dtype=np.float32, distinct=9):
    """Arrays in as many layouts, of few distinct values, on the devices and as numpy."""
    rng = np.random.default_rng(0)
    values = [
        (rng.integers(0, distinct, shape) - 4).astype(np.float32).astype(dtype)
        for shape in MIXED_SHAPES
    ]
    on = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(values, MIXED, strict=True)
    ]
    return on, [jnp.asarray(x) for x in values]


@pytest.mark.parametrize("ties", select.TIES)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_global_selection_over_shards_is_that_of_one_device(mesh, ties, dtype):
    spread, alone = mixed(mesh, dtype)
    total = sum(x.size for x in alone)
    assert radix.shards_of(spread) is not None
    for k in (0, 1, 7, 60, 100, total - 1, total):
        got = select.top_k_masks(spread, k, ties=ties)
        for a, b, x in zip(got, select.top_k_masks(alone, k, ties=ties), spread, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{k}")
            assert a.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("ties", select.TIES)
def test_selections_of_each_array_over_shards_are_those_of_one_device(mesh, ties):
    spread, alone = mixed(mesh)
    for share in (0.0, 0.3, 0.8, 1.0):
        ks = [round(share * x.size) for x in alone]
        got = select.top_k_mask_each(spread, ks, ties=ties)
        for a, x, k in zip(got, alone, ks, strict=True):
            np.testing.assert_array_equal(a, select.top_k_mask(x, k, ties=ties))


def test_a_smallest_share_of_each_array_takes_two_selections_over_shards(mesh, monkeypatch):
    spread, alone = mixed(mesh)
    least = [round(0.3 * x.size) for x in alone]
    k = round(0.5 * sum(x.size for x in alone))
    wanted = select.top_k_masks_of_each(alone, k, least)
    made, compiled = [], radix.compiled
    monkeypatch.setattr(radix, "compiled", lambda *a: made.append(a[1]) or compiled(*a))
    got = select.top_k_masks_of_each(spread, k, least)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert made == [(0, 1, 2, 3, 4), (0,) * 5]  # of five collectives at most, as counted below


def test_infinities_zeros_and_nan_over_shards(mesh):
    x = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3.0, -3.0], np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, P(("x", "y"))))
    for k in range(9):
        np.testing.assert_array_equal(select.top_k_mask(spread, k), select.top_k_mask(x, k))
    x[5] = np.nan
    broken = jax.device_put(x, NamedSharding(mesh, P(("x", "y"))))
    with pytest.raises(InputError, match="scores of 'b' have 1 NaN"):
        select.top_k_masks([spread, broken], 3, names=["a", "b"])


@pytest.mark.parametrize(
    ("groups", "most"), [((0,) * 5, 5), (tuple(range(5)), 5)], ids=["global", "each"]
)
def test_a_selection_takes_few_collectives_whatever_the_tree(mesh, groups, most):
    spread, _ = mixed(mesh)
    shards = radix.shards_of(spread)
    k = select.counting.Count(*(jnp.zeros(max(groups) + 1, jnp.uint32) for _ in range(2)))
    text = radix.compiled(shards, groups, "first").lower(spread, k).compile().as_text()
    found = list(collectives(text))
    assert {operation for operation, _ in found} == {"all-reduce"}
    assert len(found) <= most, found  # 3 digits, the ties, and their places, which are below 2^16
