"""Groups that are declared, on anyone's pytree, scores of units, and what is refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from swe_prune import structured
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.structured import Along, Group

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": np.arange(12.0, dtype=np.float32).reshape(2, 6), "bias": np.ones(6, "f4")},
    "down": {"kernel": np.arange(12.0, dtype=np.float32).reshape(6, 2)},
}
MLP = {"mlp": Group(6, {r"up/(kernel|bias)$": -1, r"down/kernel$": -2})}


def refused(sentence, call):
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def scores_of(params, reduce: Any = "l2", groups=None):
    return structured.unit_scores(groups or MLP, jax.tree.map(jnp.abs, params), reduce)


def normals(params):
    return jax.tree.map(lambda x: jax.random.normal(KEY, x.shape) if eqx.is_array(x) else x, params)


def test_scores_of_units_are_those_of_their_weights():
    up, bias, down = PARAMS["up"]["kernel"], PARAMS["up"]["bias"], PARAMS["down"]["kernel"]
    of_unit = np.concatenate([up.T, bias[:, None], down], axis=1).astype("float64")
    wanted = {
        "sum": of_unit.sum(1),
        "mean": of_unit.mean(1),
        "l2": np.sqrt((of_unit**2).sum(1)),
        "max": of_unit.max(1),
    }
    for reduce, values in wanted.items():
        np.testing.assert_allclose(scores_of(PARAMS, reduce)["mlp"], values, rtol=1e-6)
    # Squares of small scores do not vanish; what is zero already and what has no score adds 0.
    tiny = scores_of(jax.tree.map(lambda x: x * np.float32(1e-25), PARAMS))
    np.testing.assert_allclose(tiny["mlp"], wanted["l2"] * 1e-25, rtol=1e-5)
    some = {"up": {"kernel": np.where(up == 0, -np.inf, up), "bias": None}, "down": PARAMS["down"]}
    found = structured.unit_scores(MLP, some, "sum")["mlp"]
    np.testing.assert_allclose(found, wanted["sum"] - 1, rtol=1e-6)


def test_linen_and_nnx():
    class Net(nn.Module):
        hidden: int = 6

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="down")(nn.relu(nn.Dense(self.hidden, name="up")(x)))

    variables = normals(Net().init(KEY, jnp.ones((1, 4))))
    keep = {"mlp": [5, 0, 2]}
    small = structured.cut(variables, MLP, keep)
    mask = structured.unit_mask(variables, MLP, keep)
    assert mask["params"]["down"]["bias"] is None
    x = jax.random.normal(KEY, (3, 4))
    zeroed = jax.tree.map(lambda w, m: w if m is None else w * m, variables, mask)
    found: Any = Net(3).apply(small, x)
    np.testing.assert_allclose(found, np.asarray(Net().apply(zeroed, x)), rtol=1e-5)

    class Module(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(6, 2, rngs=nnx.Rngs(0))

    state = nnx.state(Module(), nnx.Param)
    pure = structured.cut(nnx.to_pure_dict(state), MLP, keep)
    boxed = structured.cut(state, MLP, keep)
    assert pure["up"]["kernel"].shape == boxed["up"]["kernel"][...].shape == (4, 3)


def test_equinox_with_numbered_layers():
    model = normals(eqx.nn.MLP(4, 4, 4, 3, key=KEY))
    first = {"hidden": Group(4, {r"layers/0/(weight|bias)$": 0, r"layers/1/weight$": 1})}
    small = structured.cut(model, first, {"hidden": [0, 3]})
    x = jax.random.normal(KEY, (4,))
    zeroed = jax.tree.map(
        lambda w, m: w if m is None else w * m, model,
        structured.unit_mask(model, first, {"hidden": [0, 3]}),
    )  # fmt: skip
    np.testing.assert_allclose(small(x), zeroed(x), rtol=1e-5)
    layers = {"layers": Group(4, {r"layers/([0-9]+)/": None})}
    fewer = structured.cut(model, layers, {"layers": [0, 2, 3]})
    assert isinstance(fewer.layers, tuple)
    assert [one.weight[0, 0] for one in fewer.layers] == [
        model.layers[at].weight[0, 0] for at in (0, 2, 3)
    ]
    scores = structured.unit_scores(layers, eqx.filter(model, eqx.is_array), "max")["layers"]
    assert scores.tolist() == [float(max(one.weight.max(), one.bias.max())) for one in model.layers]


def test_stacked_layers_choose_together_or_each_its_own():
    stacked = {"up": normals(jnp.ones((3, 2, 6))), "down": normals(jnp.ones((3, 6, 2)))}
    shared = {"mlp": Group(6, {"up": -1, "down": -2})}
    small = structured.cut(stacked, shared, {"mlp": [1, 4]})
    np.testing.assert_array_equal(small["down"], stacked["down"][:, [1, 4]])
    own = {"mlp": Group(6, {"up": Along(-1, copies=0), "down": Along(-2, copies=0)}, copies=3)}
    units = structured.unit_scores(own, jax.tree.map(jnp.abs, stacked))
    keep = structured.choose(own, units, sparsity=0.5)
    assert keep["mlp"].shape == (3, 3)
    small = structured.cut(stacked, own, keep)
    for layer in range(3):
        alone = {name: leaf[layer] for name, leaf in stacked.items()}
        one = structured.cut(alone, shared, {"mlp": keep["mlp"][layer]})
        jax.tree.map(np.testing.assert_array_equal, one, {k: v[layer] for k, v in small.items()})
        best = structured.unit_scores(shared, jax.tree.map(jnp.abs, alone))["mlp"]
        assert set(np.argsort(-best)[:3].tolist()) == set(keep["mlp"][layer].tolist())
    layers = {"layers": Group(3, {"": 0})}  # of a scan, whole layers are an axis
    np.testing.assert_array_equal(
        structured.cut(stacked, layers, {"layers": [2, 0]})["up"], stacked["up"][np.array([0, 2])]
    )


def test_numbered_layers_in_an_optimizer_state_with_ints_and_names():
    params = {f"h_{n}": {"w": jnp.full(2, float(n))} for n in range(12)} | {
        "gain": jnp.arange(12.0)
    }
    groups = {"layers": Group(12, {r"(?:^|/)h_([0-9]+)/": None, "gain$": 0})}
    keep = {"layers": [1, 10, 11]}
    small = structured.cut(params, groups, keep)
    assert {name: float(leaf["w"][0]) for name, leaf in small.items() if name != "gain"} == {
        "h_0": 1, "h_1": 10, "h_2": 11,
    }  # fmt: skip
    assert small["gain"].tolist() == [1, 10, 11]
    state = structured.cut(optax.adamw(1e-3).init(params), groups, keep)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adamw(1e-3).init(small))


def test_abstract_and_host_arrays_stay_what_they_are():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    small = structured.cut(shapes, MLP, {"mlp": [1]})
    assert small["down"]["kernel"] == jax.ShapeDtypeStruct((1, 2), jnp.bfloat16)
    assert isinstance(structured.cut(PARAMS, MLP, {"mlp": [1]})["up"]["kernel"], np.ndarray)


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (Group(5, {r"up/kernel$": -1}),
         r"does not fit 'up/kernel' of shape \(2, 6\): rule 'up/kernel\$' needs 5 .* which has 6"),
        (Group(6, {r"up/kernel$": -1, r"down/kernel$": 1}), r"'down/kernel' of shape \(6, 2\)"),
        (Group(3, {r"up/kernel$": Along(-1, width=3)}), r"needs 9 .*3 units of width 3"),
        (Group(6, {r"up/bias$": 1}), r"'up/bias' of shape \(6,\).* has axis 1"),
        (Group(6, {r"upp/kernel$": -1}), r"matches no weight.*'down/kernel'"),
        (Group(6, {r"up/(": -1}), "not a regular expression"),
        (Group(6, {r"up/kernel$": Along(-1, copies=0)}, copies=3), "needs 3 copies along axis 0"),
        (Group(6, {r"up/kernel$": Along(-1, copies=0)}), "which axis has the copies"),
        (Group(6, {}), "at least one rule"),
        (Group(0, {"up": -1}), "units of group 'g' must be an integer of at least 1, got 0"),
        (Group(2, {r"up/": None}), "must capture the number"),
        (Group(2, {r"(": None}), "not a regular expression"),
        (Group(6, {r"up/kernel$": "last"}), "must be an integer, got 'last'"),  # type: ignore
        (Group(2, {r"(up)/": None}), "must capture the number of a unit, got 'up'"),
    ],
)  # fmt: skip
def test_a_declaration_that_does_not_fit_names_the_tensor(group, sentence):
    unit = np.zeros((group.copies, 1), int) if group.copies else [0]
    refused(sentence, lambda: structured.cut(PARAMS, {"g": group}, {"g": unit}))


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ({"mlp": [6]}, "must be within 0 and 5, got 6"),
        ({"mlp": [-1, 2]}, "must be within 0 and 5, got -1"),
        ({"mlp": [1, 2, 1]}, "has unit 1 twice"),
        ({"mlp": np.zeros(0, int)}, "keeps nothing"),
        ({"mlp": np.ones(6, bool)}, r"got bool\[6\]; of a bool array take numpy.flatnonzero"),
        ({"mlp": [0.5]}, "must be integer indices"),
        ({"mlp": [[1], [2, 3]]}, "as many units in each copy"),
        ([1], r"keep must be a mapping .* got \[1\]"),
        ({"mlps": [1]}, "no group to cut at 'mlps'; did you mean 'mlp'"),
    ],
)
def test_indices_that_cannot_be_kept(keep, sentence):
    refused(sentence, lambda: structured.cut(PARAMS, MLP, keep))


def test_groups_that_clash_and_none_at_all():
    both = MLP | {"other": Group(6, {r"up/bias$": 0})}
    refused("both have axis 0 of 'up/bias'", lambda: structured.cut(
        PARAMS, both, {"mlp": [0], "other": [0]}))  # fmt: skip
    refused("at least one", lambda: structured.cut(PARAMS, {}, {}))
    refused("units must be one of neurons, heads", lambda: structured.groups(ModelConfig(), "head"))
    refused("config must be a ModelConfig, got {}", lambda: structured.groups({}))  # type: ignore
    refused("break the key-value grouping", lambda: structured.groups(ModelConfig(), "query_heads"))
    odd = ModelConfig(head_norm="projection", norm="layer")
    refused("layer norm over all heads", lambda: structured.groups(odd, "heads"))
    keep = {"block_0/heads": [0], "block_0/query_heads": [[0]]}
    refused("break the key-value", lambda: structured.cut_config(ModelConfig(), keep))


def test_scores_that_say_nothing():
    refused("has NaN|have NaN", lambda: structured.unit_scores(
        MLP, jax.tree.map(lambda x: x * np.nan, PARAMS)))  # fmt: skip
    refused("negative", lambda: structured.unit_scores(MLP, jax.tree.map(np.negative, PARAMS)))
    none = jax.tree.map(lambda _: None, PARAMS)
    refused("no weight of group 'mlp' has a score", lambda: structured.unit_scores(MLP, none))
    refused("reduce must be one of sum", lambda: scores_of(PARAMS, "l1"))


def test_optimizers_whose_moments_are_not_laid_out_like_the_weights():
    big = {"up": {"kernel": jnp.ones((128, 256)), "bias": jnp.ones(256)},
           "down": {"kernel": jnp.ones((256, 128))}}  # fmt: skip
    groups = {"mlp": Group(256, {r"up/(kernel|bias)$": -1, r"down/kernel$": -2})}
    keep = {"mlp": np.arange(100)}
    state = optax.adafactor(1e-3).init(big)
    refused("factored moment of 'up/kernel'", lambda: structured.cut(state, groups, keep))
    history = optax.scale_by_lbfgs(3).init(PARAMS)
    small = structured.cut(history, MLP, {"mlp": [0, 1]})
    again = optax.scale_by_lbfgs(3).init(structured.cut(PARAMS, MLP, {"mlp": [0, 1]}))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, again)
    front = {"mlp": Group(2, {r"up/kernel$": 0})}
    refused("count axis 0 .* from the end", lambda: structured.cut(history, front, {"mlp": [0]}))
