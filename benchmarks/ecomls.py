"""EcoMLS on real generations of SmolLM2 and its cuts; `benchmarks/related.py ecomls` runs it.

A request is a prompt of held-out text and its greedy continuation, measured by the ledger's meters,
the models in turns. Confidence is the mean probability of the tokens that were generated. Quality
is the mean log probability that the model gives to the tokens that really follow the prompt. The
traces are served again by every way of choosing, and once more for real by the switcher with the
first ε, so that simulation and run can be compared.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from swe_prune import calibration, data, interop, ledger, structured
from swe_prune.evaluation import generate
from swe_prune.evaluation.sampling import GREEDY
from swe_prune.evaluation.token_losses import token_losses
from swe_prune.models import gpt
from swe_prune.related import ecomls
from swe_prune.structured import activations
from swe_prune.structured.refit import refit

Served = dict[str, float]
Serve = Callable[[np.ndarray], Served]


def run(given: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the profiles, the traces, and what each way of choosing took and gave."""
    model = interop.load(given.model, dtype="float32")
    assert model.tokenizer is not None
    text, train = (data.read_named(one) for one in (given.text, given.calibration))
    data.check_disjoint(train, text)
    encode = model.tokenizer.encode
    models = cuts(model, np.asarray(encode(train[:500_000])), given)
    say(f"{', '.join(models)}: ready")
    meters = ledger.Ledger().meters
    serving = {name: server(*one, given, meters) for name, one in models.items()}
    prompts = requests(np.asarray(encode(text[:400_000])), given)
    for serve in serving.values():
        serve(prompts[0])  # compiles
    # 1. Every model on every request, in turns, forward and backward.
    found: dict[str, list[Served]] = {name: [] for name in serving}
    for number, prompt in enumerate(prompts):
        for name in list(serving)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(serving[name](prompt))
        if number % 10 == 9:
            say(f"{number + 1} of {len(prompts)} requests")
    profiles = {name: profile(some[: given.profiled]) for name, some in found.items()}
    traces = {name: trace(some[given.profiled :]) for name, some in found.items()}
    ways = ecomls.compare(
        traces, profiles, epsilons=given.epsilons, window=given.window, seeds=given.seeds
    )
    # 2. The switcher for real.
    first, seed = given.epsilons[0], given.seeds[0]
    live = live_run(serving, profiles, prompts[given.profiled :], first, seed, given)
    return {
        "source": "+".join(dict.fromkeys(meter.source for meter in meters)),
        "profiles": {name: dataclasses.asdict(one) for name, one in profiles.items()},
        "traces": {name: dataclasses.asdict(one) for name, one in traces.items()},
        "ways": {name: [dataclasses.asdict(o) for o in some] for name, some in ways.items()},
        "live": {"epsilon": first, "seed": seed, **dataclasses.asdict(live)},
    }


def cuts(model: interop.Pretrained, tokens: np.ndarray, given: Any) -> dict[str, tuple[Any, Any]]:
    """Returns (module, parameters) of the dense model and of its cuts, refitted."""
    groups = structured.groups(model.config, "neurons")
    module = gpt.build(model.config, model.vocab_size)
    rules = [f"^{re.escape(n)}$" for n in activations.readers(groups, model.params).values()]
    batches = data.random_batches(
        tokens, context=given.length, windows=given.calibration_windows, batch=4, seed=0
    )
    moments = calibration.moments(module, model.params, batches, leaves=rules, gram=True)
    scores = activations.activation_scores(groups, model.params, "input_norm_product", moments)
    found = {"dense": (module, model.params)}
    for share in given.shares:
        keep = structured.choose(groups, scores, sparsity=share)
        fitted, _ = refit(model.params, groups, keep, moments)
        small = gpt.build(structured.cut_config(model.config, keep), model.vocab_size)
        found[f"cut {share:.0%}"] = (small, structured.cut(fitted, groups, keep))
    return found


def requests(tokens: np.ndarray, given: Any) -> list[np.ndarray]:
    """Returns windows of a prompt and what follows it, spread over the text."""
    length, count = given.prompt + given.new, given.requests + given.profiled
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    windows = [tokens[start : start + length] for start in starts]
    order = np.random.default_rng(0).permutation(count)  # so that profiles are of all the text
    return [windows[one] for one in order]


def server(module: Any, params: Any, given: Any, meters: Any) -> Serve:
    """Returns a function that serves one request."""

    def losses(tokens: np.ndarray) -> np.ndarray:
        row = jnp.asarray(tokens, jnp.int32)[None]
        found, _ = token_losses(module, params, row[:, :-1], row[:, 1:])
        return np.asarray(found)[0, given.prompt - 1 :]

    def serve(window: np.ndarray) -> Served:
        prompt = window[: given.prompt]
        before = [meter.poll().value for meter in meters]
        made = generate(module, params, [prompt.tolist()], given.new, sampling=GREEDY, seed=0)
        after = [meter.poll().value for meter in meters]
        # What follows is read off the logits in a server, so its energy does not count.
        return {
            "joules": sum(after) - sum(before),
            "confidence": float(np.exp(-losses(np.append(prompt, made.tokens[0]))).mean()),
            "quality": float(-losses(window).mean()),
        }

    return serve


def profile(found: list[Served]) -> ecomls.Profile:
    """Returns a model's profile from requests of its own."""
    joules = [one["joules"] for one in found]
    certain = statistics.fmean(one["confidence"] for one in found)
    return ecomls.Profile(min(joules), max(joules), certain)


def trace(found: list[Served]) -> ecomls.Trace:
    """Returns a model's trace."""
    return ecomls.Trace(
        *([one[name] for one in found] for name in ("joules", "confidence", "quality"))
    )


def live_run(
    serving: dict[str, Serve],
    profiles: dict[str, ecomls.Profile],
    prompts: list[np.ndarray],
    epsilon: float,
    seed: int,
    given: Any,
) -> ecomls.Served:
    """Returns what the switcher takes and gives while it serves."""
    switcher = ecomls.Switcher(profiles, epsilon=epsilon, window=given.window, seed=seed)
    served, used = [], []
    for prompt in prompts:
        used.append(switcher.current)
        served.append(serving[switcher.current](prompt))
        switcher.observe(served[-1]["joules"], served[-1]["confidence"])
    return ecomls.Served(
        statistics.fmean(one["joules"] for one in served),
        statistics.fmean(one["quality"] for one in served),
        {name: used.count(name) / len(used) for name in serving},
    )


def table(found: dict[str, Any]) -> Table:
    """Returns energy and quality by way of choosing, the mean and range over the seeds.

    "Coin" is the quality of the best random mixture of two models that takes the same energy.
    """
    names = list(found["traces"])
    alone = [ecomls.Served(**found["ways"][f"always {name}"][0]) for name in names]
    made = Table(
        "way", "J a request", "quality, nats a token", "coin", *(f"{name}, %" for name in names),
        title=f"energy: {found['source']}",
    )  # fmt: skip
    live = found["live"]
    ways = found["ways"] | {f"EcoMLS, ε = {live['epsilon']:g}, for real": [live]}
    for way, some in ways.items():
        made.add_row(
            way,
            spread([one["joules"] for one in some], 2),
            spread([one["quality"] for one in some], 3),
            spread([ecomls.coin(alone, one["joules"]) for one in some], 3),
            *(spread([100 * one["shares"][name] for one in some], 0) for name in names),
        )
    return made


def spread(values: list[float], digits: int) -> str:
    """Returns the mean, with the range of several.

    >>> spread([1.0, 2.0], 1), spread([1.0], 0)
    ('1.5 (1.0 to 2.0)', '1')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
