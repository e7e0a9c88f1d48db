"""Efficient reasoning: a reward for right answers that are short among the right ones.

Of a prompt's n sampled answers let C be the right ones, and m, s the mean and the population
standard deviation of their lengths (Arora and Zanette, 2502.04463;
https://github.com/Zanette-Labs/efficient-reasoning):

    r = 1 - alpha · sigmoid((length - m) / (s + 1e-7))  of a right answer,  0 of any other
    A_j = r_j - mean of r_k over k != j                 RLOO (Ahmadian et al., 2402.14740)
    loss = -mean of A_j log p(answer_j) + kl · mean of log p(answer_j) - log p_before(answer_j)

An answer that is cut off is not right. Of one right answer, or of equal lengths, s is 0 and r is
1 - alpha / 2. Where no answer is right, or all get the same, the advantages are 0.

`sums` is the task for a tiny model: add numbers modulo 10. Before its answer the model may write
tokens of work: the running sums, or fillers that say nothing (Pfau et al., 2404.15758).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.evaluation.token_losses import check_tokens

EQUALS, FILLER, END = 10, 11, 12
"""Tokens after the digits; END also pads."""
SYMBOLS = 13


@checked
def rewards(
    lengths: Int[Array, "P n"], right: Bool[Array, "P n"], alpha: float
) -> Float[Array, "P n"]:
    """Returns the reward of each answer to each prompt.

    Args:
        lengths: Number of tokens of each answer.
        right: Whether it is right, and ended by itself.
        alpha: Weight of the length, in [0, 1).

    Raises:
        InputError: If alpha is out of its range, or the shapes differ.

    >>> found = rewards(jnp.array([[100, 200, 300]]), jnp.ones((1, 3), bool), 0.2)
    >>> [f"{one:.4f}" for one in found[0]]
    ['0.9546', '0.9000', '0.8454']
    """
    if not 0 <= alpha < 1:
        raise InputError(f"alpha must be in [0, 1), got {alpha}")
    count = jnp.maximum(right.sum(-1, keepdims=True), 1)
    lengths = jnp.asarray(lengths, jnp.float32)
    mean = (lengths * right).sum(-1, keepdims=True) / count
    apart = (lengths - mean) * right
    spread = jnp.sqrt((apart**2).sum(-1, keepdims=True) / count)
    return right * (1 - alpha * jax.nn.sigmoid(apart / (spread + 1e-7)))


@checked
def advantages(found: Float[Array, "P n"]) -> Float[Array, "P n"]:
    """Returns each reward less the mean of the others of its prompt (RLOO).

    Args:
        found: Rewards.

    Raises:
        InputError: If there are fewer than two answers to a prompt.

    >>> advantages(jnp.array([[1.0, 0.0]])).tolist()
    [[1.0, -1.0]]
    """
    count = found.shape[-1]
    if count < 2:
        raise InputError(f"each prompt needs two or more answers to compare, got {count}")
    return (found - found.mean(-1, keepdims=True)) * (count / (count - 1))


@checked
def policy_loss(
    log_p: Float[Array, " N"],
    log_p_before: Float[Array, " N"],
    advantage: Float[Array, " N"],
    kl: float = 1e-3,
) -> Float[Array, ""]:
    """Returns the loss whose gradient is REINFORCE's, with the penalty on leaving the start.

    The penalty is Schulman's estimator r - 1 - log r of the divergence, r = p_before / p.

    Args:
        log_p: Log probability of each answer under the model that is trained.
        log_p_before: The same under the model that it was before.
        advantage: Advantage of each answer; a constant.
        kl: Weight of the penalty, 0 or more.

    Raises:
        InputError: If there is no answer, the shapes differ, or `kl` is below 0.
    """
    if not len(log_p):
        raise InputError("log_p must have at least one answer, got none")
    if not isinstance(kl, Tracer) and kl < 0:
        raise InputError(f"kl must be 0 or more, got {kl}")
    log_p, log_p_before, advantage = map(jnp.asarray, (log_p, log_p_before, advantage))
    apart = jax.lax.stop_gradient(log_p_before) - log_p
    gain = jax.lax.stop_gradient(advantage) * log_p
    return (-gain + kl * (jnp.exp(apart) - 1 - apart)).mean()


class Answers(NamedTuple):
    """Prompts with answers, and where the answers are.

    Attributes:
        tokens: Int32 (N, L), padded with END.
        written: Bool (N, L), the tokens of the answer, its END included.
    """

    tokens: np.ndarray
    written: np.ndarray


@checked
def sums(
    count: int, terms: int, *, work: Literal["sums", "filler"] = "sums", seed: int = 0
) -> Answers:
    """Returns sums with answers that have 0 to terms - 1 tokens of work, as many of each.

    A prompt is `terms` digits and EQUALS; an answer is work, the sum modulo 10, and END. The work
    "sums" is the sum of the first two, three, … numbers; the answer goes on from there.

    Args:
        count: Number of them.
        terms: Number of digits to add, two or more.
        work: "sums" or "filler".
        seed: Seed.

    Raises:
        InputError: If there is nothing to add.

    >>> made = sums(1, 3, seed=1)
    >>> made.tokens.shape, made.written.sum() >= 2
    ((1, 8), np.True_)
    """
    if not 2 <= terms <= 1000:
        raise InputError(f"terms must be between 2 and 1000 numbers to add, got {terms}")
    random = np.random.default_rng(seed)
    digits = random.integers(0, 10, (count, terms))
    running = digits.cumsum(1) % 10
    tokens = np.full((count, 2 * terms + 2), END, np.int32)
    tokens[:, :terms], tokens[:, terms] = digits, EQUALS
    amount = random.integers(0, terms, count)  # tokens of work
    place = np.arange(terms + 1)
    steps = np.concatenate([running[:, 1:], running[:, -1:], running[:, -1:]], axis=1)
    shown = steps if work == "sums" else np.full_like(steps, FILLER)
    answer = np.where(place < amount[:, None], shown, END)
    answer[np.arange(count), amount] = running[:, -1]
    tokens[:, terms + 1 :] = answer
    written = np.zeros(tokens.shape, bool)
    written[:, terms + 1 :] = place < amount[:, None] + 2
    return Answers(tokens, written)


@checked
def judged(
    prompts: Int[Array, "N P"], answers: Sequence[Sequence[int]], ended: Sequence[bool]
) -> tuple[Array, Array]:
    """Returns the number of tokens of each answer, and whether it is right.

    Args:
        prompts: Digits and EQUALS.
        answers: Tokens of each answer, without END.
        ended: Whether END followed.

    Raises:
        InputError: If there are not as many answers as prompts, or a prompt is none of `sums`.
    """
    _check_answers(prompts, answers, ended)
    digits = np.asarray(prompts, np.int64)
    if not (
        (digits[:, -1:] == EQUALS).all() and digits.shape[1] > 1 and _are_below(digits[:, :-1], 10)
    ):
        raise InputError(f"prompts must be digits and then EQUALS = {EQUALS}, as `sums` makes them")
    wanted = digits[:, :-1].sum(1) % 10
    lengths = np.array([len(one) for one in answers])
    right = [
        bool(done) and len(one) > 0 and one[-1] == sum_
        for one, done, sum_ in zip(answers, ended, wanted, strict=True)
    ]
    return jnp.asarray(lengths), jnp.asarray(right)


@checked
def joined(
    prompts: Int[Array, "N P"], answers: Sequence[Sequence[int]], ended: Sequence[bool], length: int
) -> Answers:
    """Returns prompts and answers in rows of a length, padded with END.

    Args:
        prompts: Prompts, all of one length.
        answers: Tokens of each answer, without END.
        ended: Whether END followed.
        length: Length of a row, prompt and answer.

    Raises:
        InputError: If an answer does not fit or has a token of another task, or there are not as
            many as prompts.
    """
    _check_answers(prompts, answers, ended)
    for one in (np.ravel(prompts), *answers):
        if not _are_below(one, SYMBOLS):
            raise InputError(f"tokens must be from 0 to {SYMBOLS - 1}, got {list(one)[:20]}")
    width = prompts.shape[1]
    least = width + max(len(one) + bool(done) for one, done in zip(answers, ended, strict=True))
    if not least <= length <= 2**16:
        raise InputError(f"length must be between {least} for these answers and 2^16, got {length}")
    tokens = np.full((len(prompts), length), END, np.int32)
    tokens[:, :width] = prompts
    written = np.zeros(tokens.shape, bool)
    for row, (one, done) in enumerate(zip(answers, ended, strict=True)):
        tokens[row, width : width + len(one)] = one
        written[row, width : width + len(one) + bool(done)] = True
    return Answers(tokens, written)


def _are_below(tokens: Any, symbols: int) -> bool:
    return not len(tokens) or bool(np.min(tokens) >= 0 and np.max(tokens) < symbols)


def _check_answers(prompts: Any, answers: Sequence[Any], ended: Sequence[bool]) -> None:
    if not 0 < len(prompts) == len(answers) == len(ended):
        raise InputError(
            f"each prompt needs one answer, got {len(prompts)} prompts, {len(answers)} answers and "
            f"{len(ended)} ends"
        )


@checked
def log_probability(model: Any, params: PyTree, rows: Answers) -> Float[Array, " N"]:
    """Returns the log probability of each answer after its prompt.

    Args:
        model: Decoder of tokens to logits.
        params: Its parameters.
        rows: Prompts with answers.

    Raises:
        InputError: If the two arrays of the rows have not one shape (N, L), or a token is none of
            the model's vocabulary.
    """
    if np.ndim(rows.tokens) != 2 or np.shape(rows.tokens) != np.shape(rows.written):
        raise InputError(
            "rows must have tokens and written of one shape (N, L), got "
            f"{np.shape(rows.tokens)} and {np.shape(rows.written)}"
        )
    if not isinstance(rows.tokens, Tracer) and np.size(rows.tokens):
        check_tokens(model, np.asarray(rows.tokens), "rows")
    tokens = jnp.asarray(rows.tokens)
    log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]))
    of_token = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    return (of_token * jnp.asarray(rows.written)[:, 1:]).sum(1)
