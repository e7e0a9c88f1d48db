"""Sparse training against numpy in float64, in loops of one's own, compiled once."""

import functools
from fractions import Fraction

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import allocation, importance, masks, schedules, sparse_training, tree
from swe_prune.errors import InputError
from swe_prune.sparse_training import movement, rigl_update
from swe_prune.sparse_training.drop_and_grow import exchanged

SHAPES = {"a": (12, 8), "b": (5, 3, 4), "dense": (6,)}


def drawn(seed, ties=False, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray((scale * rng.normal(size=shape)).round(1 if ties else 9), jnp.float32)
        for name, shape in SHAPES.items()
    }


def some_masks(seed, kept=0.4):
    rng = np.random.default_rng([seed, 7])
    return {
        n: None if n == "dense" else jnp.asarray(rng.random(s) < kept) for n, s in SHAPES.items()
    }


def summed(params):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------- drop and grow


def exchange_in_numpy(weight, mask, score, fraction, regrown):
    """METHODS §15.8 by stable sorts in float64: the masks after, and what keeps its value."""
    w, m, g = (np.asarray(x).ravel() for x in (weight, mask, score))
    w, g = w.astype(np.float64), g.astype(np.float64)
    n = min(int(np.floor(fraction * m.sum() * (1 + 2**-22))), m.sum())  # see `exchanged`
    by_magnitude = np.argsort(np.where(m, -np.abs(w), np.inf), kind="stable")
    stay = np.zeros(m.size, bool)
    stay[by_magnitude[: m.sum() - n]] = True
    new = stay.copy()
    new[np.argsort(np.where(stay, np.inf, -g), kind="stable")[:n]] = True
    held = stay if regrown == "reset" else new & m
    return new.reshape(mask.shape), held.reshape(mask.shape)


def assert_exchanged(got, expected, params, moments):
    (new_params, new_mask, state), (new, held) = got, expected
    for name in ("a", "b"):
        np.testing.assert_array_equal(new_mask[name], new[name])
        np.testing.assert_array_equal(new_params[name], np.where(held[name], params[name], 0))
        for moment, before in zip((state[0].mu, state[0].nu), moments, strict=True):
            np.testing.assert_array_equal(moment[name], np.where(held[name], before[name], 0))
    assert new_mask["dense"] is None
    np.testing.assert_array_equal(new_params["dense"], params["dense"])
    np.testing.assert_array_equal(state[0].mu["dense"], moments[0]["dense"])


@pytest.fixture(scope="module")
def exchanges():
    """The two rules, compiled with the fraction traced."""
    return {
        (rule, regrown): jax.jit(functools.partial(getattr(sparse_training, rule), regrown=regrown))
        for rule in ("drop_and_grow", "rigl", "set")
        for regrown in sparse_training.REGROWN
    }


@pytest.mark.quick(6)
@pytest.mark.parametrize("regrown", sparse_training.REGROWN)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_rigl_exchanges_what_numpy_does(exchanges, fraction, ties, regrown):
    mask = some_masks(3)
    params, grads = masks.apply(drawn(0, ties), mask), drawn(1, ties)
    moments = drawn(4), drawn(5)
    state = (optax.ScaleByAdamState(jnp.int32(9), *moments), optax.EmptyState())
    pairs = {
        n: exchange_in_numpy(params[n], mask[n], np.abs(grads[n]), fraction, regrown) for n in "ab"
    }
    expected = [{n: pair[i] for n, pair in pairs.items()} for i in (0, 1)]
    inside = exchanges["rigl", regrown](params, mask, state, fraction, grads)
    assert_exchanged(inside, expected, params, moments)
    assert exchanges["rigl", regrown]._cache_size() == 1  # one program for all fractions
    outside = sparse_training.rigl_update(params, mask, state, fraction, grads, regrown=regrown)
    assert_exchanged(outside, expected, params, moments)
    assert int(outside[2][0].count) == 9


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_set_drops_the_smallest_and_grows_at_random(exchanges, fraction):
    mask = some_masks(3)
    params = masks.apply(drawn(0), mask)
    grown = []
    for seed in range(20):
        key = jax.random.key(seed)
        new_params, new, _ = exchanges["set", "keep"](params, mask, None, fraction, key)
        eager = sparse_training.set_update(params, mask, None, fraction, key)
        jax.tree.map(np.testing.assert_array_equal, new, eager[1])
        for name in "ab":
            stay, _ = exchange_in_numpy(params[name], mask[name], -np.ones(mask[name].shape), 0, "")
            n = int(np.floor(fraction * stay.sum()))
            order = np.argsort(np.abs(np.asarray(params[name]))[stay])
            smallest = np.flatnonzero(stay)[order[:n]]
            left = stay.ravel().copy()
            left[smallest] = False
            assert (np.asarray(new[name]).ravel() | ~left).all()  # what was kept is kept
            assert new[name].sum() == mask[name].sum()
        grown.append(np.asarray(new["a"] & ~mask["a"]))
        fresh = np.asarray(new["a"] & ~mask["a"])
        assert (np.asarray(new_params["a"])[fresh] == 0).all()
    # Every candidate has its turn, and no two updates are alike.
    assert np.any(grown, axis=0).sum() > 0.8 * (~np.asarray(mask["a"])).sum()
    assert len({g.tobytes() for g in grown}) == 20


def test_set_draws_for_every_tensor_from_its_own_stream():
    params = {n: jnp.ones((8, 8)) for n in "ab"}
    mask = {n: jnp.arange(64).reshape(8, 8) < 20 for n in "ab"}
    _, new, _ = sparse_training.set_update(params, mask, None, 0.5, jax.random.key(0))
    assert (new["a"] != new["b"]).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), fraction=st.floats(0, 1, width=32), kept=st.floats(0, 1),
    ties=st.booleans(), regrown=st.sampled_from(sparse_training.REGROWN),
)  # fmt: skip
def test_counts_are_exact_and_stay(exchanges, seed, fraction, kept, ties, regrown):
    mask = some_masks(seed, kept)
    params, scores = masks.apply(drawn(seed, ties), mask), drawn(seed + 1, ties)
    after, new, _ = exchanges["drop_and_grow", regrown](params, mask, None, fraction, scores)
    for name in "ab":
        active = int(mask[name].sum())
        expected, held = exchange_in_numpy(
            params[name], mask[name], scores[name], fraction, regrown
        )
        assert int(new[name].sum()) == active
        np.testing.assert_array_equal(new[name], expected)
        np.testing.assert_array_equal(after[name], np.where(held, params[name], 0))
    assert int(masks.revived(after, new)) == 0


def test_growth_scores_that_are_infinite_or_not_numbers_cost_no_count(exchanges):
    mask = some_masks(3)
    params = masks.apply(drawn(0), mask)
    for odd in (-jnp.inf, jnp.nan, jnp.inf):
        scores = {n: jnp.full(s, odd) for n, s in SHAPES.items()}
        _, new, _ = exchanges["drop_and_grow", "keep"](params, mask, None, 0.5, scores)
        assert masks.summary(new).kept == masks.summary(mask).kept
    lost = {n: x.at[0].set(jnp.nan) for n, x in params.items()}
    _, new, _ = exchanges["drop_and_grow", "keep"](lost, mask, None, 0.5, drawn(1))
    assert masks.summary(new).kept == masks.summary(mask).kept


def test_dropped_and_grown_again_keeps_its_value_or_not(exchanges):
    params, mask = {"w": jnp.array([1.0, 2.0, 0.0])}, {"w": jnp.array([True, True, False])}
    scores, state = {"w": jnp.array([9.0, 0.0, 0.0])}, optax.TraceState({"w": jnp.ones(3)})
    kept = exchanges["drop_and_grow", "keep"](params, mask, state, 0.5, scores)
    reset = exchanges["drop_and_grow", "reset"](params, mask, state, 0.5, scores)
    assert kept[1]["w"].tolist() == reset[1]["w"].tolist() == [True, True, False]
    assert (kept[0]["w"].tolist(), kept[2].trace["w"].tolist()) == ([1, 2, 0], [1, 1, 0])
    assert (reset[0]["w"].tolist(), reset[2].trace["w"].tolist()) == ([0, 2, 0], [0, 1, 0])


def test_ties_drop_the_last_and_grow_the_first():
    params, mask = {"w": jnp.ones(6)}, {"w": jnp.array([True, False, True, True, False, True])}
    _, new, _ = sparse_training.drop_and_grow(params, mask, None, 0.25, {"w": jnp.zeros(6)})
    assert new["w"].tolist() == [True, True, True, True, False, False]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
@settings(deadline=None, max_examples=200)
def test_the_number_to_exchange_is_exact(active, fraction):
    n = int(jax.jit(exchanged)(jnp.uint32(active), fraction))
    product = Fraction(fraction) * active
    m = int(product) + 1
    if active < 2**22 and m <= active and m <= product * (1 + Fraction(1, 2**21)):
        assert n in (m - 1, m)  # at the edge of what is rounded off either may come
    else:
        assert n in (m - 1, int(product - Fraction(active, 2**48)))  # digits that are cut off


def test_a_fraction_that_a_float32_cannot_hold_stands_for_itself():
    number = jax.jit(jax.vmap(exchanged, (None, 0)))
    for active in (10, 20, 100, 1_000, 12_345, 1_000_000):
        wanted = np.linspace(0, active, 50).astype(int)
        n = number(jnp.uint32(active), jnp.asarray(wanted / active, jnp.float32))
        np.testing.assert_array_equal(n, wanted)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), 2),
    "multi_transform": lambda: optax.multi_transform(
        {"one": optax.adam(1e-2), "other": optax.sgd(1e-2, 0.9)},
        {"a": "one", "b": "other", "dense": "one"},
    ),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"a": True, "b": True, "dense": False}),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.trace(0.9), optax.ema(0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_what_is_grown_are_zero_in_any_chain(name):
    mask, optimizer = some_masks(3), OPTIMIZERS[name]()
    params = masks.apply(drawn(0), mask)
    state = jax.jit(optimizer.init)(params)
    state = jax.tree.map(lambda x: x + np.ones_like(x), state)
    _, new, after = sparse_training.rigl_update(params, mask, state, 0.5, drawn(1), regrown="reset")
    held = {
        n: exchange_in_numpy(params[n], mask[n], np.abs(drawn(1)[n]), 0.5, "reset")[1] for n in "ab"
    }
    assert int((new["a"] & ~mask["a"]).sum()) > 5
    seen = 0
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        belongs = next((n for n in "ab" if before.shape == SHAPES[n]), None)
        if belongs is None:  # a count, a factored statistic, a dense tensor's
            np.testing.assert_array_equal(before, now)
            continue
        seen += 1
        np.testing.assert_array_equal(now, np.where(held[belongs], before, 0))
        assert (np.asarray(now)[np.asarray(new[belongs] & ~mask[belongs])] == 0).all()
    assert seen >= 2


def test_the_short_names_are_the_same_functions():
    assert sparse_training.rigl is sparse_training.rigl_update
    assert sparse_training.set is sparse_training.set_update


def test_moments_are_found_by_the_longest_path():
    shape = (4, 4)
    params = {"a": jnp.ones(shape), "in": {"a": jnp.ones(shape), "b": jnp.ones(shape)}}
    mask = {"a": jnp.eye(4, dtype=bool), "in": {"a": None, "b": jnp.ones(shape, bool)}}
    state = jax.tree.map(jnp.ones_like, optax.sgd(1.0, momentum=0.9).init(params))
    _, _, after = sparse_training.rigl_update(params, mask, state, 0.0, params)
    trace = after[0].trace
    np.testing.assert_array_equal(trace["a"], np.eye(4))
    assert (trace["in"]["a"] == 1).all()
    assert (trace["in"]["b"] == 1).all()
    bare = sparse_training.rigl_update(params["a"], mask["a"], optax.TraceState(jnp.ones(shape)),
                                0.0, params["a"])  # fmt: skip
    np.testing.assert_array_equal(bare[2].trace, np.eye(4))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.tanh(nn.Dense(8, name="up")(x)))


def equinox_layer():
    return eqx.filter(eqx.nn.Linear(6, 8, key=jax.random.key(0)), eqx.is_inexact_array)


TREES = {
    "linen": lambda: jax.jit(Linen().init)(jax.random.key(0), jnp.zeros((1, 6))),
    "nnx": jax.jit(lambda: nnx.state(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Param)),
    "equinox": equinox_layer,
    "tuples": lambda: (jnp.ones((3, 4)), [jnp.linspace(-1, 1, 12).reshape(3, 4), None]),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("linen", "float32"), ("nnx", "bfloat16"), ("equinox", "float32"), ("tuples", "bfloat16")],
)
def test_every_tree_and_width_goes_through_every_function(kind, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), TREES[kind]())
    state = jax.jit(optax.adam(1e-2).init)(params)
    mask = sparse_training.all_kept(params)
    prune = sparse_training.prune_on_schedule(schedules.OneShot(0.5, at=1), "magnitude")

    @jax.jit
    def step(t, params, mask, state):
        mask = prune(t, mask, params)
        grads = jax.grad(lambda p: summed(sparse_training.straight_through(p, mask)))(params)
        params, mask, state = sparse_training.rigl_update(params, mask, state, 0.25, grads)
        after = sparse_training.rewind(params, params, mask)
        return after, mask, state, masks.revived(after, mask)

    assert masks.summary(step(0, params, mask, state)[1]).pruned == 0
    after, mask, new_state, revived = step(1, params, mask, state)
    assert masks.summary(mask).kept == masks.summary(mask).total // 2
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for before, now in zip(jax.tree.leaves((params, state)), jax.tree.leaves((after, new_state)),
                           strict=True):  # fmt: skip
        assert before.dtype == now.dtype
    assert int(revived) == 0

    @jax.jit
    def move(params):
        scores = movement.init(params)
        return movement.forward(params, scores, movement.hard_masks(scores, 0.5))

    moved = move(params)
    assert jax.tree.structure(moved) == jax.tree.structure(params)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ["adam", "sgd", "adafactor", "lion", "MultiSteps", "chain"])
def test_no_zero_comes_back_while_rigl_trains(name):
    optimizer, mask = OPTIMIZERS[name](), some_masks(3)
    noise = {x.shape: x for x in drawn(8).values()}
    every = schedules.Constant(0.6, every=3, begin=3, end=9)

    @jax.jit
    def step(t, params, mask, state):
        grads = jax.tree.map(lambda x: jnp.cos(9 * x + (t + 3) * noise[x.shape]), params)
        fraction = schedules.cosine_drop_fraction(t, 0.5, 12)
        params, mask, state = jax.lax.cond(
            every.is_due(t),
            lambda *given: sparse_training.rigl_update(*given, fraction, grads),
            lambda *given: given,
            params, mask, state,
        )  # fmt: skip
        held = masks.keep(optimizer, mask)
        updates, state = held.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, mask, state, masks.revived(params, mask)

    del mask["b"]
    params = masks.apply({"a": drawn(0)["a"], "dense": drawn(0)["dense"]}, mask)
    state, counts, changes = optimizer.init(params), masks.summary(mask), []
    for t in range(12):
        before = mask
        params, mask, state, revived = step(jnp.int32(t), params, mask, state)
        assert int(revived) == 0
        now = masks.summary(mask)
        assert {n: tally.kept for n, tally in now.tensors.items()} == {
            n: tally.kept for n, tally in counts.tensors.items()
        }
        if (before["a"] != mask["a"]).any():
            changes.append(t)
    assert changes == [3, 6, 9]
    assert step._cache_size() == 1


# ---------------------------------------------------------------- straight through


def test_straight_through_is_sparse_forward_and_dense_backward():
    params, mask, target = drawn(0), some_masks(3), drawn(1)

    def loss(p):
        seen = sparse_training.straight_through(p, mask)
        return sum(jnp.sum((seen[n] - target[n]) ** 2) for n in seen)

    seen = sparse_training.straight_through(params, mask)
    grads = jax.jit(jax.grad(loss))(params)
    for name in SHAPES:
        kept = True if mask[name] is None else np.asarray(mask[name])
        sparse = np.where(kept, np.asarray(params[name], np.float64), 0)
        np.testing.assert_array_equal(seen[name], sparse)
        expected = 2 * (sparse - np.asarray(target[name], np.float64))
        np.testing.assert_allclose(grads[name], expected, rtol=1e-5, atol=1e-7)
    # Forward mode too: the Hessian is 2 in every direction.
    _, turned = jax.jvp(jax.grad(loss), (params,), (target,))
    jax.tree.map(lambda h, v: np.testing.assert_allclose(h, 2 * v, rtol=1e-6), turned, target)


def test_straight_through_has_exact_zeros_whatever_the_weight():
    weights = {"w": jnp.array([jnp.inf, jnp.nan, -1.0, 1e-45, 5.0])}
    mask = {"w": jnp.array([False, False, False, False, True])}
    for masked in (sparse_training.straight_through, jax.jit(sparse_training.straight_through)):
        seen = masked(weights, mask)["w"]
        np.testing.assert_array_equal(seen, [0, 0, 0, 0, 5])
        assert not np.signbit(seen).any()
    grad = jax.grad(lambda p: sparse_training.straight_through(p, mask)["w"].sum())(weights)["w"]
    np.testing.assert_array_equal(grad, np.ones(5))


def test_ste_magnitude_prunes_anew_and_lets_weights_return():
    prunable = {"a": True, "b": True, "dense": False}
    seen = jax.jit(lambda p, s: sparse_training.ste_magnitude(p, prunable, s))
    schedule = schedules.Cubic(0.8, begin=0, end=10, every=1)
    params = drawn(0, ties=True)
    for t in range(11):
        sparse = seen(params, schedule.sparsity(jnp.int32(t)))
        for name in "ab":
            flat = np.abs(np.asarray(params[name], np.float64)).ravel()
            gone = allocation.removed_count(flat.size, float(schedule.sparsity(jnp.int32(t))))
            kept = np.zeros(flat.size, bool)
            kept[np.argsort(-flat, kind="stable")[: flat.size - gone]] = True
            expected = np.where(kept, np.asarray(params[name]).ravel(), 0)
            np.testing.assert_array_equal(np.ravel(sparse[name]), expected)
        np.testing.assert_array_equal(sparse["dense"], params["dense"])
    assert seen._cache_size() == 1

    @jax.jit
    def descend(w):
        grad = jax.grad(lambda w: jnp.sum((sparse_training.ste_magnitude(w, None, 0.5) - 3) ** 2))
        return w - 0.1 * grad(w)

    w = jnp.array([[1.0, 0.1]])  # the pruned one learns, overtakes, and is seen
    assert sparse_training.ste_magnitude(descend(w), None, 0.5).tolist() != [[0.0, 0.0]]
    trained = descend(descend(w))
    assert (np.asarray(trained) > np.asarray(w)).all()


# ---------------------------------------------------------------- movement


def test_movement_scores_learn_straight_through_and_weights_behind_the_mask():
    params, mask, target = drawn(0), some_masks(3), drawn(1)
    scores = {n: None if n == "dense" else jnp.zeros(s) for n, s in SHAPES.items()}

    def loss(p, s):
        seen = movement.forward(p, s, mask)
        return sum(jnp.sum(seen[n] * target[n]) for n in seen)  # so ∂L/∂W' is the target

    seen = movement.forward(params, scores, mask)
    of_weights, of_scores = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, scores)
    for name in "ab":
        w, g, m = (np.asarray(x[name], np.float64) for x in (params, target, mask))
        np.testing.assert_array_equal(seen[name], np.where(m, w, 0))
        np.testing.assert_allclose(of_scores[name], g * w, rtol=1e-5)
        np.testing.assert_allclose(of_weights[name], g * m, rtol=1e-5)
    np.testing.assert_array_equal(seen["dense"], params["dense"])
    np.testing.assert_allclose(of_weights["dense"], target["dense"], rtol=1e-5)
    assert of_scores["dense"] is None


def test_movement_learns_the_sum_of_gradient_times_weight_and_prunes_by_it():
    target = drawn(1)
    prunable = {"a": True, "b": True, "dense": False}
    schedule = schedules.MovementSchedule(0.25, steps=12, warmup=1)
    optimizer = optax.multi_transform(
        {"weights": optax.sgd(0.05), "scores": optax.sgd(0.5)}, ("weights", "scores")
    )

    @jax.jit
    def step(t, params, scores, state):
        mask = movement.hard_masks(scores, schedule.sparsity(t))

        def loss(both):
            seen = movement.forward(both[0], both[1], mask)
            return sum(jnp.sum((seen[n] - target[n]) ** 2) / 2 for n in seen)

        grads = jax.grad(loss)((params, scores))
        updates, state = optimizer.update(grads, state)
        return (*optax.apply_updates((params, scores), updates), state, mask)

    params, scores = drawn(0), movement.init(drawn(0), prunable)
    state = optimizer.init((params, scores))
    w, s = (np.asarray(x["a"], np.float64) for x in (params, scores))
    for t in range(12):
        keep = w.size - allocation.removed_count(w.size, schedule.sparsity(t))
        m = np.zeros(w.size, bool)
        m[np.argsort(-s.ravel(), kind="stable")[:keep]] = True
        m = m.reshape(w.shape)
        params, scores, state, mask = step(jnp.int32(t), params, scores, state)
        np.testing.assert_array_equal(mask["a"], m)
        g = w * m - np.asarray(target["a"], np.float64)
        w, s = w - 0.05 * g * m, s - 0.5 * g * w
        np.testing.assert_allclose(params["a"], w, rtol=1e-5, atol=1e-6)
        # atol: sums of twelve float32 products of order 1.
        np.testing.assert_allclose(scores["a"], s, rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1
    learned = importance.score("movement", params, prunable=prunable,
                               measured={"learned": scores})  # fmt: skip
    np.testing.assert_array_equal(learned["a"], scores["a"])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_soft_masks_compare_sigmoids_and_leave_half_a_percent(threshold):
    scores = {**drawn(0, scale=3.0), "large": jnp.asarray(drawn(2)["a"]).repeat(10, 0)}
    scores["dense"] = None  # pyright: ignore[reportArgumentType]
    mask = jax.jit(movement.soft_masks)(scores, threshold)
    eager = movement.soft_masks(scores, threshold) if threshold == 0.9 else mask
    for name in ("a", "b", "large"):
        s = np.asarray(scores[name], np.float64).ravel()
        expected = 1 / (1 + np.exp(-s)) > threshold
        least = int(0.005 * s.size) + 1
        if expected.sum() < least:
            expected = np.zeros(s.size, bool)
            expected[np.argsort(-s, kind="stable")[:least]] = True
        np.testing.assert_array_equal(np.ravel(mask[name]), expected)
        np.testing.assert_array_equal(mask[name], eager[name])
        assert mask[name].sum() / s.size >= movement.LEAST_KEPT
    assert mask["dense"] is None


def test_penalties_are_the_means_of_sigmoids():
    scores = {**drawn(0), "dense": None}
    for kind, shift in (("l1", 0.0), ("l0", 2 / 3 * np.log(0.1 / 1.1))):
        means = [np.mean(1 / (1 + np.exp(shift - np.asarray(scores[n], float)))) for n in "ab"]
        value = jax.jit(functools.partial(movement.penalty, kind=kind))(scores)
        assert float(value) == pytest.approx(np.mean(means), rel=1e-5)
    grads = jax.grad(movement.penalty)(scores)
    sigmoid = 1 / (1 + np.exp(-np.asarray(scores["a"], float)))
    expected = sigmoid * (1 - sigmoid) / sigmoid.size / 2
    np.testing.assert_allclose(grads["a"], expected, rtol=1e-5)


def test_l0_gates_are_hard_concrete():
    scores = {"w": jnp.linspace(-4, 4, 20_000), "dense": None}
    s = np.asarray(scores["w"], float)
    rested = movement.l0_gates(scores)["w"]
    expected = np.clip(1.2 / (1 + np.exp(-s)) - 0.1, 0, 1)
    # atol: 1.2 sigmoid − 0.1 cancels near 0.
    np.testing.assert_allclose(rested, expected, rtol=1e-5, atol=1e-6)
    gates = np.asarray(jax.jit(movement.l0_gates)(scores, jax.random.key(0))["w"])
    assert gates.min() == 0
    assert gates.max() == 1
    # The share of gates that are not 0 is what the penalty says; atol: 4 deviations of the draw.
    share, said = (gates > 0).mean(), float(movement.penalty(scores, "l0"))
    assert share == pytest.approx(said, abs=4 * 0.5 / np.sqrt(s.size))
    params = {"w": jnp.ones(20_000, jnp.bfloat16), "dense": jnp.ones(2)}
    gated = movement.gated(params, {"w": gates, "dense": None})
    assert gated["w"].dtype == jnp.bfloat16
    assert ((gated["w"] == 0) == (gates.astype(jnp.bfloat16) == 0)).all()
    np.testing.assert_array_equal(gated["dense"], np.ones(2))
    grads = jax.grad(lambda s: movement.l0_gates(s)["w"].sum())(scores)
    sigmoid = 1 / (1 + np.exp(-s))
    inside = (expected > 0) & (expected < 1)
    np.testing.assert_allclose(grads["w"], 1.2 * sigmoid * (1 - sigmoid) * inside,
                               rtol=1e-4, atol=1e-6)  # 1 − sigmoid cancels  # fmt: skip


# ---------------------------------------------------------------- rewinding


def test_rewinding_gives_early_values_under_the_late_mask():
    late, early, mask = drawn(0), drawn(1), some_masks(3)
    late["a"] = late["a"].astype(jnp.bfloat16)
    for given_early in (early, jax.tree.map(np.asarray, early)):
        for rewind in (sparse_training.rewind, jax.jit(sparse_training.rewind)):
            rewound = rewind(late, given_early, mask)
            for name, kept in mask.items():
                expected = early[name].astype(late[name].dtype)
                expected = expected if kept is None else jnp.where(kept, expected, 0)
                np.testing.assert_array_equal(rewound[name], expected)
                assert rewound[name].dtype == late[name].dtype


def test_a_rewound_schedule_goes_on_from_the_early_step():
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100, 0.1)
    anew = sparse_training.rewound_schedule(rate, to=40)
    within = jax.jit(sparse_training.rewound_schedule(rate, to=40, at=70))
    twice = sparse_training.rewound_schedule(
        sparse_training.rewound_schedule(rate, to=40, at=70), to=50, at=90
    )
    for t in range(100):
        assert float(anew(t)) == pytest.approx(float(rate(t + 40)), rel=1e-6)
        expected = rate(t) if t < 70 else rate(t - 30)
        assert float(within(t)) == pytest.approx(float(expected), rel=1e-6)
        if t >= 90:  # back to step 50, before the first return at 70
            assert float(twice(t)) == pytest.approx(float(rate(t - 40)), rel=1e-6)
    state = optax.sgd(anew).init(jnp.ones(()))
    update, _ = optax.sgd(anew).update(jnp.ones(()), state)
    assert float(update) == pytest.approx(-float(rate(40)), rel=1e-6)


def test_rounds_of_pruning_and_rewinding_leave_the_early_weights_of_the_last_mask():
    schedule = schedules.Iterative(0.8, rounds=3, every=10)
    rate = optax.linear_schedule(0.3, 0.0, 20)
    prune = sparse_training.prune_on_schedule(schedule, "magnitude")
    early = {"w": drawn(0)["a"]}
    optimizer = optax.sgd(sparse_training.rewound_schedule(rate, to=5), momentum=0.9)

    @jax.jit
    def train_on(params, state, mask):
        def step(_, carry):
            params, state = carry
            grads = jax.tree.map(lambda w, y: w - y, params, {"w": drawn(1)["a"]})
            updates, state = masks.keep(optimizer, mask).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 10, step, (params, state))

    params, mask = early, sparse_training.all_kept(early)
    for round_, at in enumerate(schedule.due_steps(), start=1):
        trained, _ = train_on(params, optimizer.init(params), mask)
        new = prune(at, mask, trained)
        kept = lowest_removed(
            np.where(mask["w"], np.abs(trained["w"]), -1),
            allocation.removed_count(96, 1 - 0.2 ** (round_ / 3)),
        )
        np.testing.assert_array_equal(np.ravel(new["w"]), kept)
        mask, params = new, sparse_training.rewind(trained, early, new)
        np.testing.assert_array_equal(params["w"], jnp.where(mask["w"], early["w"], 0))
    assert masks.summary(mask).pruned == allocation.removed_count(96, 0.8)


# ---------------------------------------------------------------- on schedule

ON_SCHEDULE = {
    "one-shot": schedules.OneShot(0.6, at=4),
    "cubic": schedules.Cubic(0.9, begin=2, end=13, every=3),
    "iterative": schedules.Iterative(0.8, rounds=4, every=3, begin=1),
    "constant": schedules.Constant(0.37, every=5, begin=3),
}


def lowest_removed(scores, gone):
    order = np.argsort(-np.asarray(scores, np.float64).ravel(), kind="stable")
    kept = np.zeros(order.size, bool)
    kept[order[: order.size - gone]] = True
    return kept


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("scope", "regrow"), [("tensor", False), ("global", False), ("global", True)]
)
@pytest.mark.parametrize("name", ON_SCHEDULE)
def test_at_due_steps_the_schedules_count_is_gone_in_one_program(name, scope, regrow):
    schedule = ON_SCHEDULE[name]
    prune = sparse_training.prune_on_schedule(schedule, lambda s: s, scope=scope, regrow=regrow)

    @jax.jit
    def train_step(t, mask, noise):
        return prune(t, mask, noise)

    mask = sparse_training.all_kept(drawn(0), {"a": True, "b": True, "dense": False})
    flat = np.ones(sum(leaf.size for leaf in jax.tree.leaves(mask)), bool)
    parts = {"a": slice(0, 96), "b": slice(96, 156)}
    for t in range(18):
        scores = {**drawn(t, ties=True), "dense": None}
        before, mask = mask, train_step(jnp.int32(t), mask, scores)
        eager = prune(t, before, scores)
        jax.tree.map(np.testing.assert_array_equal, mask, eager)
        if not schedule.is_due(t):
            jax.tree.map(np.testing.assert_array_equal, mask, before)
            continue
        joined = np.concatenate([np.ravel(scores[n]) for n in "ab"])
        ranked = joined if regrow else np.where(flat, joined, -np.inf)
        groups = [slice(0, 156)] if scope == "global" else list(parts.values())
        for group in groups:
            size = group.stop - group.start
            gone = allocation.removed_count(size, schedule.sparsity(t))
            kept = lowest_removed(ranked[group], gone)
            assert (kept <= flat[group]).all() or regrow
            flat[group] = kept
            assert (~flat[group]).sum() == gone
        got = np.concatenate([np.ravel(mask[n]) for n in "ab"])
        np.testing.assert_array_equal(got, flat)
    assert train_step._cache_size() == 1


@settings(max_examples=5, deadline=None)
@given(
    final=st.floats(0.0, 0.99), begin=st.integers(0, 3), length=st.integers(1, 9),
    every=st.integers(1, 4), size=st.sampled_from([7, 40, 320, 5]),
)  # fmt: skip
def test_counts_are_exact_and_masks_monotone_for_any_ramp(final, begin, length, every, size):
    schedule = schedules.Cubic(final, begin, begin + length, every)
    prune = jax.jit(sparse_training.prune_on_schedule(schedule, lambda s: s))
    mask = {"w": jnp.ones(size, bool)}
    for t in schedule.due_steps():
        scores = {"w": jnp.asarray(np.random.default_rng(t).normal(size=size), jnp.float32)}
        before, mask = mask, prune(jnp.int32(t), mask, scores)
        assert (~np.asarray(mask["w"])).sum() == allocation.removed_count(
            size, schedule.sparsity(t)
        )
        assert not (np.asarray(mask["w"]) & ~np.asarray(before["w"])).any()


def test_a_share_of_a_half_is_the_same_traced_or_not():
    # 0.9 · 5 = 4.5 and 0.5203125 · 320 = 166.5 round up; their nearest float32 may be below.
    for size, level in ((5, 0.9), (320, 0.5203125), (1000, 0.2345)):
        prune = sparse_training.prune_on_schedule(schedules.OneShot(level, at=0), lambda s: s)
        mask = jax.jit(prune)(0, {"w": jnp.ones(size, bool)}, {"w": jnp.arange(size, dtype=float)})
        assert int((~mask["w"]).sum()) == allocation.removed_count(size, level)


@pytest.mark.parametrize(
    ("scope", "options", "per"),
    [("row", {}, "columns"), ("tensor", {"pattern": "block:2x2"}, "blocks"),
     ("tensor", {"pattern": "row"}, "columns alive"), ("global", {"rounding": "down"}, "all")],
)  # fmt: skip
def test_scopes_and_patterns_of_masks_are_met_on_schedule(scope, options, per):
    schedule = schedules.Cubic(0.75, begin=0, end=4, every=1)
    prune = sparse_training.prune_on_schedule(schedule, "magnitude", scope=scope, **options)
    step, params = jax.jit(prune), {"up": {"kernel": drawn(0)["a"]}}
    mask = sparse_training.all_kept(params)
    for t in range(5):
        before, mask = mask, step(jnp.int32(t), mask, params)
        kept = np.asarray(mask["up"]["kernel"])
        assert not (kept & ~np.asarray(before["up"]["kernel"])).any()
        share = schedule.sparsity(t)
        counts = {
            "columns": (kept.sum(0), 12 - allocation.removed_count(12, share)),
            "blocks": (kept.sum() // 4, 24 - allocation.removed_count(24, share)),
            "columns alive": (kept.any(0).sum(), 8 - allocation.removed_count(8, share)),
            "all": (kept.sum(), 96 - int(96 * share)),
        }
        assert np.all(counts[per][0] == counts[per][1])
    assert step._cache_size() == 1


def test_a_criterion_by_name_takes_what_importance_takes():
    params = {"up": {"kernel": drawn(0)["a"], "bias": jnp.ones(8)}}
    grads = {"gradient": {"up": {"kernel": drawn(1)["a"], "bias": None}}}
    adam = (optax.ScaleByAdamState(jnp.int32(1), params, jax.tree.map(jnp.square, params)),)
    mask = sparse_training.all_kept(params)
    for name, needs in (
        ("snip", {"measured": grads}),
        ("magnitude_curvature", {"opt_state": adam}),
    ):
        prune = sparse_training.prune_on_schedule(schedules.OneShot(0.5, at=3), name)
        new = jax.jit(prune)(3, mask, params, **needs)
        expected = masks.by_sparsity(importance.score(name, params, **needs), 0.5)
        jax.tree.map(np.testing.assert_array_equal, new, expected)


@pytest.mark.parametrize("name", ["adam", "adafactor", "MultiSteps"])
def test_a_train_step_that_prunes_itself_compiles_once_and_revives_nothing(name):
    optimizer = OPTIMIZERS[name]()
    schedule = schedules.Cubic(0.8, begin=1, end=7, every=3)
    prune = sparse_training.prune_on_schedule(schedule, "magnitude", scope="global")

    @jax.jit
    def step(t, params, mask, state):
        mask = prune(t, mask, params)
        params = masks.apply(params, mask)
        grads = jax.tree.map(lambda x: jnp.cos(9 * x) + 0.5, params)
        updates, state = masks.keep(optimizer, mask).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, mask, state, masks.revived(params, mask)

    params = drawn(0)
    mask = sparse_training.all_kept(params, {"a": True, "b": True, "dense": False})
    state, gone = optimizer.init(params), 0
    for t in range(9):
        params, mask, state, revived = step(jnp.int32(t), params, mask, state)
        assert int(revived) == 0
        if schedule.is_due(t):
            gone = allocation.removed_count(96 + 60, schedule.sparsity(t))
        assert masks.summary(mask).pruned == gone
    assert gone == allocation.removed_count(156, 0.8)
    assert step._cache_size() == 1


def test_scores_that_are_constants_of_the_program_are_traced_all_the_same():
    fixed = {"w": jnp.arange(6.0)}
    prune = sparse_training.prune_on_schedule(schedules.OneShot(0.5, at=1), lambda: fixed)
    mask = jax.jit(prune)(jnp.int32(1), {"w": jnp.ones(6, bool)})
    assert mask["w"].tolist() == [False] * 3 + [True] * 3


class OwnSchedule:
    """Half of what is left at two steps of one's own."""

    def sparsity(self, step):
        return 0.5 * (step >= 2) + 0.25 * (step >= 9)

    def is_due(self, step):
        return (step == 2) | (step == 9)

    def due_steps(self):
        return (2, 9)


def test_a_schedule_of_ones_own_is_followed():
    prune = jax.jit(sparse_training.prune_on_schedule(OwnSchedule(), lambda s: s))
    mask, kept = {"w": jnp.ones(8, bool)}, []
    for t in range(11):
        mask = prune(jnp.int32(t), mask, {"w": jnp.arange(8.0)})
        kept.append(int(mask["w"].sum()))
    assert kept == [8] * 2 + [4] * 7 + [2] * 2


# ---------------------------------------------------------------- bad input

W, M = {"w": jnp.ones((2, 3))}, {"w": jnp.ones((2, 3), bool)}
NAN = {"w": jnp.ones((2, 3)).at[0, 1].set(jnp.nan)}


def on_schedule(**options):
    score = options.pop("score", "magnitude")
    return sparse_training.prune_on_schedule(schedules.OneShot(0.5, at=0), score, **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: rigl_update(W, M, None, 1.5, W), "fraction = 1.5 is not a share"),
        (lambda: rigl_update(W, M, None, float("nan"), W), "fraction = nan is not a share"),
        (lambda: rigl_update(W, M, None, 0.5, W, regrown="kept"), "did you mean 'keep'"),
        (lambda: rigl_update(W, {"w": None}, None, 0.5, W), "no tensor has a mask"),
        (lambda: rigl_update(W, W, None, 0.5, W), "mask of 'w' is of float32, not bool"),
        (lambda: rigl_update(W, M, None, 0.5, {"w": None}), "growth score is none"),
        (lambda: rigl_update(W, M, None, 0.5, {"w": jnp.ones(2)}), r"of shape \(2,\)"),
        (lambda: rigl_update(W, M, None, 0.5, NAN), "'w' have 1 NaN"),
        (lambda: rigl_update(NAN, M, None, 0.5, W), "'w' have 1 NaN"),
        (lambda: rigl_update(W, M, None, 0.5, {"v": W["w"]}), "differ in structure"),
        (lambda: sparse_training.straight_through(W, {"w": jnp.ones(3, bool)}), "the weight is of"),
        (lambda: sparse_training.straight_through(W, W), "not bool"),
        (lambda: sparse_training.ste_magnitude(W, None, 1.0), "got 1.0"),
        (lambda: movement.forward(W, {"w": None}, M), "the score is none"),
        (lambda: movement.penalty(W, "l2"), "kind must be one of l1, l0, got 'l2'"),
        (lambda: movement.penalty({"w": None}), "no scores to penalize"),
        (lambda: sparse_training.rewind(W, {"w": jnp.ones(3)}, M), r"has shape \(3,\) in the e"),
        (lambda: sparse_training.rewind(W, {"v": jnp.ones(3)}, M), "differ in structure"),
        (lambda: sparse_training.rewound_schedule(lambda t: t, to=-1), "to must be an integer of"),
        (lambda: sparse_training.rewound_schedule(lambda t: t, 1, at=2.5), "at must be an integer"),  # pyright: ignore
        (lambda: on_schedule(score="magnitud"), "criterion must be one of .*, got 'magnitud'"),
        (lambda: on_schedule(reduce="l2"), "reduce = 'l2' makes the scores of pruned"),
        (lambda: on_schedule(across="prod"), "across = 'prod'"),
        (lambda: on_schedule()(0, M, NAN), "'w' have 1 NaN"),
        (lambda: on_schedule()(0, W, W), "mask of 'w' is of float32, not bool"),
        (lambda: on_schedule(score=lambda: {"w": None})(0, M), "the score is none"),
        (lambda: on_schedule()(0, M, params=W), "give the parameters after the mask"),
        (lambda: on_schedule(scope="tensr")(0, M, W), "scope must be one of .* 'tensr'"),
        (lambda: jax.jit(on_schedule(pattern="2:4"))(0, M, W), "which a traced share cannot"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_prunable_is_what_has_a_mask():
    params = {"up": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 4))}}
    mask = sparse_training.all_kept(params, {"up": {"kernel": False}, "head": {"kernel": True}})
    assert tree.map_leaves(lambda _, m: m is not None, mask) == {
        "up": {"kernel": False}, "head": {"kernel": True},
    }  # fmt: skip
    pruned = on_schedule()(0, mask, params)
    assert masks.summary(pruned).tensors == {"head/kernel": masks.Tally(8, 16)}


def test_masks_that_are_sparser_than_the_schedule_stay_as_they_are():
    sparse = {"w": jnp.arange(12).reshape(3, 4) < 4}
    for step in (0, jnp.int32(0)):
        kept = jax.jit(on_schedule())(step, sparse, {"w": jnp.arange(12.0).reshape(3, 4)})
        np.testing.assert_array_equal(kept["w"], sparse["w"])
