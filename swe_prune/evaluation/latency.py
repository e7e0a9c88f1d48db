"""Latency of decoders: the programs that `generate` runs, those of several models in turns.

    loads = {name: latency.compiled(model, params, Workload(batch=1)) for name, … in models}
    times = latency.alternating(loads, runs=50)                # per name: prefill, decode
    times["cut"][1].ratio(times["dense"][1])                   # quartiles of the paired ratios

A run of one model is followed by a run of the next, and every other round goes backward, so that a
busy machine slows all of them alike. On a shared machine only the ratios mean anything.

Source: 2406.17749 (the protocol: warm-up, waiting for the device, at least 50 runs, median and 95th
percentile, batch 1).
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import generation
from swe_prune.evaluation.sampling import GREEDY
from swe_prune.evaluation.token_losses import context_of
from swe_prune.models import gpt, phi3v

NO_END = np.array([-1], np.int32)  # no token, so every text runs to its full length
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one run computes.

    Attributes:
        batch: Number of texts.
        prompt: Tokens of each prompt, which the prefill takes.
        new: Tokens of each text that are decoded one by one, after the one of the prefill.
        crops: Crops of the picture that each prompt begins with, next to its global view; 0: no
            picture.
    """

    batch: int = 1
    prompt: int = 128
    new: int = 32
    crops: int = 0

    def check(self, context: int | None = None) -> None:
        """Raises InputError if a number is below 1, or the texts exceed the context."""
        for name, flag in (("batch", "batch"), ("prompt", "prompt-tokens"), ("new", "new-tokens")):
            if getattr(self, name) < 1:
                raise InputError(f"--{flag} must be 1 or more, got {getattr(self, name)}")
        tokens = self.batch * (self.prompt + self.new)
        if tokens >= 2**31:
            raise InputError(
                f"{tokens:,} tokens at once are more than the arrays' 2^31; lower --batch"
            )
        # The prefill's own new token counts, too.
        if context is not None and self.prompt + self.new + 1 > context:
            raise InputError(
                f"a prompt of {self.prompt} tokens and {self.new + 1} new ones exceed the model's "
                f"context of {context}; lower --prompt-tokens or --new-tokens"
            )


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each run, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """95th percentile of the seconds, interpolated."""
        return float(np.percentile(self.seconds, 95))

    def ratio(self, base: "Times") -> tuple[float, float, float]:
        """Returns the quartiles of the ratios to the run of `base` in the same round.

        >>> Times((1.0, 2.0, 6.0)).ratio(Times((2.0, 4.0, 6.0)))
        (0.5, 0.5, 0.75)
        """
        ratios = np.divide(self.seconds, base.seconds)
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        return low, middle, high


def alternating(
    works: Mapping[str, Callable[[], Sequence[float]]], runs: int, warmup: int = 2
) -> dict[str, tuple[Times, ...]]:
    """Runs each work in turns, forward and backward, and returns the times of each of its parts.

    Args:
        works: Functions that time themselves, and return the seconds of each of their parts.
        runs: Number of rounds that are counted.
        warmup: Number of rounds before them.

    Raises:
        InputError: If runs is below 1 or warmup below 0, or a device runs out of memory.
    """
    check_rounds(runs, warmup)
    found: dict[str, list[Sequence[float]]] = {name: [] for name in works}
    for number in range(-warmup, runs):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            with _within_memory(name):
                parts = works[name]()
            if number >= 0:
                found[name].append(parts)
    return {
        name: tuple(Times(tuple(part)) for part in zip(*rounds, strict=True))
        for name, rounds in found.items()
    }


def check_rounds(runs: int, warmup: int) -> None:
    """Raises InputError if runs is below 1, or warmup below 0."""
    for name, value, least in (("runs", runs, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"--{name} must be {least} or more, got {value}")


def timed(run: Callable[..., Any], *arguments: Any) -> Callable[[], tuple[float]]:
    """Returns a work for `alternating` that calls a function and waits for its result."""

    def work() -> tuple[float]:
        begun = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return (time.perf_counter() - begun,)

    return work


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Prefill and decoding of a model for one workload, compiled; a work for `alternating`.

    Attributes:
        load: What a run computes.
        peak_bytes: Memory that the larger program needs by the compiler's count: parameters, KV
            cache, results and temporaries.
    """

    load: Workload
    peak_bytes: int
    _prefill: Callable[[], Any] = dataclasses.field(repr=False)
    _decode: Callable[[Any], Any] = dataclasses.field(repr=False)

    def __call__(self) -> tuple[float, float]:
        """Returns the seconds of the prefill, and of decoding all new tokens."""
        begun = time.perf_counter()
        state = jax.block_until_ready(self._prefill())
        between = time.perf_counter()
        jax.block_until_ready(self._decode(state))
        return between - begun, time.perf_counter() - between

    def tokens(self) -> int:
        """Runs once; returns the tokens of prompts and answers, a work for `ledger.windows`."""
        self()
        return self.load.batch * (self.load.prompt + self.load.new)


def compiled(model: Any, params: PyTree, load: Workload, name: str = "model") -> Compiled:
    """Compiles what `generate` runs, for random tokens, after checking that its memory is free.

    Args:
        model: Decoder from `models.gpt`, or a model of images and text from `models.phi3v`.
        params: Parameters of the model.
        load: What a run computes.
        name: Name of the model, for errors.

    Raises:
        InputError: If the workload exceeds the context, has no room for its pictures, or needs more
            memory than is free.
    """
    load.check(context_of(model))
    shape = (load.batch, load.prompt)
    prompts_BxL = np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int32)
    pictures = _pictures(model, load, prompts_BxL) if load.crops else None
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    valid = jax.ShapeDtypeStruct(shape, bool)
    key, until = jax.random.key(0), jnp.int32(load.new + 1)
    # 1. Compile both programs from shapes; those of the state come from the first.
    with _within_memory(name):
        first = generation.begin.lower(
            model, GREEDY, load.new + 1, params, tokens, valid, key, NO_END, pictures
        )
        state = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), first.out_info)
        second = generation.decode_until.lower(model, GREEDY, params, state, key, NO_END, until)
        prefill, decode = first.compile(), second.compile()
    # 2. Hold their memory against what is free before any is taken: a CPU would not refuse.
    peak = max(_bytes_of(prefill), _bytes_of(decode))
    more, free = peak - sum(leaf.nbytes for leaf in jax.tree.leaves(params)), free_bytes()
    if free is not None and more > free:
        raise InputError(
            f"{name} at batch {load.batch} needs {more / 2**30:,.1f} GiB beside its weights, and "
            f"{free / 2**30:,.1f} GiB are free; lower --batch or --prompt-tokens"
        )
    # 3. Prepare a run.
    given = params, prompts_BxL, np.ones(shape, bool), key, NO_END, pictures
    return Compiled(
        load,
        peak,
        functools.partial(prefill, *given),
        lambda state: decode(params, state, key, NO_END, until),
    )


def _pictures(model: Any, load: Workload, prompts_BxL: np.ndarray) -> dict[str, Any]:
    """Returns black pictures, and puts their places at the beginning of the prompts."""
    count = model.config.vision.tokens(1, load.crops)
    if load.prompt <= count:
        raise InputError(
            f"a prompt of {load.prompt} tokens has no room for the {count} of its picture and a "
            "word; raise its tokens, or lower the crops"
        )
    prompts_BxL[:, :count] = phi3v.IMAGE_TOKEN
    zeros = phi3v.example(model.config, load.prompt, load.batch, load.crops)
    return {name: np.asarray(zeros[name]) for name in ("pixels", "grid")}


def decode_seconds(
    vocab_size: int, load: Workload | None = None, *, runs: int = 5
) -> Callable[[ModelConfig], float]:
    """Returns a function from a config to the median seconds of decoding one token of its model.

    The weights are zeros, since the time does not depend on them. Each config is measured once, so
    the function serves as the measure of a latency budget.

    Args:
        vocab_size: Size V of the vocabulary.
        load: What a run computes. If None, the default `Workload`.
        runs: Number of runs.

    >>> from swe_prune.config import ModelConfig
    >>> seconds = decode_seconds(7, Workload(prompt=4, new=4), runs=1)
    >>> seconds(ModelConfig(layers=1, heads=1, width=8, context=16)) > 0
    True
    """
    load = load or Workload()

    @functools.cache
    def measure(config: ModelConfig) -> float:
        model = gpt.build(config, vocab_size)
        work = compiled(model, gpt.fuse(zeros(model)), load)
        return alternating({"model": work}, runs)["model"][1].median / load.new

    return measure


def zeros(model: Any) -> PyTree:
    """Returns parameters of a decoder that are all 0, float32."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes["params"])


def nonzero(params: PyTree) -> int:
    """Returns the number of parameters that are not 0.

    >>> nonzero({"kernel": jnp.asarray([0.0, -0.0, 2.0])})
    1
    """
    return sum(int(jnp.count_nonzero(leaf)) for _, leaf in tree.named_leaves(params))


def free_bytes() -> int | None:
    """Returns the memory that is free on the first device, or None if the system does not tell."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() != "cpu":
        return None
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    return None


def _bytes_of(program: Any) -> int:
    m = program.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return int(whole - m.alias_size_in_bytes)


@contextlib.contextmanager
def _within_memory(name: str) -> Iterator[None]:
    """Turns a device's out-of-memory error into a sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise InputError(
            f"{name} does not fit the memory of {jax.devices()[0].device_kind}; lower --batch or "
            "--prompt-tokens, or give one model at a time"
        ) from None
