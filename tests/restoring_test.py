"""Restoring towards each target and by local reconstruction, and that it does not harm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import swe_prune
from swe_prune import blockwise, masks, tree
from swe_prune.blockwise import guard
from swe_prune.errors import InputError
from swe_prune.pretrained.request import recipe_of
from swe_prune.pretrained.settings import RequestSettings

BLOCKS = r"block_\d"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        def dense(n, name):
            return nn.Dense(n, use_bias=False, name=name)

        return x + dense(8, "down")(nn.silu(dense(16, "gate")(x)) * dense(16, "up")(x))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return x


RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8)).astype(np.float32)
X[:, 0] = 3  # as a norm's scale and a frequent token make it
BATCHES = [X[at : at + 8] for at in range(0, 64, 8)]


@functools.cache
def emptied_units():
    """A model whose units 0 to 7 are closed by their gates, and a mask that opens and empties them.

    That is what a ranking of all weights by curvature does to units that do not matter.
    """
    params = jax.tree.map(np.array, jax.jit(Model().init)(jax.random.key(0), X)["params"])
    mask = jax.tree.map(lambda kernel: np.ones(kernel.shape, bool), params)
    for name, block in params.items():
        block["gate"]["kernel"][0, :8] = -2
        block["up"]["kernel"][:2, :8] *= 0.1
        block["up"]["kernel"][2:, :8] *= 2
        mask[name]["gate"]["kernel"][0, :8] = False
        mask[name]["up"]["kernel"][2:, :8] = False
    return params, mask


@functools.cache
def plain():
    """The same model at random, and a random mask."""
    params = jax.tree.map(np.array, jax.jit(Model().init)(jax.random.key(1), X)["params"])
    rng = np.random.default_rng(2)
    return params, jax.tree.map(lambda kernel: rng.random(kernel.shape) < 0.5, params)


def drift(params, dense):
    """Squared distance of the model's outputs from those of the dense one."""
    apart = [Model().apply({"params": one}, X) for one in (params, dense)]
    return float(jnp.sum((apart[0] - apart[1]) ** 2))


def restored(given, restore="admm", **options):
    params, mask = given
    return blockwise.prune_blocks(
        Model(), {"params": params}, BATCHES, blocks=BLOCKS, mask=mask, restore=restore, **options
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("target", blockwise.TARGETS)
def test_emptied_units_that_restoring_blindly_revives_are_left_alone(target):
    params, mask = emptied_units()
    alone = drift(masks.apply(params, mask), params)
    blind, _, _ = restored((params, mask), target=target, holdout=())
    assert drift(blind, params) > 10 * alone
    guarded, kept, reports = restored((params, mask), target=target)
    assert drift(guarded, params) < 1.001 * alone
    jax.tree.map(np.testing.assert_array_equal, kept, mask)
    # Each kernel by itself came nearer to its target; what is judged is the block.
    given_up = {report.name: report.gave_up for report in reports if not report.restored}
    assert {"block_0/up/kernel", "block_1/up/kernel"} <= set(given_up)
    assert set(given_up.values()) <= {"kernel", "block"}
    for report in reports:
        before, everything, result = report.held_out
        assert result <= before < everything


def test_a_whole_that_is_worse_restored_goes_back_to_the_masks_alone(monkeypatch):
    given = plain()
    assert "model" not in {report.gave_up for report in restored(given)[2]}
    monkeypatch.setattr(guard, "judged", lambda apart, alone, new: guard.Verdict(new, {}, 0, 9, 9))
    guarded, _, reports = restored(given)
    assert {report.gave_up for report in reports} == {"model"}
    jax.tree.map(np.testing.assert_array_equal, guarded, masks.apply(*given))


def least_squares(x_NxR, wanted_NxC, weight, mask, damping=0.1):
    """The weights that stay, in float64, of ‖X W' − Y‖² + the ridge of `admm` towards W."""
    gram = x_NxR.T @ x_NxR
    scale = np.sqrt(np.diag(gram))
    ridge = damping * scale**2  # the mean of the scaled diagonal is 1
    solved = np.zeros_like(weight)
    for column, keep in enumerate(mask.T):
        # Over all weights, those that go at 0.
        left = gram + np.diag(ridge)
        right = x_NxR.T @ wanted_NxC[:, column] + ridge * weight[:, column]
        solved[keep, column] = np.linalg.solve(left[np.ix_(keep, keep)], right[keep])
    return solved


@pytest.mark.parametrize("target", blockwise.TARGETS)
def test_each_target_is_solved_for_as_it_says(target):
    params, mask = plain()
    found, _, _ = restored((params, mask), target=target, holdout=())
    # What goes into the second block of the dense model and of the result.
    inputs = [Block().apply({"params": one["block_0"]}, X) for one in (params, found)]
    x_d, x_p = (np.asarray(one, np.float64) for one in inputs)
    weight, kept = params["block_1"]["up"]["kernel"], mask["block_1"]["up"]["kernel"]
    x, wanted = {
        "pruned_inputs": (x_p, x_p @ weight),
        "dense_inputs": (x_d, x_d @ weight),
        "dense_outputs": (x_p, x_d @ weight),
    }[target]
    solved = least_squares(x, wanted, weight, kept)
    got = np.asarray(found["block_1"]["up"]["kernel"])
    # 20 iterations of ADMM come this near, and the targets are farther apart.
    start = np.linalg.norm(np.where(kept, weight, 0) - solved)
    assert np.linalg.norm(got - solved) < 0.1 * start


@pytest.mark.parametrize("restore", ["local", "admm+local"])
def test_a_block_is_trained_towards_the_dense_activations(restore):
    params, mask = plain()
    before = masks.apply(params, mask)
    if restore == "admm+local":
        before, _, _ = restored((params, mask), "admm", holdout=())
    pruned, kept, reports = restored((params, mask), restore, holdout=())
    outputs = [[Model().apply({"params": one}, X)] for one in (params, before, pruned)]
    apart = [guard.mean_apart([one], outputs[:1]) for one in outputs[1:]]
    assert apart[1] < 0.92 * apart[0]
    jax.tree.map(np.testing.assert_array_equal, kept, mask)
    for (_, leaf), (_, keep) in zip(
        tree.named_leaves(pruned), tree.named_leaves(mask), strict=True
    ):
        assert not np.asarray(leaf)[~keep].any()
        assert leaf.dtype == jnp.float32
    assert all(report.restored for report in reports)


@pytest.mark.slow
def test_one_call_takes_curvature_and_restores_with_what_it_is_given():
    params, _ = plain()

    def loss(params, batch):
        return jnp.mean(Model().apply({"params": params}, batch) ** 2)

    given = {"loss": loss, "batches": BATCHES, "verbose": False}
    alone = swe_prune.prune(params, 0.6, **given)
    assert (alone.criterion, alone.recipe.scope) == ("fisher", "global")
    assert alone.recipe.max_sparsity == 0.8
    assert "gradients of the loss" in alone.why
    both = swe_prune.prune(params, 0.6, model=Model(), blocks=BLOCKS, **given)
    assert both.criterion == "fisher+admm"
    jax.tree.map(np.testing.assert_array_equal, both.masks, alone.masks)
    outputs = [[Model().apply({"params": one}, X)] for one in (params, alone.params, both.params)]
    apart = [guard.mean_apart([one], outputs[:1]) for one in outputs[1:]]
    assert apart[1] < apart[0]
    with pytest.raises(InputError, match="restore='admm' runs the blocks of a Linen module"):
        swe_prune.prune(params, 0.6, restore="admm", **given)


def mean_square(params, batch):
    return jnp.mean(Model().apply({"params": params}, batch) ** 2)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"scope": "tensor", "options": {"power": 1.0}},
        {"scope": "global", "max_sparsity": 0.7, "seed": 1, "zeros": "free"},
        {"pattern": "row"},
        {"pattern": "block:2x2", "scope": "global"},
        {"criterion": "magnitude"},
        {"criterion": "fisher", "restore": "admm"},
    ],
    ids=str,
)
def test_one_call_and_the_command_choose_the_same_of_the_same_evidence(asked):
    params, _ = plain()
    texts = tuple(f"{name}={value}" for name, value in asked.get("options", {}).items())
    command = recipe_of(RequestSettings(sparsity=0.5, **asked | {"options": texts}))
    given = {key: value for key, value in asked.items() if key != "options"}
    given |= asked.get("options", {}) | {"loss": mean_square, "batches": BATCHES[:2]}
    call = swe_prune.prune(params, 0.5, model=Model(), blocks=BLOCKS, verbose=False, **given)
    assert call.recipe == command
    # What the best of what can be measured is.
    if "criterion" not in asked:
        assert (command.criterion, command.restore) == ("fisher", "admm")
