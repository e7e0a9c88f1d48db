"""Schedules against float64, at the check values, and as ramps that never fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import schedules
from swe_prune.errors import InputError
from swe_prune.schedules import Constant, Cubic, Iterative, MovementSchedule, OneShot

SCHEDULES = {
    "one-shot": OneShot(0.6, at=7),
    "cubic": Cubic(0.9, begin=3, end=40, every=5),
    "cubic from some": Cubic(0.9, begin=0, end=30, every=10, initial=0.25),
    "iterative": Iterative(0.8, rounds=4, every=6, begin=2),
    "constant": Constant(0.5, every=7, begin=1, end=36),
    "movement": MovementSchedule(0.15, steps=45, warmup=5),
}
EXACT = {  # by METHODS §15.4 and 15.5 in float64
    "one-shot": lambda t: 0.6 if t >= 7 else 0.0,
    "cubic": lambda t: 0.9 + (0 - 0.9) * (1 - np.clip((t - 3) / 37, 0, 1)) ** 3,
    "cubic from some": lambda t: 0.9 + (0.25 - 0.9) * (1 - np.clip(t / 30, 0, 1)) ** 3,
    "iterative": lambda t: 1 - 0.2 ** (np.clip((t - 2) // 6 + 1, 0, 4) / 4),
    "constant": lambda t: 0.5,
    "movement": lambda t: 1 - (0.15 + 0.85 * (1 - np.clip((t - 5) / 30, 0, 1)) ** 3),
}
DUE = {
    "one-shot": (7,),
    "cubic": (3, 8, 13, 18, 23, 28, 33, 38, 40),
    "cubic from some": (0, 10, 20, 30),
    "iterative": (2, 8, 14, 20),
    "constant": (1, 8, 15, 22, 29, 36),
    "movement": tuple(range(46)),
}
STEPS = range(50)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sparsity_is_that_of_the_formula(name):
    schedule = SCHEDULES[name]
    expected = [EXACT[name](t) for t in STEPS]
    exact = [schedule.sparsity(t) for t in STEPS]
    assert all(type(s) is float for s in exact)
    np.testing.assert_allclose(exact, expected, rtol=1e-14, atol=1e-15)
    traced = jax.jit(schedule.sparsity)(jnp.arange(50))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_due_steps_are_those_that_are_due(name):
    schedule = SCHEDULES[name]
    assert schedule.due_steps() == DUE[name]
    assert all(type(schedule.is_due(t)) is bool for t in STEPS)
    assert tuple(t for t in STEPS if schedule.is_due(t)) == DUE[name]
    traced = jax.jit(schedule.is_due)(jnp.arange(50))
    assert traced.dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(traced), DUE[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_step_gives_the_same(name):
    schedule = SCHEDULES[name]
    for t in (0, 7, 20, 40):
        assert schedule.sparsity(np.int64(t)) == schedule.sparsity(t)
        assert type(schedule.sparsity(np.int64(t))) is float
        on_device = schedule.sparsity(jnp.int32(t))
        assert on_device.shape == ()
        np.testing.assert_allclose(on_device, schedule.sparsity(t), rtol=1e-6)
        assert bool(schedule.is_due(jnp.uint32(t))) == schedule.is_due(np.int32(t))


def test_one_program_serves_a_whole_schedule():
    sparsity = jax.jit(SCHEDULES["cubic"].sparsity)
    for t in STEPS:
        sparsity(jnp.int32(t))
    assert sparsity._cache_size() == 1


def test_cubic_check_values():
    schedule = Cubic(0.9, begin=0, end=1000, every=10)
    values = [schedule.sparsity(t) for t in (250, 500, 750, 1000)]
    assert values == pytest.approx([0.5203125, 0.7875, 0.8859375, 0.9], rel=1e-15)


def test_cubic_is_jaxpruners_one_step_later():
    ours = Cubic(0.8, begin=10, end=110, every=1)
    for t in range(9, 110):
        jaxpruner = 0.8 * (1 - (1 - np.clip((t + 1 - 10) / (110 - 10), 0, 1)) ** 3)
        assert ours.sparsity(t + 1) == pytest.approx(jaxpruner, rel=1e-14)


SHARE = st.just(0.0) | st.floats(1e-30, 0.999)  # what is smaller is 0 in float32
STEP = st.integers(0, 300)
PERIOD = st.integers(1, 90)
RAMPS = st.one_of(
    st.builds(OneShot, SHARE, STEP),
    st.builds(
        lambda ends, begin, length, every: Cubic(ends[1], begin, begin + length, every, ends[0]),
        st.tuples(SHARE, SHARE).map(sorted), STEP, PERIOD, PERIOD,
    ),
    st.builds(Iterative, SHARE, st.integers(1, 12), st.integers(1, 40), STEP),
    st.builds(lambda final, warmup, more: MovementSchedule(final, 3 * warmup + more, warmup),
              SHARE, st.integers(0, 60), PERIOD),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(RAMPS)
def test_a_ramp_never_falls_and_ends_at_its_goal(schedule):
    due = schedule.due_steps()
    values = [schedule.sparsity(t) for t in range(800)]
    traced = np.asarray(schedule.sparsity(jnp.arange(800)))
    goal = schedule.sparsity(due[-1])
    for each in (np.asarray(values), traced):
        assert (np.diff(each) >= 0).all()
        assert (each >= 0).all()
        assert each[-1] == np.asarray(goal, each.dtype)
    assert goal == schedule.final or goal == 1 - schedule.final
    assert list(due) == sorted(set(due)) == [t for t in range(800) if schedule.is_due(t)]


@given(st.floats(0.01, 0.99), st.integers(1, 12))
def test_every_round_removes_the_same_share_of_what_is_left(final, rounds):
    schedule = Iterative(final, rounds, every=10, begin=5)
    left = [1.0, *(1 - schedule.sparsity(t) for t in schedule.due_steps())]
    shares = 1 - np.divide(left[1:], left[:-1])
    np.testing.assert_allclose(shares, 1 - (1 - final) ** (1 / rounds), rtol=1e-10)
    assert schedule.sparsity(schedule.due_steps()[-1]) == final


def test_movement_values_and_penalty_follow_the_reference():
    hard = MovementSchedule(0.15, steps=100_000, warmup=5_400)
    soft = MovementSchedule(0.1, steps=100_000, warmup=5_400, initial=0.0)
    for t in range(0, 100_001, 2_500):
        p = np.clip((t - 5_400) / (100_000 - 3 * 5_400), 0, 1)
        assert hard.value(t) == pytest.approx(0.15 + 0.85 * (1 - p) ** 3, rel=1e-13)
        tau = 0.1 - 0.1 * (1 - p) ** 3
        assert soft.value(t) == pytest.approx(tau, rel=1e-13, abs=1e-17)
        assert soft.penalty(t, 400.0) == pytest.approx(400 * tau / 0.1, rel=1e-13, abs=1e-13)
    assert (hard.value(5_400), hard.value(100_000 - 2 * 5_400)) == (1.0, 0.15)


def test_cosine_drop_fraction_is_that_of_the_formula():
    steps = np.arange(0, 1200)
    expected = np.where(steps < 1000, 0.3 / 2 * (1 + np.cos(np.pi * steps / 1000)), 0)
    exact = [schedules.cosine_drop_fraction(int(t), 0.3, 1000) for t in steps]
    np.testing.assert_allclose(exact, expected, rtol=1e-12)
    traced = jax.jit(lambda t: schedules.cosine_drop_fraction(t, 0.3, 1000))(jnp.arange(1200))
    # atol: near the end 1 + cos cancels, to the last digit of 1 in float32.
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=0.3 / 2 * 2e-7)


def test_registry_holds_every_schedule():
    assert schedules.names() == ("constant", "cubic", "iterative", "movement", "one_shot")
    assert {schedules.get(n) for n in schedules.names()} == {type(s) for s in SCHEDULES.values()}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: OneShot(1.0, 5), r"final must be a number in \[0, 1\), got 1.0"),
        (lambda: OneShot(float("nan"), 5), "final must be a number in .* got nan"),
        (lambda: OneShot("half", 5), "final must be a number in .* got 'half'"),  # pyright: ignore
        (lambda: OneShot(True, 5), "final must be a number in .* got True"),
        (lambda: OneShot(0.5, -1), "at must be .* steps from 0 .* got -1"),
        (lambda: OneShot(0.5, 1.5), "at must be an integer .* got 1.5"),  # pyright: ignore
        (lambda: Cubic(0.5, 10, 10, 1), "end must be .* steps from 11 to .* after begin, got 10"),
        (lambda: Cubic(0.5, 0, 10, 0), "every must be .* steps from 1 .* got 0"),
        (lambda: Cubic(0.5, 0, 2**31, 1), "end must be an integer .* got 2147483648"),
        (lambda: Cubic(0.5, 0, 10, 1, initial=0.6), "final must be at least initial = 0.6"),
        (lambda: Cubic(0.5, 0, 10, 1, initial=-0.1), "initial must be a number in .* got -0.1"),
        (lambda: Iterative(0.5, 0, 10), "rounds must be .* steps from 1 .* got 0"),
        (lambda: Iterative(0.5, 2**20, 2**20), "the last round must be an integer number of"),
        (lambda: Constant(-0.1), "final must be a number in .* got -0.1"),
        (lambda: Constant(0.1, begin=5, end=4), "end must be .* steps from 5 .* got 4"),
        (lambda: Constant(0.1).due_steps(), "infinitely many.*give end="),
        (lambda: MovementSchedule(1.1, 10, 1), r"final must be a number in \[0, 1\], got 1.1"),
        (lambda: MovementSchedule(0.1, 30, 10), "warm-ups of 10 and 20 steps leave none of 30"),
        (lambda: MovementSchedule(0.0, 30, 1, 0.0).penalty(3, 1.0), "final threshold of 0"),
        (lambda: OneShot(0.5, 1).sparsity(1.0), "step must be the integer .* got 1.0"),  # pyright: ignore
        (lambda: OneShot(0.5, 1).is_due(True), "step must be the integer .* got True"),
        (lambda: schedules.cosine_drop_fraction(1, 2.0, 10), "alpha must be a number .* got 2.0"),
        (lambda: schedules.cosine_drop_fraction(1, 0.3, 0), "end must be an integer .* got 0"),
        (lambda: schedules.get("cubik"), "must be one of .*'cubik'; did you mean 'cubic'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)
