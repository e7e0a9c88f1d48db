"""Evidence that says nothing is refused or warned of, and zeros that are there are kept."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swe_prune
from swe_prune import blockwise, importance, masks, recipe, trajectory
from swe_prune.blockwise.sparsegpt import sparsegpt
from swe_prune.errors import InputError, UndecidedWarning

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"down": {"kernel": normal(12, 8)}, "up": {"kernel": normal(8, 12), "bias": jnp.zeros(12)}}
GRADS = jax.tree.map(jnp.cos, PARAMS)


def after(tx, steps=2):
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(GRADS, state, PARAMS)
    return state


FACTORED = optax.adafactor(1.0, min_dim_size_to_factor=2)


@pytest.mark.parametrize("tx", [optax.adam(1.0), optax.adamw(1.0), optax.rmsprop(1.0), FACTORED])
def test_a_second_moment_that_is_all_zero_is_refused(tx):
    state = tx.init(PARAMS)
    for call in (
        lambda: swe_prune.prune(PARAMS, opt_state=state, verbose=False),
        lambda: importance.score("magnitude_curvature", PARAMS, opt_state=state),
        lambda: recipe.prune(
            recipe.Recipe("magnitude_curvature", sparsity=0.5),
            PARAMS,
            recipe.Evidence(opt_state=state),
        ),
    ):
        with pytest.raises(InputError, match=r"second moment of every prunable weight is 0.*give"):
            call()


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "tx", [optax.adagrad(1.0), optax.yogi(1.0), optax.rmsprop(1.0, initial_scale=1.0)]
)
def test_a_second_moment_that_is_still_as_it_began_is_none(tx):
    pruned = swe_prune.prune(PARAMS, opt_state=tx.init(PARAMS), verbose=False)
    assert pruned.criterion == "magnitude"
    assert "still the same for every weight" in pruned.why
    with pytest.raises(InputError, match="still the same for every weight"):
        importance.score("magnitude_curvature", PARAMS, opt_state=tx.init(PARAMS))
    pruned = swe_prune.prune(PARAMS, opt_state=after(tx), verbose=False)
    assert pruned.criterion == "magnitude_curvature"


def test_statistics_without_a_snapshot_are_refused():
    stats = trajectory.init(PARAMS, ("late_mean", "votes"), window_start=3)
    for call in (
        lambda: swe_prune.prune(PARAMS, stats=stats, verbose=False),
        lambda: importance.score("swe", PARAMS, stats=stats),
        lambda: importance.score("votes", PARAMS, stats=stats),
    ):
        with pytest.raises(InputError, match=r"no snapshot yet.*trajectory\.update"):
            call()
    stats = trajectory.update(stats, PARAMS)
    with pytest.raises(InputError, match="late means start at snapshot 3"):
        importance.score("swe", PARAMS, stats=stats)
    assert importance.score("votes", PARAMS, stats=stats)["up"]["kernel"].max() > 0


@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_ties_that_decide_are_warned_of(scope):
    equal = {name: {"kernel": jnp.ones((6, 8))} for name in "ab"}
    with pytest.warns(UndecidedWarning, match="scores tie: .* decides 48 of the 48") as found:
        mask = masks.by_sparsity(equal, 0.5, scope)
    assert masks.summary(mask).pruned == 48
    if scope == "global":  # whole tensors go by index
        assert any("every weight of 'b/kernel' is removed" in str(one.message) for one in found)


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_equal_scores_are_warned_of_under_patterns(pattern):
    with pytest.warns(UndecidedWarning, match="scores tie"):
        masks.by_sparsity({"kernel": jnp.ones((8, 8))}, 0.5, pattern=pattern)


def test_scores_that_decide_bring_no_warning():
    few = jnp.arange(1000.0).at[500].set(499)  # one tie at the threshold, of 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scope in masks.SCOPES:
            masks.by_sparsity({"kernel": few.reshape(20, 50)}, 0.5, scope)
        jax.jit(lambda s: masks.by_sparsity(s, 0.5))({"w": jnp.ones(8)})
        masks.by_sparsity({"w": jnp.where(few < 500, -jnp.inf, few)}, 0.5)


def test_an_emptied_tensor_is_warned_of():
    params = {"new": {"kernel": jnp.zeros((4, 4))}, "up": {"kernel": normal(4, 4)}}
    with pytest.warns(UndecidedWarning, match="every weight of 'new/kernel' is removed"):
        swe_prune.prune(params, 0.5, verbose=False)
    with pytest.warns(UndecidedWarning, match="every weight of 'new/kernel' is removed"):
        masks.by_std(importance.score("magnitude", params), 1.0)


LABELS = {"down": {"kernel": "adam"}, "up": {"kernel": "other", "bias": "adam"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (optax.adam(1e-2), "is an optimizer itself"),
        ("adam", "is 'adam'"),
        (PARAMS, "is laid out like the weights"),
        (optax.adam(1e-2).init({"x": jnp.ones(2)}), "has moments of other weights, such as 'x'"),
    ],
    ids=["optimizer", "name", "weights", "of other weights"],
)
def test_what_is_no_state_of_an_optimizer_of_these_weights_is_refused(given, said):
    with pytest.raises(InputError, match=f"opt_state {said}.* give what its updates returned"):
        swe_prune.prune(PARAMS, 0.5, opt_state=given, verbose=False)


@pytest.mark.parametrize(
    ("tx", "missing"),
    [
        (optax.contrib.muon(1e-2), "an optimizer without a second moment of the prunable weights"),
        (optax.sm3(1e-2), "an optimizer without a second moment"),
        (optax.adabelief(1e-2), "an optimizer without a second moment"),
        (optax.contrib.sophia(1e-2), "an optimizer without a second moment"),
    ],
    ids=["muon", "sm3", "adabelief", "sophia"],
)
def test_an_optimizer_without_a_second_moment_of_kernels_falls_back(tx, missing):
    state = tx.init(PARAMS)
    if "sophia" not in str(type(state[0])).lower():
        state = after(tx)
    pruned = swe_prune.prune(PARAMS, 0.5, opt_state=state, verbose=False)
    assert pruned.criterion == "magnitude"
    assert missing in pruned.why


@pytest.mark.parametrize("other", [optax.sgd(0.1), optax.set_to_zero()], ids=["sgd", "frozen"])
def test_tensors_without_a_second_moment_rank_by_what_there_is(other):
    state = after(optax.multi_transform({"adam": optax.adam(0.1), "other": other}, LABELS))
    pruned = swe_prune.prune(PARAMS, 0.5, opt_state=state, verbose=False)
    assert (pruned.criterion, pruned.recipe.scope) == ("magnitude_curvature", "tensor")
    assert "no second moment of up/kernel" in pruned.why
    assert "rank by 'magnitude'" in pruned.why
    plain = masks.by_sparsity(importance.score("magnitude", PARAMS), 0.5)
    np.testing.assert_array_equal(pruned.masks["up"]["kernel"], plain["up"]["kernel"])
    only = {"down": PARAMS["down"]}
    curved = importance.score("magnitude_curvature", only, opt_state=state)
    np.testing.assert_array_equal(
        pruned.masks["down"]["kernel"], masks.by_sparsity(curved, 0.5)["down"]["kernel"]
    )
    everywhere = swe_prune.prune(PARAMS, 0.5, opt_state=state, scope="global", verbose=False)
    assert everywhere.criterion == "magnitude"
    assert "only scores of one kind" in everywhere.why


def test_a_tensor_that_never_had_a_gradient_falls_back():
    tx, frozen = optax.adam(0.1), {**GRADS, "up": jax.tree.map(jnp.zeros_like, GRADS["up"])}
    _, state = tx.update(frozen, tx.init(PARAMS), PARAMS)
    pruned = swe_prune.prune(PARAMS, 0.5, opt_state=state, verbose=False)
    assert "that of up/kernel is all 0" in pruned.why
    assert [one.pruned for one in pruned.summary.tensors.values()] == [48, 48]


HALF = masks.apply(PARAMS, masks.by_sparsity(importance.score("magnitude", PARAMS), 0.5))


def zeros(params):
    return {n: np.asarray(params[n]["kernel"] == 0) for n in ("down", "up")}


@pytest.mark.parametrize("criterion", ["magnitude", "random", "lamp"])
@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_zeros_that_are_there_go_first(criterion, scope):
    scores = importance.score(criterion, HALF)
    for sparsity in (0.0, 0.3, 0.5, 0.75):
        mask = masks.by_sparsity(scores, sparsity, scope)
        for name, gone in zeros(HALF).items():
            assert not np.asarray(mask[name]["kernel"])[gone].any()
        if scope != "row" or sparsity == 0:  # a row may hold more zeros than its share
            assert masks.summary(mask).pruned == 192 * max(sparsity, 0.5)


def test_zeros_stay_through_a_step_and_may_be_freed(capsys):
    pruned = swe_prune.prune(HALF, 0.3)
    told = capsys.readouterr().out
    assert "(50.0 %)" in told
    assert "Asked for 30.0 %; 96 were 0 already and stay so" in told
    tx = masks.keep(optax.adam(0.1), pruned.masks)
    updates, _ = tx.update(GRADS, tx.init(pruned.params), pruned.params)
    stepped = zeros(optax.apply_updates(pruned.params, updates))
    assert sum(gone.sum() for gone in stepped.values()) == 96
    freed = swe_prune.prune(HALF, 0.3, zeros="free")
    assert freed.summary.pruned == 58
    assert "50.0 % of the result are 0" in capsys.readouterr().out
    with pytest.raises(InputError, match="zeros must be one of keep, free, got 'drop'"):
        swe_prune.prune(HALF, 0.3, zeros="drop")


@pytest.mark.parametrize("allocation", ["global", "erk", "uniform", "std", "owl"])
def test_allocations_take_zeros_that_are_there(allocation):
    request = recipe.Recipe("magnitude", allocation=allocation, sparsity=0.75)
    _, mask = recipe.prune(request, HALF)
    assert masks.summary(mask).pruned == 144


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("block:2x2", 0.75), ("row", 0.5)])
def test_patterns_take_zeros_that_are_there(pattern, sparsity):
    mask = masks.by_sparsity(importance.score("magnitude", HALF), sparsity, pattern=pattern)
    for name, gone in zeros(HALF).items():
        assert not np.asarray(mask[name]["kernel"])[gone].any()
    # A unit with one zero is no worse for it: the units are those of the free scores.
    free = importance.score("magnitude", HALF, zeros="free")
    units = masks.by_sparsity(free, sparsity, pattern=pattern)
    for name, gone in zeros(HALF).items():
        expected = np.asarray(units[name]["kernel"]) & ~gone
        np.testing.assert_array_equal(mask[name]["kernel"], expected)


def test_the_std_rule_counts_zeros_as_zeros():
    mask = masks.by_std(importance.score("magnitude", HALF), 1.0)
    free = masks.by_std(importance.score("magnitude", HALF, zeros="free"), 1.0)
    jax.tree.map(np.testing.assert_array_equal, mask, free)


def test_a_score_of_minus_infinity_is_gone_and_a_criterion_has_none():
    mask = masks.by_sparsity({"w": jnp.array([-jnp.inf, 1.0, 2.0, -jnp.inf])}, 0.25)
    assert mask["w"].tolist() == [False, True, True, False]
    given = {"learned": {"w": jnp.array([[-jnp.inf, 1.0, 2.0, -3.0]])}}
    scores = importance.score("movement", {"w": jnp.ones((1, 4))}, measured=given)
    assert masks.by_sparsity(scores, 0.0)["w"].all()
    assert masks.by_sparsity(scores, 0.25)["w"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.3, None), (0.75, None), (None, "2:4")])
def test_sparsegpt_keeps_zeros_that_are_there(sparsity, pattern):
    weight = HALF["down"]["kernel"]
    x = RNG.normal(size=(64, 12))
    hessian = jnp.asarray(x.T @ x / 32, jnp.float32)
    solved, mask, report = sparsegpt(weight, hessian, sparsity, pattern, block=4)
    gone = np.asarray(weight == 0)
    assert not np.asarray(mask)[gone].any()
    assert not np.asarray(solved)[gone].any()
    assert report.removed == mask.size - int(mask.sum()) >= 48
    _, mask, _ = sparsegpt(weight, hessian, sparsity, pattern, block=4, zeros="free")
    assert sparsity != 0.3 or int(mask.sum()) > 48


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", ["wanda", "wanda_variant", "magnitude", "sparsegpt"])
def test_block_by_block_keeps_zeros_that_are_there(method):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(8, name="up")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = Block(name=f"block_{i}")(x)
            return x

    model, x = Model(), normal(16, 8)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    half = swe_prune.prune(variables["params"], 0.5, verbose=False).params
    kept, mask, _ = blockwise.prune_blocks(
        model, {"params": half}, [x], blocks=r"block_\d", sparsity=0.25, method=method
    )
    found = masks.summary(mask)
    assert found.sparsity >= 0.5
    for name in half:
        gone = np.asarray(half[name]["up"]["kernel"] == 0)
        assert not np.asarray(kept[name]["up"]["kernel"])[gone].any()
        assert not np.asarray(mask[name]["up"]["kernel"])[gone].any()
