import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import importance, masks, trajectory
from swe_prune.errors import InputError
from swe_prune.importance import registry

RNG = np.random.default_rng(0)
PARAMS = {
    "up": {"kernel": jnp.asarray(RNG.normal(size=(9, 7)), jnp.float32), "bias": jnp.ones(7)},
    "down": {"kernel": jnp.asarray(RNG.normal(size=(7, 9)) * 3, jnp.float32)},
}
MEASURES = ("late_mean", "late_mean_abs", "mean_abs", "votes")


def snapshots(n=6):
    for t in range(n):
        yield jax.tree.map(lambda x, t=t: x * (1 + 0.3 * jnp.sin(t + 7 * x)), PARAMS)


def stats():
    tracked = trajectory.init(PARAMS, MEASURES)
    for params in snapshots():
        tracked = trajectory.update(tracked, params)
    return tracked


def history(*path):
    def leaf(params):
        for key in path:
            params = params[key]
        return np.asarray(params, np.float64)

    return np.stack([leaf(params) for params in snapshots()])


@pytest.mark.parametrize("name", ["swe", "swe_abs", "mean_abs", "votes", "magnitude"])
def test_scores_equal_their_formula_over_the_history(name):
    theta = history("down", "kernel")
    w = np.sqrt(np.arange(1, len(theta) + 1))[:, None, None]
    spread = np.abs(theta).std(axis=(1, 2), ddof=1)[:, None, None]
    expected = {
        "swe": lambda: np.abs((w * theta).sum(0) / w.sum()),
        "swe_abs": lambda: (w * np.abs(theta)).sum(0) / w.sum(),
        "mean_abs": lambda: np.abs(theta).mean(0),
        "votes": lambda: (np.abs(theta) > spread).mean(0),
        "magnitude": lambda: np.abs(np.asarray(PARAMS["down"]["kernel"], np.float64)),
    }[name]()
    score = importance.score(name, PARAMS, stats=stats())
    np.testing.assert_allclose(score["down"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert score["up"]["bias"] is None


def test_an_oscillating_weight_scores_low_by_swe_and_high_by_its_ablation():
    tracked = trajectory.init({"w": jnp.zeros((2, 1))}, MEASURES, prunable={"w": True})
    for t in range(100):
        w = jnp.array([[5.0 * (-1) ** t], [1.0]])
        tracked = trajectory.update(tracked, {"w": w})
    swe, swe_abs = (importance.score(n, {"w": w}, stats=tracked)["w"] for n in ("swe", "swe_abs"))
    assert swe[0] < 0.1 < swe[1]
    assert swe_abs[0] > swe_abs[1]


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.4, 2.0])
def test_swe_spread_with_the_std_rule_is_the_authors_earlier_rule(rate):
    score = importance.score("swe_spread", PARAMS, stats=stats())
    spread = importance.get("swe_spread").spread
    mask = masks.by_std(score, rate, spread=spread)
    for tensor in ("up", "down"):
        theta = history(tensor, "kernel")
        w = np.sqrt(np.arange(1, len(theta) + 1))[:, None, None]
        clone = (w * theta).sum(0) / w.sum()
        final = np.abs(np.asarray(PARAMS[tensor]["kernel"], np.float64))
        np.testing.assert_array_equal(mask[tensor]["kernel"], final > clone.std(ddof=1) * rate)


def test_swe_spread_ranks_a_tensor_as_magnitude_and_only_allocates_differently():
    tracked = stats()
    spread, size = (importance.score(n, PARAMS, stats=tracked) for n in ("swe_spread", "magnitude"))
    for scope, same in (("tensor", True), ("row", True), ("global", False)):
        a, b = masks.by_sparsity(spread, 0.6, scope), masks.by_sparsity(size, 0.6, scope)
        equal = jax.tree.map(lambda x, y: bool((x == y).all()), a, b)
        assert all(jax.tree.leaves(equal)) == same


def test_swe_spread_of_a_still_tensor_keeps_what_is_not_0():
    params = {"w": jnp.array([[0.0, 2.0, -3.0]])}
    tracked = trajectory.update(trajectory.init(params), jax.tree.map(jnp.ones_like, params))
    score = importance.score("swe_spread", params, stats=tracked)
    assert masks.by_std(score, 3.0, spread=1.0)["w"].tolist() == [[False, True, True]]


def test_random_scores_depend_on_the_path_and_the_seed_alone():
    one = importance.score("random", PARAMS, seed=1)
    assert (importance.score("random", PARAMS, seed=1)["up"]["kernel"] == one["up"]["kernel"]).all()
    assert (importance.score("random", PARAMS, seed=2)["up"]["kernel"] != one["up"]["kernel"]).any()
    alone = importance.score("random", {"down": PARAMS["down"]}, seed=1)
    assert (alone["down"]["kernel"] == one["down"]["kernel"]).all()
    twins = {"a": {"kernel": jnp.ones((9, 9))}, "b": {"kernel": jnp.ones((9, 9))}}
    score = importance.score("random", twins)
    assert (score["a"]["kernel"] != score["b"]["kernel"]).any()


def test_default_weights_are_those_that_are_tracked():
    tracked = trajectory.init(PARAMS, prunable={"up": {"kernel": False, "bias": True},
                                                "down": {"kernel": False}})  # fmt: skip
    score = importance.score("magnitude", PARAMS, stats=tracked)
    assert score == {"up": {"kernel": None, "bias": score["up"]["bias"]}, "down": {"kernel": None}}
    assert importance.score("magnitude", PARAMS)["up"]["bias"] is None


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: importance.score("magnitud", PARAMS), "did you mean 'magnitude'"),
        (lambda: importance.score("swe", PARAMS), "needs trajectory statistics"),
        (lambda: importance.score("magnitude", PARAMS, power=2), "no option 'power'; its options"),
        (
            lambda: importance.score("votes", PARAMS, stats=trajectory.init(PARAMS)),
            "'votes' was not tracked",
        ),
        (
            lambda: importance.score(
                "swe", PARAMS, stats=trajectory.init(PARAMS), prunable=everything()
            ),
            "'up/bias' is prunable but 'late_mean' was not tracked",
        ),
        (
            lambda: importance.score("magnitude", {"w": jnp.ones(3)}, prunable={"w": False}),
            "nothing to score",
        ),
        (
            lambda: importance.score("magnitude", {"w": jnp.ones(3)}, prunable={"v": True}),
            "differ in structure",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def everything():
    return jax.tree.map(lambda _: True, PARAMS)


def test_a_new_criterion_is_one_function_and_one_decorator(monkeypatch):
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))

    @importance.register("scaled")
    def scaled(weight, factor=2.0):
        return (factor * weight).astype(jnp.bfloat16)

    assert "scaled" in importance.names()
    score = importance.score("scaled", PARAMS, factor=3.0)["up"]["kernel"]
    assert score.dtype == jnp.float32
    # rtol: of a criterion that computes in bfloat16.
    np.testing.assert_allclose(score, 3 * PARAMS["up"]["kernel"], rtol=2**-8)
    with pytest.raises(ValueError, match="registered already"):
        importance.register("scaled")(scaled)
    with pytest.raises(ValueError, match="which nothing provides"):
        importance.register("impossible")(lambda gradients: gradients)


def test_names_are_sorted_and_each_can_be_had():
    assert list(importance.names()) == sorted(importance.names())
    for name in importance.names():
        assert importance.get(name).name == name
