"""`swe_prune.prune` with a layout that is traced, given or missing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swe_prune
from swe_prune import masks, trajectory
from swe_prune.errors import InputError

X = jax.random.normal(jax.random.key(0), (5, 8))


def test_equinox_is_pruned_along_its_inputs_and_the_output_is_reported():
    model = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(1))
    arguments = {"scope": "row", "verbose": False}
    with pytest.raises(InputError, match=r"layers/0/weight.*layout=swe_prune.layout"):
        swe_prune.prune(model, 0.5, **arguments)
    pruned = swe_prune.prune(model, 0.5, model=lambda m, x: jax.vmap(m)(x), batch=X, **arguments)
    assert isinstance(pruned.params, eqx.nn.MLP)
    kept = pruned.masks.layers[0].weight
    assert kept.shape == (16, 8)
    assert set(np.asarray(kept.sum(1)).tolist()) == {4}
    assert pruned.output == "layers/1/weight"
    assert "'layers/1/weight' gives the model's result" in str(pruned)


def test_an_nnx_module_with_stacked_layers_is_traced_by_itself():
    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(axis_size=3)
            def stacked(rngs):
                return nnx.Linear(8, 8, rngs=rngs)

            self.layers = stacked(rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return jnp.tanh(layer(x))

            return self.head(run(x, self.layers))

    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    state["layers"]["kernel"][...] *= jnp.array([0.1, 1.0, 10.0])[:, None, None]
    nnx.update(model, state)
    pruned = swe_prune.prune(model, 0.5, batch=X, verbose=False)
    assert isinstance(pruned.params, Model)
    zeros = pruned.params.layers.kernel[...] == 0
    assert zeros.sum((1, 2)).tolist() == [32, 32, 32]
    assert pruned.output is None


def test_a_model_without_a_batch_and_a_batch_without_a_model_are_refused():
    params = {"w": jnp.ones((8, 4))}
    with pytest.raises(InputError, match="give batch="):
        swe_prune.prune(params, 0.5, model=lambda p, x: x @ p["w"], verbose=False)
    with pytest.raises(InputError, match="give model="):
        swe_prune.prune(params, 0.5, batch=X, verbose=False)


@pytest.mark.parametrize("rule", ["tensor", "row"])
def test_a_layout_of_another_level_is_refused(rule):
    scores = {"layers": {"kernel": jnp.ones((2, 4, 4))}}
    layout = {"params": {"layers": {"kernel": swe_prune.Axes((1,), (2,), (0,))}}}
    with pytest.raises(InputError, match="both with or both without the level 'params'"):
        masks.by_sparsity(scores, 0.5, rule, layout=layout)
    with pytest.raises(InputError, match="both with or both without the level 'params'"):
        masks.by_sparsity({"params": scores}, 0.5, rule, layout=layout["params"])


def test_votes_take_a_threshold_for_each_copy():
    weight = (
        jax.random.normal(jax.random.key(2), (3, 8, 6)) * jnp.array([0.1, 1, 10])[:, None, None]
    )
    params = {"layers": {"kernel": weight}}
    layout = {"layers": {"kernel": swe_prune.Axes((1,), (2,), (0,))}}
    stats = trajectory.init(params, measures=("votes",))
    votes = trajectory.read(trajectory.update(stats, params, layout=layout), "votes")
    wide = np.abs(np.asarray(weight, np.float64))
    expected = wide > wide.std(axis=(1, 2), ddof=1, keepdims=True)
    np.testing.assert_array_equal(votes["layers"]["kernel"], expected)
    pooled = trajectory.read(trajectory.update(stats, params), "votes")["layers"]["kernel"]
    assert not pooled[0].any()
