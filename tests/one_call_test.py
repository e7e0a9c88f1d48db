import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import swe_prune
from swe_prune import importance, masks, trajectory
from swe_prune.errors import InputError

RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)},
    "up": {"kernel": jnp.asarray(RNG.normal(size=(8, 12)), jnp.float32), "bias": jnp.ones(12)},
    "down": {"kernel": jnp.asarray(RNG.normal(size=(12, 8)), jnp.bfloat16)},
}


@functools.cache
def trained(optimizer):
    @jax.jit
    def step(t, stats, state):
        params = jax.tree.map(lambda x: x * (1 + 0.2 * jnp.sin(t + 9 * x)), PARAMS)
        _, state = optimizer.update(params, state, params)
        return trajectory.update(stats, params), state

    stats, state = trajectory.init(PARAMS), optimizer.init(PARAMS)
    for t in range(3):
        stats, state = step(t, stats, state)
    return stats, state


ADAM, SGD = optax.adamw(1e-3), optax.sgd(1e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "tracked", "criterion", "scope", "why"),
    [
        (ADAM, True, "forecast_curvature", "global", "it has the late mean and the optimizer's"),
        (ADAM, False, "magnitude_curvature", "global", "but no late mean"),
        (SGD, True, "magnitude", "tensor", "an optimizer without a second moment"),
        (None, True, "magnitude", "tensor", "no optimizer state, and without curvature"),
        (None, False, "magnitude", "tensor", "no optimizer state, and without curvature"),
    ],
)
def test_it_takes_the_best_that_is_at_hand_and_says_so(
    optimizer, tracked, criterion, scope, why, capsys
):
    stats, state = trained(optimizer or SGD)
    given = {"stats": stats if tracked else None, "opt_state": state if optimizer else None}
    pruned = swe_prune.prune(PARAMS, 0.5, **given)
    expected = masks.by_sparsity(importance.score(criterion, PARAMS, **given), 0.5, scope)
    assert (pruned.criterion, pruned.summary.sparsity) == (criterion, 0.5)
    jax.tree.map(np.testing.assert_array_equal, pruned.masks, expected)
    jax.tree.map(np.testing.assert_array_equal, pruned.params, masks.apply(PARAMS, expected))
    assert pruned.params["down"]["kernel"].dtype == jnp.bfloat16
    told = capsys.readouterr().out
    assert told == f"{pruned}\n"
    assert f"Removed 96 of 192 prunable weights (50.0 %) by '{criterion}'" in told
    assert why in told
    assert "40 (embedding)" in told
    assert "12 (fewer than two axes)" in told
    assert "up/kernel" in told


def test_it_does_as_it_is_told(capsys):
    pruned = swe_prune.prune(PARAMS, 0.5, criterion="magnitude", pattern="2:4", verbose=False)
    assert not capsys.readouterr().out
    groups = np.asarray(pruned.masks["up"]["kernel"]).reshape(2, 4, 12)
    assert (groups.sum(1) == 2).all()
    assert "pattern '2:4'" in str(pruned)
    by_row = swe_prune.prune(PARAMS, 0.25, scope="row", verbose=False)
    assert (~np.asarray(by_row.masks["up"]["kernel"])).sum(0).tolist() == [2] * 12


def test_zeros_stay_through_fine_tuning():
    pruned = swe_prune.prune(PARAMS, 0.5, verbose=False)
    optimizer = masks.keep(ADAM, pruned.masks)
    state, params = optimizer.init(pruned.params), pruned.params
    updates, state = jax.jit(optimizer.update)(PARAMS, state, params)
    assert int(masks.revived(optax.apply_updates(params, updates), pruned.masks)) == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: swe_prune.prune(PARAMS, 1.5), "must be a number in"),
        (lambda: swe_prune.prune(PARAMS, criterion="magnitud"), "did you mean 'magnitude'"),
        (lambda: swe_prune.prune(PARAMS, criterion="wanda"), "needs 'input_norm'"),
        (lambda: swe_prune.prune({"bias": jnp.ones(3)}), "no weight is prunable"),
        (lambda: jax.jit(lambda p: swe_prune.prune(p).params)(PARAMS), "outside of jit"),
        (lambda: swe_prune.prune(jax.eval_shape(lambda: PARAMS)), "'down/kernel' is abstract"),
        (lambda: swe_prune.prune(nn.Dense(3)), "a Linen module holds no weights"),
        (lambda: swe_prune.prune((PARAMS, ADAM.init(PARAMS))), "optimizer's state at '1/0'"),
        (
            lambda: swe_prune.prune({"kernel": jnp.arange(4)}),
            r"kernel \(not a floating-point array",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def square(params, batch):
    return jnp.sum((batch @ params["up"]["kernel"] @ params["down"]["kernel"].astype(float)) ** 2)


GRADIENTS = {"loss": square, "batches": [np.ones((2, 8), np.float32)], "verbose": False}


def test_half_goes_unless_said_and_the_bound_of_a_tensor_is_above_that():
    pruned = swe_prune.prune(PARAMS, **GRADIENTS)
    assert (pruned.criterion, pruned.recipe.sparsity) == ("fisher", 0.5)
    assert pruned.recipe.max_sparsity == 0.75


def test_gradients_take_the_place_of_an_optimizer_that_knows_no_prunable_weight():
    biases = jax.tree.map(lambda leaf: leaf.ndim == 1, PARAMS)
    _, state = trained(optax.masked(ADAM, biases))
    pruned = swe_prune.prune(PARAMS, 0.5, opt_state=state, **GRADIENTS)
    assert pruned.criterion == "fisher"
    assert "without a second moment of the prunable weights" in pruned.why


def test_a_request_that_cannot_work_is_refused_before_anything_is_measured():
    def loss(params, batch):
        raise AssertionError("measured")

    for sparsity, said in (
        (1.5, r"^sparsity must be a number in"),
        ("x", "^sparsity must be a nu"),
    ):
        with pytest.raises(InputError, match=said):
            swe_prune.prune(PARAMS, sparsity, **GRADIENTS | {"loss": loss})
