"""The three questions that EleutherAI's lm-evaluation-harness asks of a model.

    lm = harness(model, params, tokenizer, batch=8, add_bos=False)
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

`Answers` answers them and needs no lm_eval; `harness` makes an `lm_eval.api.model.LM` of it. Texts
are cut into tokens and windows as its own Hugging Face model does, so that the figures compare.

Source: https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13, api/model.py (TemplateLM),
utils.py (get_rolling_token_windows), models/huggingface.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import PyTree

from swe_prune.data.dataset import Tokenizer
from swe_prune.errors import InputError
from swe_prune.evaluation.generation import generate
from swe_prune.evaluation.sampling import GREEDY, Sampling
from swe_prune.evaluation.token_losses import bucket, context_of, token_losses
from swe_prune.runtime.packages import require

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks give to the number of new tokens; the first that is given counts."""
GENERATION_KEYS = (*LENGTH_KEYS, "until", "do_sample", "temperature", "top_k", "top_p")

Scored = tuple[list[int], int]
"""Tokens, and how many of them, from the end, are scored given those before."""


class HarnessTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows its special tokens; `interop.PretrainedTokenizer` is one."""

    bos_id: int | None

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text."""
        ...


def harness(model: Any, params: PyTree, tokenizer: HarnessTokenizer, **settings: Any) -> Any:
    """Returns an `lm_eval.api.model.LM`; the arguments are those of `Answers`.

    Raises:
        InputError: `lm_eval` is not installed, or as `Answers`.
    """
    base = require("lm_eval.api.model", "evaluating with lm_eval", "lm-eval").LM
    kind = type("SwePruneLM", (Answers, base), {"__doc__": Answers.__doc__})
    return kind(model, params, tokenizer, **settings)


class Answers:
    """A model that answers `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

    A request is anything with `args`. The requests are sorted by length and run in batches of one
    size, padded to few lengths, so that few programs are compiled.

    Attributes:
        model: Model of `models.gpt`.
        params: Weights of the model.
        tokenizer: Tokenizer of the model.
        batch: Number of sequences at a time.
        add_bos: Whether texts begin with the tokenizer's bos_id, as for Llama; not for GPT-2.
        max_length: Maximum number of tokens that the model is given.
        max_new_tokens: Maximum number of tokens of an answer, where the task says nothing.
        seed: Seed of the random draws, where a task samples.
        prefix: Token before a text that has no context: bos_id, or eos_id where there is none.
        ends: Tokens that end an answer: the tokenizer's eos_ids, or its eos_id.
    """

    def __init__(
        self,
        model: Any,
        params: PyTree,
        tokenizer: HarnessTokenizer,
        *,
        batch: int,
        add_bos: bool,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        prefix = eos if bos is None else bos
        context = context_of(model)
        max_length = context if max_length is None else max_length
        if prefix is None or (add_bos and bos is None):
            raise InputError(
                f"the tokenizer has no token that {'begins' if add_bos else 'begins or ends'} a "
                "text, which has to stand before one without context; give a tokenizer with "
                f"{'bos_id' if add_bos else 'bos_id or eos_id'}"
            )
        if batch < 1:
            raise InputError(f"batch = {batch} sequences at a time cannot be run; give 1 or more")
        if max_length is None or max_length < 2 or (context is not None and max_length > context):
            raise InputError(
                f"max_length = {max_length} tokens cannot be given to a model with a context of "
                f"{context}; give from 2 to so many"
            )
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch, self.add_bos, self.seed = batch, add_bos, seed
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.prefix: int = prefix
        self.ends = tuple(getattr(tokenizer, "eos_ids", () if eos is None else (eos,)))

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one.

        Args:
            requests: Requests with args (context, continuation). Both are encoded as one text, and
                what exceeds the tokens of the context is the continuation; white space that ends
                the context is counted to it. From the left of what is too long, context is dropped.
            disable_tqdm: Ignored; part of lm_eval's interface. No progress is shown.

        Raises:
            InputError: A continuation without tokens or longer than the context of the model.
        """
        pairs = [self._pair(*request.args) for request in requests]
        answers = self._scored(pairs)
        self._remember("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each whole text, in windows that score each token once.

        Args:
            requests: Requests with args (text,).
            disable_tqdm: Ignored; part of lm_eval's interface. No progress is shown.
        """
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            of_text = list(rolling_windows(self._ids(text), self.prefix, self.max_length))
            windows += of_text
            owners += [number] * len(of_text)
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._scored(windows), strict=True):
            sums[owner] += log_p
        self._remember("loglikelihood_rolling", requests, sums)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model makes of each context, cut before the first stop string.

        Args:
            requests: Requests with args (context, settings); the settings are `until`,
                `max_gen_toks` or one of its other names, `do_sample`, `temperature`, `top_k` and
                `top_p`. Without do_sample and a temperature above 0 the decoding is greedy.
            disable_tqdm: Ignored; part of lm_eval's interface. No progress is shown.

        Raises:
            InputError: A setting that is not supported, or more new tokens than the context.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for key, numbers in alike.items():
            found = self._generated([requests[n].args[0] for n in numbers], json.loads(key))
            for number, text in zip(numbers, found, strict=True):
                answers[number] = text
        self._remember("generate_until", requests, answers)
        return answers

    def _ids(self, text: str) -> list[int]:
        return np.asarray(self.tokenizer.encode(text)).tolist()

    def _pair(self, context: str, continuation: str) -> Scored:
        """Returns the tokens of both, and how many of them are the continuation's."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        ids = self._ids(kept + continuation)
        count = len(ids) - (len(self._ids(kept)) if kept else 0)
        if kept and self.add_bos:
            ids = [self.prefix, *ids]
        if not kept and ids[:1] == [self.prefix]:
            count -= 1  # the continuation brings the first token itself
        elif count == len(ids):
            ids = [self.prefix, *ids]
        if not 1 <= count <= self.max_length:
            raise InputError(
                f"the continuation {continuation[:40]!r} has {count} tokens after its context; "
                f"give one of 1 to {self.max_length}, the most that the model is given at once"
            )
        return ids, count

    def _scored(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Returns the log-probability of the scored tokens, and whether each was the likeliest."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for numbers in self._batches([len(tokens) for tokens, _ in rows]):
            kept = [rows[n][0][-(self.max_length + 1) :] for n in numbers]
            longest = max(map(len, kept)) - 1
            filled = np.zeros((self.batch, bucket(longest, self.max_length) + 1), np.int32)
            for row, tokens in zip(filled, kept, strict=False):
                row[: len(tokens)] = tokens
            found = token_losses(self.model, self.params, filled[:, :-1], filled[:, 1:])
            losses, likeliest = jax.device_get(found)
            for row, (number, tokens) in enumerate(zip(numbers, kept, strict=True)):
                scored = slice(len(tokens) - 1 - rows[number][1], len(tokens) - 1)
                log_p = -float(losses[row, scored].sum(dtype=np.float64))
                answers[number] = log_p, bool(likeliest[row, scored].all())
        return answers

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """Returns the answers to contexts that all have these settings."""
        unknown = sorted(set(settings) - set(GENERATION_KEYS))
        if unknown:
            raise InputError(
                f"the generation setting {unknown[0]!r} is not supported; leave it out of the "
                f"task's generation_kwargs. Supported: {', '.join(GENERATION_KEYS)}"
            )
        given = [settings[key] for key in LENGTH_KEYS if settings.get(key) is not None]
        new = int(given[0]) if given else self.max_new_tokens
        if new >= self.max_length:
            raise InputError(
                f"{new} new tokens leave no room for a prompt among the {self.max_length} that the "
                "model is given; lower max_gen_toks of the task, or max_new_tokens"
            )
        until = settings.get("until") or []
        until = [term for term in ([until] if isinstance(until, str) else until) if term]

        def stop(tokens: Sequence[int]) -> bool:
            return any(term in self.tokenizer.decode(list(tokens)) for term in until)

        first = [self.prefix] * self.add_bos
        prompts = [(first + self._ids(text))[-(self.max_length - new) :] for text in contexts]
        prompts = [prompt or [self.prefix] for prompt in prompts]
        answers = [""] * len(prompts)
        for batch, numbers in enumerate(self._batches([len(prompt) for prompt in prompts])):
            rows = [prompts[n] for n in numbers]
            found = generate(
                self.model,
                self.params,
                rows + rows[-1:] * (self.batch - len(rows)),
                new,
                sampling=_sampling(settings),
                seed=self.seed + batch,
                eos_id=self.ends,
                stop=stop if until else None,
            )
            for number, tokens in zip(numbers, found.tokens, strict=False):
                text = self.tokenizer.decode(list(tokens))
                for term in until:
                    text = text.split(term)[0]
                answers[number] = text
        return answers

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yields the numbers of the rows of each batch, the longest first."""
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        for at in range(0, len(order), self.batch):
            yield order[at : at + self.batch]

    def _remember(self, question: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        """Tells lm_eval's cache, where there is one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            for request, answer in zip(requests, answers, strict=True):
                hook.add_partial(question, request.args, answer)


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Scored]:
    """Yields the windows of a text that score each token once.

    The first follows `prefix`. The later ones score max_length more tokens each, after the one
    before them; the last is as long as the others and scores what is left.

    >>> list(rolling_windows([1, 2, 3, 4, 5, 6], 0, 4))
    [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2)]
    """
    tokens = list(tokens)
    done = min(max_length, len(tokens))
    if tokens:
        yield [prefix, *tokens[:done]], done
    while done < len(tokens):
        count = min(len(tokens) - done, max_length)
        done += count
        yield tokens[done - max_length - 1 : done], count


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Returns how tokens are chosen; a temperature above 0 means sampling unless it is denied."""
    temperature = settings.get("temperature")
    wanted = settings.get("do_sample")
    if not (bool(temperature) if wanted is None else wanted):
        return GREEDY
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=settings.get("top_k") or None,
        top_p=settings.get("top_p"),
    )
