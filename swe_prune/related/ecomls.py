"""EcoMLS: switching between a model and its smaller versions while they serve.

After every request the current model's energy E and confidence c, both means of its last requests,
are looked at (Tedla et al., arXiv 2404.11411; https://github.com/sa4s-serc/EcoMLS). A model m has a
profile from before: the energy of a request, Ē = (lowest + highest) / 2, and a confidence c̄.

    analyze   go on as before unless  E (1 - c) > Ē (1 - c̄)  for the current model
    plan      with probability ε: any model
              else if E > 1.25 Ē: of the models with Ē_m < E and c - c̄_m <= 0.1, the one with the
                  least  min(Ē_m, E_m) (1 - c̄_m),  E_m being the mean energy of m's last requests
              else: of the models with c̄_m > c, the one with the least  Ē_m (1 - c̄_m)
    know      c̄ of the model that ran becomes c

Two rules differ from the published code, which cannot work as it stands: there the test against
1.25 Ē averages other columns, and the last rule starts from infinity and looks for a maximum, so it
never chooses.
"""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from swe_prune.arguments import checked
from swe_prune.errors import InputError

COSTLY = 1.25
"""Multiple of a model's profiled energy above which a cheaper model is looked for."""
TOLERANCE = 0.1
"""Confidence that a cheaper model may have less."""


@checked
@dataclasses.dataclass(frozen=True)
class Profile:
    """A model as it was measured before it serves.

    Attributes:
        low: Lowest energy of a request, J.
        high: Highest energy of a request, J.
        confidence: Mean confidence, in [0, 1], such as the mean probability of the chosen tokens.

    Raises:
        InputError: If the numbers are not in these ranges.
    """

    low: float
    high: float
    confidence: float

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.low <= self.high < np.inf:
            raise InputError(
                f"a profile must have 0 <= low <= high joules, got {self.low} and {self.high}"
            )
        if not 0 <= self.confidence <= 1:
            raise InputError(f"confidence must be between 0 and 1, got {self.confidence}")

    @property
    def joules(self) -> float:
        """Energy of a request, Ē."""
        return (self.low + self.high) / 2


@checked
class Switcher:
    """Chooses the model for the next request from what the last ones took.

    Attributes:
        current: Name of the model for the next request.
    """

    def __init__(
        self,
        profiles: Mapping[str, Profile],
        *,
        start: str | None = None,
        epsilon: float = 0.2,
        window: int = 10,
        seed: int = 0,
    ):
        """Starts with a model.

        Args:
            profiles: Profile of each model by name, at least two.
            start: Name of the first model. None: the first of the profiles.
            epsilon: Probability of a random model where a switch is due.
            window: Number of requests of a model that are averaged.
            seed: Seed of the random choices.

        Raises:
            InputError: If there are fewer than two models, or a setting is out of its range.
        """
        if len(profiles) < 2:
            raise InputError(f"switching needs at least two models, got {list(profiles)}")
        if start is not None and start not in profiles:
            raise InputError(f"start must be one of {', '.join(profiles)}, got {start!r}")
        if not 0 <= epsilon <= 1:
            raise InputError(f"epsilon must be between 0 and 1, got {epsilon}")
        self.current = next(iter(profiles)) if start is None else start
        self._profiles, self._epsilon = dict(profiles), epsilon
        self._confidence = {name: profile.confidence for name, profile in profiles.items()}
        self._joules = {name: collections.deque(maxlen=window) for name in profiles}
        self._recent = {name: collections.deque(maxlen=window) for name in profiles}
        self._random = np.random.default_rng(seed)

    @checked
    def observe(self, joules: float, confidence: float) -> str:
        """Takes in a request that the current model has served; returns the model for the next.

        Args:
            joules: Energy of the request.
            confidence: Confidence of the answer.

        Raises:
            InputError: If the energy is below 0, or the confidence not in [0, 1].
        """
        _check_served([joules], [confidence])
        name = self.current
        self._joules[name].append(joules)
        self._recent[name].append(confidence)
        energy, certain = map(statistics.fmean, (self._joules[name], self._recent[name]))
        worse = energy * (1 - certain) > self._score(name)
        self._confidence[name] = certain
        if worse:
            self.current = self._plan(name, energy, certain)
        return self.current

    def _plan(self, name: str, energy: float, certain: float) -> str:
        if self._random.random() < self._epsilon:
            return str(self._random.choice(list(self._profiles)))
        if energy > COSTLY * self._profiles[name].joules:
            found = {
                other: min([profile.joules, *self._mean(other)]) * (1 - self._confidence[other])
                for other, profile in self._profiles.items()
                if profile.joules < energy and certain - self._confidence[other] <= TOLERANCE
            }
        else:
            found = {
                other: self._score(other)
                for other in self._profiles
                if self._confidence[other] > certain
            }
        return min(found, key=found.__getitem__) if found else name

    def _score(self, name: str) -> float:
        return self._profiles[name].joules * (1 - self._confidence[name])

    def _mean(self, name: str) -> list[float]:
        return [statistics.fmean(self._joules[name])] if self._joules[name] else []


@checked
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one model took and gave for each of the same requests.

    Attributes:
        joules: Energy of each request.
        confidence: Confidence of each answer.
        quality: Quality of each answer, the higher the better.

    Raises:
        InputError: If an energy is below 0, or a confidence not in [0, 1].
    """

    joules: Sequence[float]
    confidence: Sequence[float]
    quality: Sequence[float]

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _check_served(self.joules, self.confidence)


def _check_served(joules: Sequence[float], confidence: Sequence[float]) -> None:
    if any(one < 0 for one in joules):
        raise InputError(f"joules must be 0 or more, got {min(joules)}")
    if any(not 0 <= one <= 1 for one in confidence):
        raise InputError(
            f"confidence must be between 0 and 1, got {min(confidence)} to {max(confidence)}"
        )


@dataclasses.dataclass(frozen=True)
class Served:
    """What a way of choosing models took and gave.

    Attributes:
        joules: Mean energy of a request.
        quality: Mean quality of an answer.
        shares: Share of the requests by model.
    """

    joules: float
    quality: float
    shares: Mapping[str, float]


@checked
def serve(traces: Mapping[str, Trace], choose: Callable[[float, float], str], first: str) -> Served:
    """Returns what serving recorded requests in order takes and gives.

    Args:
        traces: Trace of each model by name, of the same requests.
        choose: Function from the energy and confidence of the last request to the next model, such
            as `Switcher.observe`.
        first: Model of the first request.

    Raises:
        InputError: If the traces are empty or of different lengths, or `choose` names no trace.
    """
    lengths = {len(getattr(t, f.name)) for t in traces.values() for f in dataclasses.fields(t)}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(
            f"all traces must be of the same requests, at least one, got lengths {sorted(lengths)}"
        )
    name, used, joules, quality = first, collections.Counter(), [], []
    for request in range(lengths.pop()):
        if name not in traces:
            raise InputError(f"no trace of model {name!r}; give one of each model")
        trace = traces[name]
        used[name] += 1
        joules.append(trace.joules[request])
        quality.append(trace.quality[request])
        name = choose(trace.joules[request], trace.confidence[request])
    shares = {name: used[name] / len(joules) for name in traces}
    return Served(statistics.fmean(joules), statistics.fmean(quality), shares)


@checked
def coin(alone: Sequence[Served], joules: float) -> float:
    """Returns the quality of choosing between models by a coin, at the same energy.

    Args:
        alone: What each model takes and gives when it serves every request.
        joules: Mean energy of a request.

    Returns:
        Mean quality of the best mixture of one or two models that takes at most `joules`; NaN if
        every model takes more.

    >>> coin([Served(1.0, 0.0, {}), Served(3.0, 1.0, {})], 2.0)
    0.5
    """
    found = [one.quality for one in alone if one.joules <= joules]
    for low, high in itertools.permutations(alone, 2):
        if low.joules <= joules < high.joules:
            part = (joules - low.joules) / (high.joules - low.joules)
            found.append((1 - part) * low.quality + part * high.quality)
    return max(found, default=math.nan)


def _any(random: np.random.Generator, names: Sequence[str], *_: float) -> str:
    return str(random.choice(names))


@checked
def compare(
    traces: Mapping[str, Trace],
    profiles: Mapping[str, Profile],
    *,
    epsilons: Sequence[float] = (0.2, 0.3, 0.4),
    window: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, list[Served]]:
    """Returns EcoMLS by ε, each model alone, and random switching, one result per seed.

    Args:
        traces: Trace of each model by name, of the same requests; the first is the one to begin
            with.
        profiles: Profile of each model, measured on other requests.
        epsilons: Probabilities of a random model.
        window: Number of requests that are averaged.
        seeds: Seeds of the random choices.

    Raises:
        InputError: Errors of `Switcher` and `serve`, or if there are no seeds or probabilities, or
            one is given twice.
    """
    for what, given in (("epsilons", [f"{one:g}" for one in epsilons]), ("seeds", list(seeds))):
        if not given or len(set(given)) < len(given):
            raise InputError(f"{what} must be one or more different numbers, got {given}")
    if not traces:
        raise InputError("traces must have at least one model, got none")
    first = next(iter(traces))
    found: dict[str, list[Served]] = {}
    for epsilon in epsilons:
        for seed in seeds:
            switcher = Switcher(profiles, start=first, epsilon=epsilon, window=window, seed=seed)
            found.setdefault(f"EcoMLS, ε = {epsilon:g}", []).append(
                serve(traces, switcher.observe, first)
            )
    for name in traces:
        found[f"always {name}"] = [serve(traces, lambda *_, name=name: name, name)]
    for seed in seeds:
        random, names = np.random.default_rng(seed), list(traces)
        found.setdefault("random", []).append(
            serve(traces, functools.partial(_any, random, names), _any(random, names))
        )
    return found
