"""NNX and Equinox modules, training states and Linen's variables are pruned as they are."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import swe_prune
from swe_prune import importance, masks, trajectory, tree
from swe_prune.errors import InputError


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(self.norm(self.up(x))))


def step(model, optimizer):
    x = jnp.sin(jnp.arange(32.0).reshape(4, 8))
    grads = nnx.grad(lambda model: ((model(x) - 1) ** 2).mean())(model)
    optimizer.update(model, grads)


def by_axes(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2)}, by_axes
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "masked decay": lambda: optax.adamw(
        1e-2, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
}
SOURCES = {
    "state": lambda model: nnx.state(model, nnx.Param),
    "module": lambda model: model,
    "pure dict": lambda model: nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    "as_pure": lambda model: nnx.as_pure(nnx.state(model, nnx.Param)),
}


def assert_held(model, optimizer, mask):
    assert int(masks.revived(nnx.state(model, nnx.Param), mask)) == 0
    kernels = {"up": model.up.kernel, "down": model.down.kernel}
    assert [int((kernel[...] == 0).sum()) for kernel in kernels.values()] == [32, 16]
    held = dict(tree.named_leaves(mask))
    moments = 0
    for name, leaf in tree.named_leaves(optimizer.opt_state):
        kept = tree.by_suffix(name, held)
        if kept is not None and jnp.shape(leaf) == kept.shape:
            assert not np.asarray(leaf)[~np.asarray(kept)].any(), name
            moments += 1
    assert moments >= 4


@pytest.mark.quick(7)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("source", [*SOURCES, "prune"])
def test_zeros_and_their_moments_stay_zero(name, source):
    jitted = source in ("state", "prune")
    model = Model()
    if source == "prune":
        pruned = swe_prune.prune(model, 0.5, verbose=False)
        model, mask = pruned.params, pruned.masks
    else:
        mask = masks.by_sparsity(importance.score("magnitude", SOURCES[source](model)), 0.5)
        nnx.update(model, masks.apply(nnx.state(model, nnx.Param), mask))
    optimizer = nnx.Optimizer(model, masks.keep(OPTIMIZERS[name](), mask), wrt=nnx.Param)
    take = nnx.jit(step) if jitted else step
    before = np.asarray(model.down.bias[...])
    for _ in range(2):
        take(model, optimizer)
    assert_held(model, optimizer, mask)
    assert (np.asarray(model.down.bias[...]) != before).any()


def test_an_nnx_module_is_pruned_to_a_new_one():
    model = Model()
    model.tied = model.up.kernel  # one variable under two names
    before = np.asarray(model.up.kernel[...])
    pruned = swe_prune.prune(model, 0.5, verbose=False)
    assert isinstance(pruned.params, Model)
    assert pruned.params is not model
    np.testing.assert_array_equal(model.up.kernel[...], before)
    assert pruned.params.tied is pruned.params.up.kernel
    assert (pruned.params.up.kernel[...] == 0).sum() == 32
    assert pruned.summary.sparsity == 0.5
    assert pruned.params(jnp.ones((2, 8))).shape == (2, 4)
    applied = masks.apply(Model(), swe_prune.prune(Model(), 0.5, verbose=False).masks)
    assert isinstance(applied, Model)
    assert (applied.down.kernel[...] == 0).sum() == 16


def test_an_nnx_optimizer_is_read_for_its_second_moment():
    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    nnx.jit(step)(model, optimizer)
    for state in (optimizer, optimizer.opt_state):
        pruned = swe_prune.prune(model, 0.5, opt_state=state, verbose=False)
        assert pruned.criterion == "magnitude_curvature"
    with pytest.raises(InputError, match="holds no weights"):
        swe_prune.prune(optimizer, 0.5)


@pytest.mark.slow
def test_an_equinox_module_is_pruned_to_one():
    model = eqx.nn.MLP(8, 4, 8, 1, key=jax.random.key(0))
    pruned = swe_prune.prune(model, 0.5, verbose=False)
    assert isinstance(pruned.params, eqx.nn.MLP)
    assert pruned.params(jnp.ones(8)).shape == (4,)
    params = eqx.filter(pruned.params, eqx.is_inexact_array)
    tx = masks.keep(optax.adam(1e-2), pruned.masks)
    state = tx.init(params)
    grads = eqx.filter_grad(lambda model: (model(jnp.ones(8)) ** 2).sum())(pruned.params)
    updates, state = tx.update(grads, state, params)
    new = eqx.apply_updates(pruned.params, updates)
    assert int(masks.revived(new, pruned.masks)) == 0
    assert int(masks.revived(state[0].nu, pruned.masks)) == 0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.BatchNorm(use_running_average=True)(x))


class OwnState(NamedTuple):
    step: int
    params: Any
    opt_state: Any


def variables():
    return Net().init(jax.random.key(0), jnp.ones((2, 8)))


@pytest.mark.parametrize("kind", ["flax", "own", "dict"])
def test_a_training_state_is_pruned_with_its_own_optimizer(kind):
    params, tx = variables()["params"], optax.adam(1e-2)
    _, opt_state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
    state: Any = OwnState(3, params, opt_state)
    if kind == "flax":
        state = TrainState(3, Net().apply, params, tx, opt_state)
    if kind == "dict":  # as a checkpoint restores it
        state = {"step": 3, "params": params, "opt_state": opt_state}
        pruned = swe_prune.prune(state, 0.5, verbose=False)
        assert pruned.criterion == "magnitude_curvature"
        assert pruned.params["opt_state"] is opt_state
        return
    pruned = swe_prune.prune(state, 0.5, verbose=False)
    assert type(pruned.params) is type(state)
    assert pruned.criterion == "magnitude_curvature"
    assert pruned.params.step == 3
    assert pruned.params.opt_state is opt_state
    assert (pruned.params.params["down"]["kernel"] == 0).sum() == 16
    assert (state.params["down"]["kernel"] == 0).sum() == 0
    masks.keep(tx, pruned.masks).init(pruned.params.params)
    fresh = tx.init(params)
    with pytest.raises(InputError, match="second moment of every prunable weight is 0"):
        swe_prune.prune(state._replace(opt_state=fresh) if kind == "own" else
                        state.replace(opt_state=fresh), 0.5)  # fmt: skip


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_of_linens_variables_the_weights_alone_are_pruned(wrap):
    given = variables()
    given["batch_stats"]["stacked"] = jnp.ones((3, 4))  # as of a scan over layers
    given = wrap(given)
    marks = dict(tree.named_leaves(tree.prunable(given)))
    assert [name for name, mark in marks.items() if mark] == ["params/down/kernel"]
    pruned = swe_prune.prune(given, 0.5, verbose=False)
    assert type(pruned.params) is type(given)
    assert pruned.summary.tensors.keys() == {"down/kernel"}
    assert jax.tree.structure(pruned.params) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, pruned.params["batch_stats"], given["batch_stats"])
    np.testing.assert_array_equal(
        masks.apply(given, pruned.masks)["params"]["down"]["kernel"],
        pruned.params["params"]["down"]["kernel"],
    )
    # Statistics and an optimizer's state are those of the weights.
    params, tx = given["params"], optax.adam(1e-2)
    stats = trajectory.update(trajectory.init(params), params)
    _, opt_state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
    both = swe_prune.prune(given, 0.5, stats=stats, opt_state=opt_state, verbose=False)
    assert both.criterion == "forecast_curvature"
