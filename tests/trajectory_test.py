import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import trajectory
from swe_prune.errors import InputError

MEASURES = tuple(trajectory.BUFFERS)
SHAPE = (3, 4)
step = jax.jit(trajectory.update)


def history(n, seed=0, dtype=np.float32):
    """θ(0) … θ(n) of one weight tensor: some drift, some oscillate, some stand still."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(n + 1, *SHAPE)).cumsum(0) / 3
    walk[:, 0] = rng.normal(size=(n + 1, SHAPE[1]))
    walk[:, 1, 0] = 0.25
    return np.asarray(jnp.asarray(walk, dtype))


def whole(thetas, measure, *, power=0.5, window_start=1, vote_rate=1.0, index="window"):
    """A measure over the whole history in float64, by its definition; thetas[0] is θ(0)."""
    theta = np.asarray(thetas).astype(np.float64)
    seen = theta[1:]
    t = np.arange(1, len(theta)).reshape(-1, *[1] * (theta.ndim - 1))
    place = t - window_start + 1
    late = np.where(place >= 1, np.maximum(place if index == "window" else t, 1.0) ** power, 0.0)

    def late_mean(values):
        return (late * values).sum(0) / late.sum() if late.sum() else 0 * values[0]

    def votes():
        spread = np.array([np.abs(one).std(ddof=1) for one in seen]).reshape(t.shape)
        return (np.abs(seen) > spread * vote_rate).mean(0)

    return {
        "late_mean": lambda: late_mean(seen),
        "late_mean_abs": lambda: late_mean(np.abs(seen)),
        "mean": lambda: seen.mean(0),
        "variance": lambda: seen.var(0),
        "mean_abs": lambda: np.abs(seen).mean(0),
        "votes": votes,
        "path_length": lambda: np.abs(np.diff(theta, axis=0)).sum(0),
        "displacement": lambda: theta[-1] - theta[0],
        "sign_flips": lambda: (theta[1:] * theta[:-1] < 0).sum(0),
        "last": lambda: theta[-1],
    }[measure]()


def tracked(thetas, measures=MEASURES, start=0, **settings):
    stats = trajectory.init(params(thetas[0]), measures, start=start, **settings)
    for theta in thetas[1:]:
        stats = step(stats, params(theta))
    return stats


def params(theta):
    return {"up": {"kernel": jnp.asarray(theta), "bias": jnp.ones(4)}}


def value(stats, measure):
    read = trajectory.read(stats, measure)
    assert read["up"]["bias"] is None
    assert read["up"]["kernel"].dtype == jnp.float32
    return np.asarray(read["up"]["kernel"])


def assert_measures(stats, thetas, *, atol=1e-6, measures=MEASURES, **settings):
    for measure in measures:
        expected = whole(thetas, measure, **settings)
        # atol: a mean of values of about 1 may cancel to nothing; rtol alone would ask for more
        # digits than the values had.
        np.testing.assert_allclose(
            value(stats, measure), expected, rtol=1e-5, atol=atol, err_msg=measure
        )


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_measure_equals_its_definition_over_the_whole_history(dtype, compensated):
    thetas = history(23, dtype=dtype)
    assert_measures(tracked(thetas, compensated=compensated), thetas)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_measures_of_few_snapshots(n):
    thetas = history(n)
    if n:
        assert_measures(tracked(thetas), thetas)
    else:
        for measure in set(MEASURES) - {"last"}:
            assert not value(tracked(thetas), measure).any(), measure


@pytest.mark.parametrize(
    ("power", "mean"), [(0, 2.5), (0.5, 2.7699068121), (1, 3.0), (2, 3.3333333333)]
)
def test_late_mean_of_1_2_3_4_is_the_published_check_value(power, mean):
    stats = tracked(np.ones(SHAPE) * np.arange(5).reshape(5, 1, 1), ("late_mean",), power=power)
    np.testing.assert_allclose(value(stats, "late_mean"), mean, rtol=1e-6)


@pytest.mark.parametrize("window_start", [1, 4, 9, 10, 30])
@pytest.mark.parametrize("power", [0, 0.5, 1, -1])
def test_window_counts_from_its_own_first_snapshot(window_start, power):
    thetas, settings = history(9), {"window_start": window_start, "power": power}
    measures = ("late_mean", "late_mean_abs", "mean")
    assert_measures(tracked(thetas, measures, **settings), thetas, measures=measures, **settings)


@pytest.mark.parametrize("window_start", [1, 4, 9])
def test_the_weights_of_the_public_review_count_from_the_first_epoch(window_start):
    thetas, last = history(9), len(history(9)) - 1
    settings = {"window_start": window_start, "power": 1, "index": "absolute"}
    stats = tracked(thetas, ("late_mean", "late_mean_abs"), **settings)
    assert_measures(stats, thetas, measures=("late_mean", "late_mean_abs"), **settings)
    # As it is printed: sum over L = 0 ... k of val(n - L) (n - L), over the sum of n - L.
    ages = range(last - window_start + 1)
    printed = sum(np.asarray(thetas[last - age], np.float64) * (last - age) for age in ages)
    printed /= sum(last - age for age in ages)
    np.testing.assert_allclose(value(stats, "late_mean"), printed, rtol=1e-5, atol=1e-7)
    # In parts it is the same, as the number counts all the snapshots.
    early, late = thetas[:6], thetas[5:]
    parts = [
        tracked(one, ("late_mean",), start, **settings) for one, start in ((early, 0), (late, 5))
    ]
    joined = value(trajectory.merge(*parts), "late_mean")
    np.testing.assert_allclose(joined, value(stats, "late_mean"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("leave_out", [0, 3])
def test_the_mode_vote_takes_the_final_threshold_over_all_but_the_last(leave_out):
    thetas = history(9, seed=4)[1:]
    keep = trajectory.mode_vote(
        [params(theta) for theta in thetas], params(thetas[-1]), 0.7, leave_out=leave_out
    )
    threshold = np.abs(np.asarray(thetas[-1], np.float64)).std(ddof=1) * 0.7
    voting = np.asarray(thetas[: len(thetas) - leave_out], np.float64)
    votes = (np.abs(voting) > threshold).astype(int)
    # The mode, of ties the smaller one, as scipy.stats.mode has it.
    mode = votes.sum(0) > len(votes) / 2
    np.testing.assert_array_equal(keep["up"]["kernel"], mode)


def test_a_mode_vote_without_voters_is_refused():
    theta = params(history(1)[1])
    with pytest.raises(InputError, match="leave_out must be from 0 to 1"):
        trajectory.mode_vote([theta, theta], theta, leave_out=2)
    with pytest.raises(InputError, match="rate must be 0 or more, got -1"):
        trajectory.mode_vote([theta], theta, -1)


@pytest.mark.parametrize("vote_rate", [0.0, 0.5, 2.0])
def test_votes_compare_with_the_tensors_own_deviation_at_every_snapshot(vote_rate):
    thetas = history(12, seed=2)
    stats = tracked(thetas, ("votes",), vote_rate=vote_rate)
    np.testing.assert_allclose(
        value(stats, "votes"), whole(thetas, "votes", vote_rate=vote_rate), rtol=1e-6
    )


def test_sign_flips_of_tiny_weights_are_counted():
    thetas = 1e-30 * np.ones((6, *SHAPE)) * np.array([1, -1, -1, 1, 0, -1]).reshape(6, 1, 1)
    assert (value(tracked(thetas, ("sign_flips",)), "sign_flips") == 2).all()


LONG = 100_000


def long_histories():
    t = np.arange(LONG + 1, dtype=np.float64)[:, None, None]
    base = np.random.default_rng(3).normal(size=SHAPE)
    wave = np.sin(1.7 * t + np.arange(12).reshape(SHAPE))
    yield "far from 0", 100 + base + 0.01 * wave
    yield "near 0", base + 0.01 * wave
    yield "drifting", base * (1 + 1e-4 * t)
    yield "oscillating about 0.1", 0.1 + base * (-1) ** t


@functools.partial(jax.jit, static_argnums=(1, 2))
def scanned(thetas, measures, compensated):
    stats = trajectory.init(params(thetas[0]), measures, compensated=compensated)
    return jax.lax.scan(lambda s, x: (trajectory.update(s, params(x)), None), stats, thetas[1:])[0]


@pytest.mark.parametrize("name", [name for name, _ in long_histories()])
def test_no_digits_are_lost_over_100_000_snapshots(name):
    thetas = dict(long_histories())[name].astype(np.float32)
    measures = ("late_mean", "mean", "variance", "mean_abs", "path_length")
    stats = scanned(jnp.asarray(thetas), measures, True)
    assert_measures(stats, thetas, measures=measures, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, _ in long_histories()])
def test_one_float32_a_weight_is_enough_for_200_snapshots(name):
    thetas = dict(long_histories())[name][:201].astype(np.float32)
    measures = ("late_mean", "mean", "mean_abs")
    stats = scanned(jnp.asarray(thetas), measures, False)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats.buffers))
    assert_measures(stats, thetas, measures=measures, atol=1e-7)


def test_100_000_snapshots_need_compensation():
    thetas = dict(long_histories())["drifting"].astype(np.float32)
    plain, exact = scanned(jnp.asarray(thetas), ("mean",), False), whole(thetas, "mean")
    error = np.abs(value(plain, "mean") / exact - 1).max()
    assert 1e-5 < error < 3e-3


def test_by_default_every_measure_is_float32_and_nothing_else():
    thetas = history(30)
    stats = tracked(thetas)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats.buffers))
    assert_measures(stats, thetas)


@pytest.mark.parametrize("compensated", [True, False])
def test_merging_parts_equals_the_whole_in_any_grouping(compensated):
    thetas, settings = history(20), {"window_start": 4, "compensated": compensated}
    a, b, c = (
        tracked(thetas[i : j + 1], start=i, **settings) for i, j in [(0, 3), (3, 11), (11, 20)]
    )
    merge = trajectory.merge
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), jax.jit(merge)(merge(a, b), c)):
        assert int(merged.count) == 20
        assert_measures(merged, thetas, window_start=4)
    continued = merge(a, b)
    for theta in thetas[12:]:
        continued = step(continued, params(theta))
    assert_measures(continued, thetas, window_start=4)


def test_merging_with_nothing_changes_nothing():
    thetas = history(7)
    some = tracked(thetas)
    before = trajectory.init(params(thetas[0]), MEASURES)
    after = trajectory.init(params(thetas[-1]), MEASURES, start=7)
    assert_measures(trajectory.merge(before, some), thetas)
    assert_measures(trajectory.merge(some, after), thetas)


@pytest.mark.slow
def test_merging_keeps_the_digits_of_many_parts():
    thetas = np.linspace(1, 4, 2001)[:, None, None] * np.ones(SHAPE)
    merged = tracked(thetas[:1], ("mean", "path_length"), compensated=True)
    merge = jax.jit(trajectory.merge)
    for t in range(2000):
        one = tracked(thetas[t : t + 2], ("mean", "path_length"), start=t, compensated=True)
        merged = merge(merged, one)
    assert_measures(merged, thetas.astype(np.float32), measures=("mean", "path_length"))


@pytest.mark.parametrize("compensated", [True, False])
def test_restored_statistics_continue_bit_for_bit(compensated):
    thetas = history(16)
    uninterrupted = tracked(thetas, compensated=compensated)
    half = tracked(thetas[:9], compensated=compensated)
    leaves, treedef = jax.tree.flatten(half)
    restored = treedef.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
    for theta in thetas[9:]:
        restored = step(restored, params(theta))
    assert jax.tree.structure(restored) == jax.tree.structure(uninterrupted)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(uninterrupted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_statistics_survive_the_donation_of_the_parameters_they_started_from():
    thetas = history(1)
    donated = params(thetas[0])
    stats = trajectory.init(donated, MEASURES)
    donate = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 7, p), donate_argnums=0)
    new = donate(donated)
    assert donated["up"]["kernel"].is_deleted()
    np.testing.assert_array_equal(value(stats, "last"), thetas[0])
    stats = step(stats, new)
    jax.block_until_ready(donate(new))
    np.testing.assert_array_equal(value(stats, "last"), np.full(SHAPE, -7))
    np.testing.assert_array_equal(value(stats, "displacement"), -7 - thetas[0])


def test_numpy_parameters_may_be_overwritten_after_init():
    kernel = np.ones(SHAPE, np.float32)
    stats = trajectory.init({"kernel": kernel}, ("last",))
    kernel[:] = 5
    assert (trajectory.read(stats, "last")["kernel"] == 1).all()


def test_snapshots_on_a_cadence_inside_cond_are_those_of_the_loop():
    thetas = history(12)

    @jax.jit
    def every_third(stats, t, p):
        return jax.lax.cond(t % 3 == 0, trajectory.update, lambda s, _: s, stats, p)

    stats = trajectory.init(params(thetas[0]), MEASURES)
    for t, theta in enumerate(thetas[1:], 1):
        stats = every_third(stats, t, params(theta))
    assert int(stats.count) == 4
    assert_measures(stats, thetas[::3])


def test_statistics_can_be_donated_and_keep_their_structure():
    update = jax.jit(trajectory.update, donate_argnums=0)
    thetas = history(3)
    stats = trajectory.init(params(thetas[0]), MEASURES)
    types = jax.tree.map(jnp.result_type, stats)
    for theta in thetas[1:]:
        stats = update(stats, params(theta))
    assert jax.tree.map(jnp.result_type, stats) == types
    assert_measures(stats, thetas)


def test_buffers_are_shared_and_memory_says_what_they_take():
    measures = ("variance", "mean", "path_length", "displacement")
    stats = trajectory.init(params(history(0)[0]), measures)
    actual = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(buffer))
        for name, buffer in stats.buffers.items()
    }
    assert actual == trajectory.memory(params(history(0)[0]), measures)
    assert list(actual) == ["first", "last", "mean", "path_length", "sum_of_squares"]
    abstract = jax.eval_shape(params, history(0)[0])
    assert trajectory.memory(abstract, measures)["mean"] == 4 * 12
    assert trajectory.memory(abstract, measures, compensated=True)["mean_carry"] == 2 * 12


def test_one_measure_may_be_given_as_a_string():
    assert trajectory.init(params(np.ones(SHAPE)), "mean").measures == ("mean",)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"measures": ()}, "no measure was given"),
        ({"measures": ("late_men",)}, "did you mean 'late_mean'"),
        ({"window_start": 0}, "window_start must be an integer of at least 1"),
        ({"power": float("nan")}, "power must be a finite number, got nan"),
        ({"power": 8}, "of at least -3 and at most 3"),
        ({"prunable": {"up": {"kernel": False, "bias": False}}}, "nothing to track"),
        ({"prunable": {"up": {"kernel": True}}}, "differ in structure"),
    ],
)
def test_unusable_settings_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        trajectory.init(params(np.ones(SHAPE)), **settings)


def test_tracking_integers_is_refused_by_name():
    with pytest.raises(InputError, match="'a/table' is marked prunable but is not a floating"):
        trajectory.init({"a": {"table": jnp.arange(3)}}, prunable={"a": {"table": True}})


def test_reading_what_was_not_tracked_is_refused():
    stats = tracked(history(1), ("late_mean",))
    with pytest.raises(InputError, match="'variance' was not tracked"):
        trajectory.read(stats, "variance")
    with pytest.raises(InputError, match=r"measure must be one of .*, got 'variants'"):
        trajectory.read(stats, "variants")


@pytest.mark.parametrize(
    "other",
    [{"power": 1.0}, {"window_start": 2}, {"measures": ("mean",)}, {"compensated": True}],
)
def test_merging_statistics_of_different_settings_is_refused(other):
    a = trajectory.init(params(np.ones(SHAPE)), **{"measures": ("late_mean",)})
    b = trajectory.init(params(np.ones(SHAPE)), **{"measures": ("late_mean",)} | other)
    with pytest.raises(InputError, match="same"):
        trajectory.merge(a, b)


def test_power_up_to_its_limit_does_not_overflow_at_the_last_countable_snapshot():
    stats = trajectory.init(params(np.ones(SHAPE)), power=3, start=2**31 - 3)
    stats = dataclasses.replace(stats, weight_sum=jnp.array([5.3e36, 0.0]))
    stats = step(stats, params(np.ones(SHAPE)))
    assert np.isfinite(value(stats, "late_mean")).all()
