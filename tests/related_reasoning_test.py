"""The length reward, RLOO and the sums against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.related import reasoning

TERMS = 4


def reward(lengths, right, alpha):
    """One prompt, one answer after another, float64."""
    lengths = np.asarray(lengths, np.float64)
    good = lengths[np.asarray(right)]
    found = np.zeros(len(lengths))
    for j, one in enumerate(lengths):
        if right[j]:
            z = (one - good.mean()) / (good.std() + 1e-7)
            found[j] = 1 - alpha / (1 + np.exp(-z))
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_rewards_are_those_of_the_formula(alpha):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 50, (6, 8))
    right = random.random((6, 8)) < 0.6
    right[0] = True
    right[1] = False
    right[2] = np.arange(8) == 3  # a single right answer
    lengths[3] = 7  # all of one length
    found = reasoning.rewards(jnp.asarray(lengths), jnp.asarray(right), alpha)
    exact = [reward(a, b, alpha) for a, b in zip(lengths, right, strict=True)]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
    assert not found[1].any()
    assert float(found[2, 3]) == pytest.approx(1 - alpha / 2)
    np.testing.assert_allclose(found[3], right[3] * (1 - alpha / 2), rtol=1e-6)


def test_advantages_leave_one_out_and_say_nothing_of_equal_rewards():
    found = np.random.default_rng(1).random((3, 5))
    exact = [[row[j] - np.delete(row, j).mean() for j in range(5)] for row in found]
    np.testing.assert_allclose(reasoning.advantages(jnp.asarray(found)), exact, atol=1e-6)
    np.testing.assert_allclose(reasoning.advantages(jnp.full((2, 4), 0.8)), 0, atol=1e-6)


def test_the_gradient_is_that_of_reinforce_and_the_penalty_starts_at_nothing():
    log_p, advantage = jnp.array([-1.0, -2.0, -0.5]), jnp.array([1.0, -0.5, -0.5])
    grad = jax.grad(lambda x: reasoning.policy_loss(x, log_p, advantage, kl=0.7))(log_p)
    np.testing.assert_allclose(grad, -advantage / 3, rtol=1e-6)
    before = jnp.array([-1.5, -2.0, 0.0])
    found = reasoning.policy_loss(log_p, before, advantage, kl=0.7)
    apart = np.float64(before - log_p)
    exact = np.mean(-np.float64(advantage * log_p) + 0.7 * (np.exp(apart) - 1 - apart))
    assert float(found) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("work", ["sums", "filler"])
def test_sums_are_right_after_their_work(work):
    made = reasoning.sums(200, TERMS, work=work, seed=3)
    amounts = set()
    for tokens, written in zip(made.tokens, made.written, strict=True):
        digits, answer = tokens[:TERMS], tokens[written]
        assert tokens[TERMS] == reasoning.EQUALS
        assert not written[: TERMS + 1].any()
        assert answer[-1] == reasoning.END
        assert answer[-2] == digits.sum() % 10
        amounts.add(len(answer) - 2)
        steps = answer[:-2]
        sums = digits.cumsum()[1 : len(steps) + 1] % 10
        fillers = np.full(len(steps), reasoning.FILLER)
        np.testing.assert_array_equal(steps, sums if work == "sums" else fillers)
    assert amounts == set(range(TERMS))
    # Judged as they are, all are right, and cut off none is.
    prompts = made.tokens[:, : TERMS + 1]
    answers = [row[own][:-1].tolist() for row, own in zip(made.tokens, made.written, strict=True)]
    ended = [True] * len(answers)
    lengths, right = reasoning.judged(prompts, answers, ended)
    assert right.all()
    assert lengths.tolist() == [len(one) for one in answers]
    assert not reasoning.judged(prompts, answers, [False] * len(answers))[1].any()
    assert not reasoning.judged(prompts[:1], [[]], [True])[1].any()
    again = reasoning.joined(prompts, answers, ended, made.tokens.shape[1])
    np.testing.assert_array_equal(again.tokens, made.tokens)
    np.testing.assert_array_equal(again.written, made.written)


@pytest.mark.slow
def test_the_log_probability_is_that_of_the_answer_alone():
    config = ModelConfig(layers=1, heads=2, width=8, context=2 * TERMS + 2)
    model = gpt.build(config, reasoning.SYMBOLS)
    made = reasoning.sums(3, TERMS)
    params = model.init(jax.random.key(0), jnp.asarray(made.tokens))["params"]
    logits = np.float64(model.apply({"params": params}, jnp.asarray(made.tokens)))
    exact = np.zeros(3)
    for row, (tokens, written) in enumerate(zip(made.tokens, made.written, strict=True)):
        for at in np.flatnonzero(written):
            of = logits[row, at - 1]
            exact[row] += of[tokens[at]] - np.log(np.exp(of).sum())
    found = reasoning.log_probability(model, params, made)
    np.testing.assert_allclose(found, exact, rtol=1e-4)


LENGTHS = jnp.ones((2, 3), int)
RIGHT = jnp.ones((2, 3), bool)
PROMPT = np.array([[1, 2, 10]])
ONES = jnp.ones(3)
SUMS = reasoning.sums(2, 2)


def log_p(rows, symbols=reasoning.SYMBOLS):
    config = ModelConfig(layers=1, heads=1, width=4, context=6)
    return reasoning.log_probability(gpt.build(config, symbols), {}, rows)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: reasoning.rewards(LENGTHS, RIGHT, 1.0), r"alpha must be in \[0, 1\)"),
        (lambda: reasoning.rewards(LENGTHS, RIGHT, -0.1), "alpha must be"),
        (lambda: reasoning.rewards(LENGTHS[:, 1:], RIGHT, 0.1), "shape"),
        (lambda: reasoning.advantages(jnp.ones((2, 1))), "two or more answers to compare, got 1"),
        (lambda: reasoning.sums(4, 1), "terms must be between 2"),
        (lambda: reasoning.sums(4, 3, work="dots"), "work must be"),
        (lambda: reasoning.judged(PROMPT, [], []), "one answer, got 1 prompts, 0 answers"),
        (lambda: reasoning.joined(PROMPT, [[3, 3]], [True], 5), "length must be between 6"),
        (lambda: reasoning.joined(PROMPT, [[99]], [True], 8), "from 0 to 12, got .99"),
        (lambda: reasoning.joined(PROMPT, [[-5]], [True], 8), "from 0 to 12"),
        (lambda: reasoning.joined(PROMPT, [[2**40]], [True], 8), "from 0 to 12"),
        (lambda: reasoning.judged(PROMPT[:, :2], [[3]], [True]), "digits and then EQUALS"),
        (lambda: reasoning.judged(np.array([[55, 2, 10]]), [[3]], [True]), "digits and then"),
        (lambda: reasoning.policy_loss(ONES, ONES[:1], ONES), "log_p_before must have shape"),
        (lambda: reasoning.policy_loss(ONES[:, None], ONES, ONES), "log_p must be a float array"),
        (lambda: reasoning.policy_loss(ONES[:0], ONES[:0], ONES[:0]), "at least one answer"),
        (lambda: reasoning.policy_loss(ONES, ONES, ONES, -1.0), "kl must be 0 or more"),
        (lambda: log_p(reasoning.Answers(SUMS.tokens, SUMS.written[:1])), "of one shape"),
        (lambda: log_p(SUMS, symbols=5), "vocabulary of 5"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
