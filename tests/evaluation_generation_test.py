"""Decoding with a KV cache against decoding the whole text, and draws against probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import GREEDY, Sampling, generate, generation
from swe_prune.evaluation.sampling import draw
from swe_prune.models import gpt

VOCABULARY = 17
LLAMA = ModelConfig(
    layers=2, heads=4, width=16, context=64, kv_heads=2, hidden=24, gated=True, norm="rms",
    positions="rope", rope=RopeConfig(), tied_head=False, activation="silu",
)  # fmt: skip
GPT2 = ModelConfig(layers=2, heads=2, width=16, context=64, use_bias=True)
WINDOWED = ModelConfig(layers=1, heads=2, width=16, context=64, positions="rope", window=5)
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8], [16, 0, 2, 2, 11]]


def built(config):
    model = gpt.build(config, VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda w: 6 * w, params)  # far from uniform, so no ties


@pytest.fixture(scope="module")
def small():
    return built(LLAMA)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def without_cache(model, params, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (40 - len(tokens))])  # one shape, one program
        logits = logits_of(model, params, padded)[0, len(tokens) - 1]
        tokens.append(int(np.argmax(logits)))
    return tuple(tokens[len(prompt) :])


@pytest.mark.quick(1)
@pytest.mark.parametrize("config", [GPT2, LLAMA, WINDOWED], ids=["gpt2", "llama", "window"])
def test_greedy_is_the_argmax_of_the_whole_text_each_time(config):
    model, params = built(config)
    found = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        assert tokens == without_cache(model, params, prompt, 12)
    assert len({*found.tokens}) > 2
    assert found.ended == (False,) * 4


@pytest.mark.slow
def test_a_prompt_alone_is_answered_as_among_others(small):
    model, params = small
    together = generate(model, params, PROMPTS, 10, sampling=GREEDY, seed=0)
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        alone = generate(model, params, [prompt], 10, sampling=GREEDY, seed=5)
        assert alone.tokens == (tokens,)


def test_what_is_drawn_depends_on_seed_and_place_alone(small):
    model, params = small
    sampling = Sampling(temperature=1.5)

    def drawn(prompts, seed):
        return generate(model, params, prompts, 10, sampling=sampling, seed=seed).tokens

    first = drawn(PROMPTS, 3)
    assert drawn(PROMPTS, 3) == first
    assert drawn(PROMPTS, 4) != first
    assert drawn([PROMPTS[0], *PROMPTS[2:], PROMPTS[1]], 3)[0] == first[0]
    same = drawn([PROMPTS[1]] * 4, 3)
    assert len({*same}) == 4
    even = generate(model, params, PROMPTS, 10, sampling=Sampling(temperature=1e6), seed=0).tokens
    assert all(len({*tokens}) > 4 for tokens in even)  # each step draws again


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [8, 12])  # 32 tokens are whole parts, and a rest with them
def test_a_long_prompt_is_taken_in_parts(small, at_once, monkeypatch):
    model, params = small
    monkeypatch.setattr(generation, "AT_ONCE", at_once)
    generation.begin.clear_cache()
    prompts = [list(np.arange(25) % VOCABULARY), [4, 4]]
    found = generate(model, params, prompts, 6, sampling=GREEDY, seed=0)
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        assert tokens == without_cache(model, params, prompt, 6)
    generation.begin.clear_cache()


def test_the_end_token_ends_a_text_and_the_loop(small, monkeypatch):
    model, params = small
    steps, go_on = [], generation.decode_until

    def counted(*args):
        state = go_on(*args)
        steps.append(int(state.step))
        return state

    monkeypatch.setattr(generation, "decode_until", counted)
    free = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0).tokens
    eos = free[1][4]
    found = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0, eos_id=eos)
    for whole, cut, ended in zip(free, found.tokens, found.ended, strict=True):
        assert ended == (eos in whole)
        assert cut == (whole[: whole.index(eos)] if eos in whole else whole)
    assert any(found.ended)
    assert steps == [12, 12]  # for there is one that did not end
    alone = generate(model, params, [PROMPTS[1]] * 4, 12, sampling=GREEDY, seed=0, eos_id=eos)
    assert alone.ended == (True,) * 4
    assert steps[-1] == len(alone.tokens[0]) + 1 < 12
    other = free[0][2]
    found = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0, eos_id=[eos, other])
    for whole, cut in zip(free, found.tokens, strict=True):
        ends = [whole.index(end) for end in (eos, other) if end in whole]
        assert cut == whole[: min(ends, default=None)]


def test_a_text_that_is_to_stop_is_made_no_longer(small, monkeypatch):
    model, params = small
    monkeypatch.setattr(generation, "STOP_CHECK_EVERY", 3)
    free = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0).tokens
    asked = []

    def stop(tokens):
        asked.append(len(tokens))
        return len(tokens) > 4

    found = generate(model, params, PROMPTS, 12, sampling=GREEDY, seed=0, stop=stop)
    assert asked == [1] * 4 + [4] * 4 + [7] * 4
    assert found.tokens == tuple(tokens[:7] for tokens in free)
    assert found.ended == (False,) * 4
    # One that never stops has the others go on with it.
    first = free[0]
    found = generate(
        model, params, PROMPTS, 12, sampling=GREEDY, seed=0, stop=lambda t: t != first[: len(t)]
    )
    assert found.tokens == free


def test_one_program_serves_prompts_of_many_lengths(small):
    model, params = small
    generate(model, params, [[1], [2]], 4, sampling=GREEDY, seed=0, eos_id=5)
    before = generation.begin._cache_size(), generation.decode_until._cache_size()
    for length in (2, 9, 31):
        generate(model, params, [[1] * length, [2]], 4, sampling=GREEDY, seed=length, eos_id=3)
    assert (generation.begin._cache_size(), generation.decode_until._cache_size()) == before


def test_a_prompt_may_fill_the_context(small):
    model, params = small
    prompt = list(np.arange(60) % VOCABULARY)
    assert len(generate(model, params, [prompt], 4, sampling=GREEDY, seed=0).tokens[0]) == 4
    with pytest.raises(InputError, match=r"60 tokens and 5 new tokens .* at most 4 new tokens"):
        generate(model, params, [prompt], 5, sampling=GREEDY, seed=0)


@pytest.mark.parametrize(
    ("prompts", "new", "sentence"),
    [
        ([], 4, "no prompt"),
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1], [VOCABULARY]], 4, "prompt 1 has token ids .* vocabulary of 17"),
        ([[1]], 0, "max_new_tokens must be .* got 0"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(small, prompts, new, sentence):
    model, params = small
    with pytest.raises(InputError, match=sentence):
        generate(model, params, prompts, new, sampling=GREEDY, seed=0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be .* got 0.0"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"top_k": 0}, "top_k must be .* got 0"),
        ({"top_p": 0.0}, "top_p must be .* got 0.0"),
        ({"top_p": 1.5}, "top_p must be .* got 1.5"),
        ({"greedy": True, "top_k": 3}, "greedy decoding does not sample"),
        ({"greedy": True, "temperature": 0.5}, "greedy decoding does not sample"),
    ],
)
def test_a_sampling_that_means_nothing_is_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Sampling(**values)


P = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


def tempered(temperature):
    p = P ** (1 / temperature)
    return p / p.sum()


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 3.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        # Of the three that top_k leaves, 0.4 + 0.3 of 0.85 are 0.82 of what is left.
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_k": 3, "top_p": 0.85}, [1, 3, 4]),
        # Made sharper first, the likeliest alone has 0.56.
        ({"temperature": 0.5, "top_p": 0.5}, [1]),
    ],
)
def test_draws_have_the_probabilities_they_should(values, allowed):
    sampling, draws = Sampling(**values), 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(P, jnp.float32)) + 3, (draws, len(P)))
    found = np.bincount(np.asarray(draw(logits, keys, sampling)), minlength=len(P)) / draws
    expected = np.where(np.isin(np.arange(len(P)), allowed), tempered(sampling.temperature), 0)
    expected /= expected.sum()
    assert set(np.flatnonzero(found)) <= set(allowed)
    # Four and a half standard deviations of a share among so many draws.
    np.testing.assert_array_less(
        np.abs(found - expected), 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9
    )


def test_of_equal_logits_exactly_k_may_be_drawn():
    keys = jax.random.split(jax.random.key(0), 2000)
    found = draw(jnp.zeros((2000, 6)), keys, Sampling(top_k=2))
    assert set(np.asarray(found).tolist()) == {0, 1}
    assert draw(jnp.zeros((3, 6)), keys[:3], GREEDY).tolist() == [0, 0, 0]


def test_bfloat16_generates(small):
    config = ModelConfig(layers=1, heads=2, width=16, context=64, dtype="bfloat16")
    model, params = built(config)
    found = generate(model, params, PROMPTS, 5, sampling=GREEDY, seed=0)
    assert [len(tokens) for tokens in found.tokens] == [5] * 4
