"""Weights of size 0: nothing of them is removed, and no rule or criterion divides by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune import allocation, calibration, importance, masks, structured, trajectory, tree
from swe_prune.errors import InputError
from swe_prune.structured import Group, activations

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype(np.float32)
FULL = {
    "block_0": {"kernel": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)},
    "block_2": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)},
}
SHAPES = [(0, 6), (4, 0), (0, 0)]


def with_empty(shape):
    return {"block_1": {"kernel": jnp.zeros(shape)}} | FULL


def loss(params, _):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))


def given(params):
    scores = jax.tree.map(jnp.abs, params)
    return {"scores": scores, "curvature": scores, "params": params, "loss": loss, "batches": [X]}


OPTIONS = {"table": {"rules": {".*": 0.25}}, "owl": {"groups": "block"}}


@pytest.mark.quick(5)
@pytest.mark.parametrize("rule", allocation.names())
def test_a_rule_allocates_as_if_an_empty_weight_were_not_there(rule):
    options = OPTIONS.get(rule, {})
    want = allocation.allocate(rule, 0.5, **given(FULL), **options).removed
    for shape in SHAPES:
        found = allocation.allocate(rule, 0.5, **given(with_empty(shape)), **options).removed
        assert found["block_1/kernel"] == 0
        if rule != "progression":  # which is one of the places of the blocks
            assert {**found} == {**want, "block_1/kernel": 0}


def forward(params, x):
    first, into, last, out = (leaf for _, leaf in tree.named_leaves(params))
    return x @ first @ last + x @ into @ out


@pytest.mark.slow
def test_criteria_score_what_is_there_and_nothing_else():
    params = with_empty((4, 0)) | {"block_3": {"kernel": jnp.zeros((0, 4))}}
    measured = calibration.inputs(forward, params, [X], hessian=True)
    gradients = calibration.gradients(lambda p, x: (forward(p, x) ** 2).mean(), params, [X])
    stats = trajectory.init(params, tuple(trajectory.BUFFERS))
    for step in (1.0, 2.0, 3.0):
        stats = trajectory.update(stats, jax.tree.map(lambda leaf, s=step: s * leaf + 1, params))
    adam = optax.adam(0.1)
    _, moments = adam.update(jax.tree.map(jnp.ones_like, params), adam.init(params), params)
    evidence = {"learned": params, **gradients, **measured}
    for name in importance.names():
        scores = importance.score(name, params, stats=stats, opt_state=moments, measured=evidence)
        for leaf in jax.tree.leaves(scores):
            assert not bool(jnp.isnan(leaf).any()), name
        assert scores["block_3"]["kernel"].shape == (0, 4)
    for kind in ("moments", "samples"):
        assert getattr(calibration, kind)(forward, params, [X], leaves="kernel")


@pytest.mark.quick(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [None, "1:2", "row", "column", "block:2x2"])
def test_masks_of_an_empty_weight_are_empty(shape, pattern):
    scores = {"a": jnp.zeros(shape), "b": jnp.arange(24.0).reshape(4, 6)}
    conventional = {f"{name}/kernel": leaf for name, leaf in scores.items()}
    mask = masks.by_sparsity(tree.nested(conventional), 0.5, pattern=pattern)
    assert mask["a"]["kernel"].shape == shape
    assert int(mask["b"]["kernel"].sum()) == 12


def test_units_are_scored_by_the_weights_that_there_are():
    groups = {"mlp": Group(6, {r"up/kernel$": -1, r"down/kernel$": -2})}
    scores = {"up": {"kernel": jnp.zeros((0, 6))}, "down": {"kernel": jnp.full((6, 4), 2.0)}}
    found = [structured.unit_scores(groups, scores, how) for how in ("sum", "mean", "l2", "max")]
    assert [one["mlp"].tolist() for one in found] == [[x] * 6 for x in (8.0, 2.0, 4.0, 2.0)]
    nothing = {"up": {"kernel": jnp.zeros((0, 6))}, "down": {"kernel": jnp.zeros((6, 0))}}
    with pytest.raises(InputError, match="no weight of group 'mlp'"):
        structured.unit_scores(groups, nothing)
    with pytest.raises(InputError, match="no weight of group 'mlp'"):
        activations.activation_scores(groups, scores, "weight_norm")
