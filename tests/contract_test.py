"""What every criterion, rule and kind of pytree keeps to; a new registered name joins by itself."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swe_prune import importance, masks, trajectory, tree

MEASURES = tuple(trajectory.BUFFERS)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 8, name="embed")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(5, name="head")(nn.Dense(8, name="up")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module as Equinox makes them: a pytree with weights as fields, (out, in)."""

    weight: Any
    bias: Any
    nothing: Any
    activation: Any = dataclasses.field(metadata={"static": True}, default=jnp.tanh)


def matrix(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(8, 12)), jnp.float32)


TREES = {
    "linen": lambda: Linen().init(jax.random.key(0), jnp.zeros((1, 3), int)),
    "nnx": lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param),
    "lists": lambda: [{"w": matrix(0)}, [matrix(1), jnp.ones(3)], None],
    "tuples": lambda: (Pair(matrix(0), (matrix(1), jnp.ones(3))), jnp.arange(4)),
    "modules": lambda: [Module(matrix(0), jnp.ones(3), None), Module(matrix(1), None, None)],
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
RULES = {
    "tensor": lambda s: masks.by_sparsity(s, 0.37, "tensor"),
    "global": lambda s: masks.by_sparsity(s, 0.37, "global"),
    "row": lambda s: masks.by_sparsity(s, 0.37, "row"),
    "2:4": lambda s: masks.by_sparsity(s, 0.5, pattern="2:4"),
}


def made(kind, dtype):
    return jax.tree.map(
        lambda x: x.astype(DTYPES[dtype]) if tree.is_weight(x) else x, TREES[kind]()
    )


@jax.jit
def snapshot(stats, params, t):
    params = jax.tree.map(
        lambda x: x + (jnp.sin(x * 9 + t) * 0.3).astype(x.dtype) if tree.is_weight(x) else x, params
    )
    return params, trajectory.update(stats, params)


def tracked(params):
    stats = trajectory.init(params, MEASURES)
    for t in range(3):
        params, stats = snapshot(stats, params, t)
    return params, stats


@pytest.fixture(scope="module", params=[(k, d) for k in TREES for d in DTYPES], ids="-".join)
def trained(request):
    params = made(*request.param)
    return *tracked(params), tree.prunable(params)


def leaves(of):
    """Leaves by name, of which nnx drops those that are None."""
    return {name: leaf for name, leaf in tree.named_leaves(of) if leaf is not None}


def chosen(prunable):
    return {name for name, leaf in leaves(prunable).items() if leaf}


def assert_on_prunable_alone(of, params, prunable, dtype):
    assert set(leaves(of)) == chosen(prunable)
    for name, leaf in leaves(of).items():
        assert leaf.dtype == dtype, name
        assert leaf.shape == leaves(params)[name].shape, name


def test_statistics_are_float32_and_none_where_dense(trained):
    params, stats, prunable = trained
    assert chosen(prunable)
    for measure in MEASURES:
        assert_on_prunable_alone(trajectory.read(stats, measure), params, prunable, jnp.float32)


@pytest.mark.parametrize("name", importance.names())
def test_scores_are_float32_none_where_dense_and_the_same_in_jit(trained, name):
    params, stats, prunable = trained
    scores = importance.score(name, params, stats=stats)
    assert_on_prunable_alone(scores, params, prunable, jnp.float32)
    for leaf in leaves(scores).values():
        assert np.isfinite(leaf).all()
        assert (leaf >= 0).all()
    inside = jax.jit(lambda p, s: importance.score(name, p, stats=s))(params, stats)
    assert set(leaves(inside)) == set(leaves(scores))
    for path, leaf in leaves(inside).items():
        # rtol: fused or not, the same formula may differ in its last digit.
        np.testing.assert_allclose(leaf, leaves(scores)[path], rtol=1e-5, err_msg=path)


@pytest.fixture(scope="module")
def scored(trained):
    params, stats, _ = trained
    return {name: importance.score(name, params, stats=stats) for name in importance.names()}


# One program for all the criteria, whose scores are of one structure.
COMPILED = {rule: jax.jit(make) for rule, make in RULES.items()}


@pytest.mark.parametrize("rule", RULES)
def test_masks_keep_the_requested_count_in_and_outside_jit(trained, scored, rule):
    params, _, prunable = trained
    for scores in scored.values():
        outside, inside = RULES[rule](scores), COMPILED[rule](scores)
        assert_on_prunable_alone(outside, params, prunable, bool)
        counts = masks.summary(outside)
        assert counts.kept == expected_kept(leaves(scores), rule)
        for path, leaf in leaves(inside).items():
            np.testing.assert_array_equal(leaf, leaves(outside)[path], err_msg=path)


def expected_kept(scores, rule):
    """In numpy: n of m of every group; else what is left when the nearest share is removed."""
    if rule == "2:4":
        return sum(leaf.size for leaf in scores.values()) // 2
    if rule == "global":
        sizes = [(sum(leaf.size for leaf in scores.values()), 1)]
    elif rule == "tensor":
        sizes = [(leaf.size, 1) for leaf in scores.values()]
    else:
        inputs = [
            int(np.prod([leaf.shape[axis] for axis in tree.input_axes(name, leaf.shape)]))
            for name, leaf in scores.items()
        ]
        sizes = [(n, leaf.size // n) for n, leaf in zip(inputs, scores.values(), strict=True)]
    return sum(times * (n - int(n * 0.37 + 0.5)) for n, times in sizes)


def test_std_rule_gives_masks_for_every_criterion(trained, scored):
    params, _, prunable = trained
    for name, scores in scored.items():
        mask = masks.by_std(scores, 0.7, spread=importance.get(name).spread)
        assert_on_prunable_alone(mask, params, prunable, bool)
        assert masks.summary(mask).kept > 0


def test_applied_masks_keep_structure_and_dtypes(trained, scored):
    params, _, _ = trained
    mask = masks.by_sparsity(scored["magnitude"], 0.5)
    applied = masks.apply(params, mask)
    assert jax.tree.structure(applied) == jax.tree.structure(params)
    for name, leaf in leaves(applied).items():
        before = leaves(params)[name]
        assert leaf.dtype == before.dtype
        kept = leaves(mask).get(name, True)
        np.testing.assert_array_equal(leaf, jnp.where(kept, before, 0))


def test_an_optimizer_with_keep_trains_every_tree(trained, scored):
    params, _, _ = trained
    floats = jax.tree.map(lambda x: x if tree.is_weight(x) else None, params)
    mask = masks.by_sparsity(importance.score("magnitude", floats), 0.5)
    optimizer = masks.keep(optax.adam(1e-2), mask)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, state = step(floats, optimizer.init(floats))
    new, _ = step(new, state)
    for name, kept in leaves(mask).items():
        np.testing.assert_array_equal(leaves(new)[name] != 0, kept, err_msg=name)


def test_leaves_that_are_no_arrays_are_dense_everywhere():
    params = {"w": matrix(0), "f": jnp.tanh, "name": "linear", "n": 3, "none": None, "rate": 0.1}
    stats = trajectory.update(trajectory.init(params, MEASURES), params)
    for name in importance.names():
        mask = masks.by_sparsity(importance.score(name, params, stats=stats), 0.5)
        applied = masks.apply(params, mask)
        assert {key: applied[key] for key in params if key != "w"} == {
            key: params[key] for key in params if key != "w"
        }
        assert masks.summary(mask).tensors == {"w": masks.Tally(48, 96)}
