"""Pytrees are paired by the names of their leaves, whatever holds them."""

from collections import OrderedDict

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from swe_prune import importance, masks, sparse_training, trajectory, tree
from swe_prune.errors import InputError

W, B = jnp.arange(16.0).reshape(4, 4) - 7.5, jnp.ones(4)
PLAIN = {"layers": [{"kernel": W, "bias": B}, {"kernel": W[::-1], "bias": B}]}


class Stack(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def stack():
    model = Stack()
    for layer, one in zip(model.layers, PLAIN["layers"], strict=True):
        layer.kernel[...] = one["kernel"]
    return model


def boxed(values):
    return jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), values)


HELD = {
    "plain": lambda: PLAIN,
    "tuple": lambda: {"layers": tuple(PLAIN["layers"])},
    "FrozenDict": lambda: freeze(PLAIN),
    "OrderedDict": lambda: OrderedDict(PLAIN),
    "nn.Partitioned": lambda: boxed(PLAIN),
}
NNX = {
    "nnx.Module": stack,
    "nnx.State": lambda: nnx.state(stack(), nnx.Param),
    "nnx.as_pure": lambda: nnx.as_pure(nnx.state(stack(), nnx.Param)),
    "nnx.to_pure_dict": lambda: nnx.to_pure_dict(nnx.state(stack(), nnx.Param)),
}
PAIRS = [(group[a], group[b]) for group in (HELD, NNX) for a in group for b in group if a != b]
IDS = [f"{a} with {b}" for group in (HELD, NNX) for a in group for b in group if a != b]


@pytest.mark.parametrize(("held", "other"), PAIRS, ids=IDS)
def test_masks_and_statistics_fit_weights_in_other_containers(held, other):
    params, like = held(), other()
    mask = masks.by_sparsity(importance.score("magnitude", like), 0.5)
    got = masks.apply(params, mask)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert type(got) is type(params)
    for name, leaf in tree.named_leaves(got):
        if name.endswith("kernel"):
            expected = np.where(abs(W) > 4, W, 0)
            np.testing.assert_array_equal(leaf, expected[::-1] if "1" in name else expected)
    assert int(masks.revived(got, mask)) == 0
    stats = trajectory.update(trajectory.init(like), params)
    assert jax.tree.structure(stats.buffers) == jax.tree.structure(trajectory.init(like).buffers)
    scores = importance.score("swe", params, stats=stats)
    assert masks.summary(masks.by_sparsity(scores, 0.5)).kept == 16


def test_moments_are_held_in_other_containers():
    mask = masks.by_sparsity(importance.score("magnitude", PLAIN), 0.5)
    for hold in (freeze, boxed):
        params = hold(PLAIN)
        tx = masks.keep(optax.adam(0.1), mask)
        updates, state = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert int(masks.revived(state[0].mu, mask)) == 0
        assert int(masks.revived(optax.apply_updates(params, updates), mask)) == 0


def test_sparse_training_takes_other_containers():
    mask = masks.by_sparsity(importance.score("magnitude", PLAIN), 0.5)
    params = freeze(PLAIN)
    through = sparse_training.straight_through(params, mask)
    assert type(through) is type(params)
    new, grown, _ = sparse_training.rigl_update(params, mask, None, 0.5, freeze(PLAIN))
    assert type(new) is type(params)
    assert masks.summary(grown).kept == masks.summary(mask).kept


def test_an_equinox_module_takes_the_mask_of_its_arrays():
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    mask = masks.by_sparsity(importance.score("magnitude", eqx.filter(model, eqx.is_array)), 0.5)
    got = masks.apply(model, mask)
    assert got(jnp.ones(4)).shape == (4,)
    assert (got.layers[0].weight == 0).sum() == 8


@pytest.mark.parametrize(
    "params",
    [
        {"a/b": W, "a": {"b": W}},
        OrderedDict([("1", W), (1, W)]),
        {"a": [W], "b": {"1": W, 1: W}},
    ],
    ids=["slash", "number", "dict"],
)
def test_two_leaves_of_one_name_are_refused(params):
    with pytest.raises(InputError, match=r"two leaves are named 'a/b'|'1'"):
        importance.score("magnitude", params)
    with pytest.raises(InputError, match=r"two leaves are named 'a/b'|'1'"):
        list(tree.named_leaves(params))


def test_a_message_names_the_first_path_that_differs_and_is_short():
    params = {f"l{i:03d}": {"kernel": W} for i in range(200)}
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5)
    less = {name: leaf for name, leaf in params.items() if name not in ("l003", "l100")}
    long = {**params, "m" + "x" * 5000: {"kernel": W}}
    for other, first in ((less, "l003/kernel"), (long, "mxxx")):
        for call in (
            lambda other=other: masks.apply(other, mask),
            lambda other=other: masks.keep(optax.sgd(1.0), mask).init(other),
            lambda other=other: trajectory.update(trajectory.init(params), other),
            lambda other=other: tree.map_leaves(lambda *_: 0, params, other),
        ):
            with pytest.raises(InputError, match=first) as caught:
                call()
            assert len(str(caught.value)) <= 300


def test_the_level_of_a_collection_is_named():
    mask = masks.by_sparsity(importance.score("magnitude", PLAIN), 0.5)
    with pytest.raises(InputError, match="without the level 'params'"):
        masks.apply({"params": PLAIN}, mask)


SCORES = importance.score("magnitude", PLAIN)
FLOATS = jax.tree.map(lambda x: (x > 3).astype(jnp.float32), SCORES)


@pytest.mark.parametrize("wrong", [SCORES, FLOATS], ids=["scores", "0 and 1"])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: masks.apply(PLAIN, m),
        lambda m: masks.keep(optax.sgd(1.0), m),
        lambda m: masks.hold_moments(optax.adam(1.0).init(PLAIN), m),
        lambda m: masks.summary(m),
        lambda m: masks.revived(PLAIN, m),
        lambda m: sparse_training.straight_through(PLAIN, m),
        lambda m: jax.jit(masks.apply)(PLAIN, m),
    ],
)
def test_what_is_no_mask_is_refused(wrong, call):
    with pytest.raises(InputError, match="'layers/0/kernel' is of float32, not bool"):
        call(wrong)


def test_shapes_never_broadcast():
    params = {"up": {"kernel": W}}
    stats = trajectory.init(params)
    row = {"up": {"kernel": W[:1]}}
    with pytest.raises(InputError, match="'up/kernel' has shape"):
        trajectory.update(stats, row)
    with pytest.raises(InputError, match="'up/kernel' has shape"):
        trajectory.merge(stats, trajectory.init(row))
    with pytest.raises(InputError, match="'up/kernel'"):
        importance.score("swe", params, stats=trajectory.init(row))
    with pytest.raises(InputError, match="'up/kernel' must have the weight's shape"):
        masks.apply(params, {"up": {"kernel": jnp.ones((1, 4), bool)}})
