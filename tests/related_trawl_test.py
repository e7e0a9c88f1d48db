"""TRAWL's decompositions against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.related import trawl

M, P, Q = 3, 7, 5
TWO_SHAPES = ("block_0/mlp/up/kernel", "block_0/mlp/down/kernel")


MLP = {f"block_0/mlp/{name}/kernel": name == "down" for name in ("up", "gate", "down")}


def low_rank(rank, seed=0):
    random = np.random.default_rng(seed)
    return np.einsum("mr,pr,qr->mpq", *(random.normal(size=(n, rank)) for n in (M, P, Q)))


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def test_a_tensor_of_the_rank_is_found_again():
    tensor = low_rank(2)
    found = trawl.cp(jnp.asarray(tensor), 2, steps=500, tolerance=0.0)
    assert relative(found.dense(), tensor) < 1e-4
    assert found.size == 2 * (M + P + Q)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_zeros_and_numbers_whose_squares_are_no_floats_are_decomposed(size):
    tensor = low_rank(2)
    found = np.asarray(trawl.cp(jnp.asarray(size * tensor), 2, steps=500, tolerance=0.0).dense())
    np.testing.assert_allclose(
        found, size * tensor, rtol=0, atol=1e-3 * size * np.abs(tensor).max()
    )


def test_integers_of_numpy_are_ranks():
    assert trawl.laser(jnp.ones((3, 4)), np.int32(2)).shape == (3, 4)
    assert trawl.cp(jnp.ones((3, 4, 5)), np.int64(2)).rows.shape == (4, 2)


def test_each_factor_is_the_least_squares_solution_for_the_others():
    tensor = np.random.default_rng(1).normal(size=(M, P, Q))
    a, b, c = (
        np.asarray(f, np.float64)
        for f in trawl.cp(jnp.asarray(tensor), 2, steps=400, tolerance=0.0)
    )
    # At a fixed point no factor can be improved alone.
    khatri = np.einsum("pr,qr->pqr", b, c).reshape(P * Q, -1)
    best, *_ = np.linalg.lstsq(khatri, tensor.reshape(M, -1).T, rcond=None)
    assert relative(a, best.T) < 1e-3


def test_more_rank_fits_no_worse_and_the_whole_rank_fits():
    tensor = np.random.default_rng(2).normal(size=(2, 4, 3))
    errors = [
        relative(trawl.cp(jnp.asarray(tensor), rank, steps=2000, tolerance=0.0).dense(), tensor)
        for rank in (1, 3, 6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-2


def test_a_slice_multiplies_without_being_made():
    found = trawl.cp(jnp.asarray(low_rank(3)), 2)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, P)), jnp.float32)
    for index, dense in enumerate(found.dense()):
        np.testing.assert_allclose(found.product(x, index), x @ dense, rtol=1e-5, atol=1e-5)


def unfolded(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def test_tucker_is_no_worse_than_the_truncated_hosvd_and_exact_at_full_rank():
    tensor = np.random.default_rng(4).normal(size=(M, P, Q))
    ranks = (2, 3, 2)
    bases = [np.linalg.svd(unfolded(tensor, i))[0][:, :r] for i, r in enumerate(ranks)]
    projectors = [basis @ basis.T for basis in bases]
    hosvd = np.einsum("ma,pb,qc,abc->mpq", *projectors, tensor)
    found = trawl.tucker(jnp.asarray(tensor), ranks)
    assert relative(found.dense(), tensor) <= relative(hosvd, tensor) + 1e-6
    for factor in (found.slices, found.rows, found.columns):
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-5)
    assert relative(trawl.tucker(jnp.asarray(tensor), (M, P, Q)).dense(), tensor) < 1e-5


def test_laser_is_the_truncated_svd():
    matrix = np.random.default_rng(5).normal(size=(P, Q))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(
        trawl.laser(jnp.asarray(matrix), 2), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5
    )


@pytest.fixture(scope="module")
def params():
    config = ModelConfig(layers=2, heads=2, width=8, context=4, gated=True, hidden=12)
    model = gpt.build(config, vocab_size=5)
    return model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def test_stacks_are_written_back_where_they_came_from(params):
    stacks = trawl.stacks_of(params, 2)
    assert list(stacks) == [
        "attention of layer 0",
        "mlp of layer 0",
        "attention of layer 1",
        "mlp of layer 1",
    ]
    assert {name: len(stack) for name, stack in stacks.items()}["mlp of layer 0"] == 3
    for stack in stacks.values():
        same = trawl.written(params, stack, trawl.stacked(params, stack))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, same))


def test_the_search_tries_each_on_the_parameters_as_they_came(params):
    stacks = {"mlp": trawl.stacks_of(params, 2)["mlp of layer 1"]}
    seen = []

    def loss(tried):
        seen.append(tried)
        return sum(
            jnp.abs(a - b).sum()
            for a, b in zip(jax.tree.leaves(tried), jax.tree.leaves(params), strict=True)
        )

    found = list(trawl.search(params, stacks, [1, 8], loss))
    assert [(one.method, one.rank) for one in found] == [
        (m, r) for m in ("cp", "tucker", "laser") for r in (1, 8)
    ]
    full = {one.method: one for one in found if one.rank == 8}
    assert full["laser"].error < 1e-5
    assert full["laser"].loss < 1e-2
    changed = [
        k
        for k in params
        if not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params[k], seen[0][k]))
    ]
    assert changed == ["block_1"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: trawl.cp(jnp.ones((3, 4, 5)), 0), "integer of at least 1"),
        (lambda p: trawl.cp(jnp.ones((3, 4, 5)), 13), "between 1 and 12"),
        (lambda p: trawl.cp(jnp.ones((3, 4)), 1), "of shape .m, p, q."),
        (lambda p: trawl.tucker(jnp.ones((3, 4, 5)), (4, 1, 1)), "axis 0 must be .* 1 and 3"),
        (lambda p: trawl.laser(jnp.ones((3, 4)), 4), "between 1 and 3"),
        (lambda p: trawl.stacked(p, {"block_0/mlp/up": False}), "is not a matrix"),
        (lambda p: trawl.stacked(p, dict.fromkeys(TWO_SHAPES, False)), "one shape"),
        (lambda p: trawl.stacked(p, {}), "at least one kernel"),
        (lambda p: trawl.cp(jnp.ones((3, 4, 5)).at[0, 0, 0].set(jnp.nan), 1), "NaN"),
        (lambda p: trawl.tucker(jnp.full((3, 4, 5), jnp.inf), (1, 1, 1)), "has NaN or inf"),
        (lambda p: trawl.laser(jnp.full((3, 4), jnp.nan), 1), "NaN"),
        (lambda p: trawl.cp(jnp.ones((0, 4, 5)), 1), "must have numbers"),
        (lambda p: trawl.cp(low_rank(1), 1).product(jnp.ones(P), M), "between 0 and 2, got 3"),
        (lambda p: trawl.cp(low_rank(1), 1).product(jnp.ones(P + 1), 0), "7 columns"),
        (lambda p: trawl.written(p, MLP, jnp.ones((2, 8, 12))), "shape .3, 8, 12., a slice"),
        (lambda p: trawl.written(p, MLP, jnp.ones((3, 8, 8))), "shape .3, 8, 12., a slice"),
        (lambda p: trawl.written(p, {"nowhere": False}, jnp.ones((1, 8, 8))), "is not a matrix"),
        (lambda p: trawl.stacks_of(p, 3), "layers must be between 1 and the 2"),
        (lambda p: trawl.search(p, {"mlp": MLP}, [1, 9], len), "between 1 and 8, got 9"),
        (lambda p: trawl.search(p, {"mlp": MLP}, [1], len, ["svd"]), "method must be one of cp"),
        (lambda p: trawl.search(p, {"mlp": MLP}, [], len), "to try, got 1, 0 and 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_decomposed_is_refused(params, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(params)
