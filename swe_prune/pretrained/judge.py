"""What a model lost: perplexity, distance from the dense one, and what both of them write."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import PyTree
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swe_prune import interop
from swe_prune.errors import visible
from swe_prune.evaluation import (
    GREEDY,
    Distance,
    PerplexityResult,
    Protocol,
    generate,
    generation,
    kl_to_dense,
    perplexity,
    protocols,
    scored_windows,
)
from swe_prune.evaluation.repetition import mean_repetition
from swe_prune.models import phi3v
from swe_prune.pretrained.settings import JudgingSettings
from swe_prune.pretrained.texts import Text
from swe_prune.training.progress import print_line

WORSE = 0.005
"""Nats per token by which a text must get worse to be called so, 0.5 % of its perplexity."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one model is worth.

    Attributes:
        perplexity: Perplexity of the evaluation text.
        written: Continuation of each prompt.
        repetition: Share of the continuations' 3-grams that occurred before, mean over the prompts.
        distance: Distance from the dense model; None for itself.
    """

    perplexity: PerplexityResult
    written: tuple[str, ...]
    repetition: float
    distance: Distance | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns plain values for pruning.json."""
        found = self.perplexity
        values: dict[str, Any] = {
            "protocol": dataclasses.asdict(found.protocol),
            "perplexity": found.perplexity,
            "nats_per_token": found.nats_per_token,
            "standard_error": found.standard_error,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens,
            "written": list(self.written),
            "repetition": self.repetition,
        }
        if self.distance is not None:
            values["kl_to_dense"] = self.distance.nats_per_token
            values["agreement"] = self.distance.agreement
        return values


def protocol_of(
    model: interop.Pretrained | interop.PretrainedSource, settings: JudgingSettings
) -> Protocol:
    """Returns the protocol, its window no longer than the model's context; its name says so.

    Raises:
        InputError: An unknown name, or a window that cannot be.
    """
    known = protocols.get(settings.protocol)
    window = settings.window or min(known.window, model.config.context)
    # A text begins as the tokenizer has it begin; some only end it with a token.
    tokenizer = model.tokenizer
    around = [] if tokenizer is None else tokenizer.encode("", template=True).tolist()
    ends = () if tokenizer is None else {*tokenizer.eos_ids} - {tokenizer.bos_id}
    begins = None if around and around[0] not in ends else "none"
    return protocols.get(settings.protocol, window=window, bos=begins)


def check(model: interop.PretrainedSource, text: Text, settings: JudgingSettings) -> None:
    """Refuses what `judge` would refuse, before a weight is read.

    Raises:
        InputError: A protocol, windows or prompts that do not fit the model, or too short a text.
    """
    assert model.tokenizer is not None
    module = phi3v.build(model.config, model.vocab_size)
    protocol = protocol_of(model, settings)
    scored_windows.of_text(module, text.tokens, protocol, model.tokenizer.bos_id)
    prompts = [model.tokenizer.encode(prompt) for prompt in settings.prompts]
    generation.check_prompts(module, prompts, settings.new_tokens)


def judge(
    module: nn.Module,
    params: PyTree,
    model: interop.Pretrained | interop.PretrainedSource,
    text: Text,
    settings: JudgingSettings,
    *,
    dense: PyTree | None = None,
    dense_module: nn.Module | None = None,
) -> Verdict:
    """Returns what a model is worth on a text.

    Args:
        module: Linen module of the model.
        params: Weights of the model.
        model: Pretrained model with the tokenizer and the context length.
        text: Text to evaluate on.
        settings: Settings: protocol, windows and prompts.
        dense: Weights of the dense model to compare with; None: not compared.
        dense_module: Linen module of the dense model, if units were cut out of it; None: `module`.
    """
    assert model.tokenizer is not None
    found = perplexity_of(module, params, model, text, settings)
    prompts = [model.tokenizer.encode(prompt) for prompt in settings.prompts]
    made = generate(
        module,
        params,
        [p.tolist() for p in prompts],
        settings.new_tokens,
        sampling=GREEDY,
        seed=0,
        eos_id=model.tokenizer.eos_ids or None,
    )
    distance = None
    if dense is not None:
        distance = kl_to_dense(
            module if dense_module is None else dense_module,
            dense,
            params,
            text.tokens,
            found.protocol,
            batch=settings.eval_batch,
            bos_id=model.tokenizer.bos_id,
            pruned_model=module,
        )
    return Verdict(
        found,
        tuple(model.tokenizer.decode(np.asarray(tokens, np.int32)) for tokens in made.tokens),
        mean_repetition(made.tokens),
        distance,
    )


def perplexity_of(
    module: nn.Module,
    params: PyTree,
    model: interop.Pretrained | interop.PretrainedSource,
    text: Text,
    settings: JudgingSettings,
) -> PerplexityResult:
    """Returns the perplexity of a text; the arguments are those of `judge`."""
    assert model.tokenizer is not None
    return perplexity(
        module,
        params,
        text.tokens,
        protocol_of(model, settings),
        batch=settings.eval_batch,
        bos_id=model.tokenizer.bos_id,
        text_bytes=text.size,
        windows_limit=settings.eval_windows,
    )


def show_folder(console: Console, folder: Path, compressed: bool) -> None:
    """Prints where a model was written, and who can read it."""
    print_line(console, str(folder))
    if compressed:
        print_line(
            console,
            f"transformers cannot read its {interop.COMPRESSED}; interop.load and --model=PATH "
            "can, and interop.export(DIR, interop.load(PATH)) writes an ordinary folder.",
        )


def show_second(
    console: Console, name: str, before: PerplexityResult, after: PerplexityResult
) -> None:
    """Prints the perplexity of a second text before and after training, and whether it is worse."""
    line = f"{name}: perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after"
    if after.nats_per_token > before.nats_per_token + WORSE:
        line += (
            ". Training made the model worse on this text: train on text of its kind too, for "
            "fewer steps, or at a lower --learning-rate"
        )
    print_line(console, f"{line}.")


def table(rows: dict[str, Verdict], prompts: tuple[str, ...], text: str) -> list[Any]:
    """Returns what to print: a table with one row for each model, and what each wrote.

    Args:
        rows: Verdicts by the names of their models; the first is the dense one.
        prompts: Prompts that the models continued.
        text: Name of the text that they were evaluated on.
    """
    first = next(iter(rows.values())).perplexity
    numbers = Table(title=f"{escape(text)}: {first.tokens:,} tokens, {first.protocol.name}")
    for heading in ("model", "perplexity", "nats/token", "bits/byte", "KL to dense", "same top-1",
                    "repetition"):  # fmt: skip
        numbers.add_column(heading, justify="left" if heading == "model" else "right")
    for name, verdict in rows.items():
        found, apart = verdict.perplexity, verdict.distance
        error = f" ± {found.standard_error:.3f}" if found.standard_error is not None else ""
        numbers.add_row(
            name,
            f"{found.perplexity:.2f}" if math.isfinite(found.perplexity) else "inf",
            f"{found.nats_per_token:.4f}{error}",
            f"{found.bits_per_byte:.4f}" if found.bits_per_byte is not None else "",
            "" if apart is None else f"{apart.nats_per_token:.4f}",
            "" if apart is None else f"{apart.agreement:.1%}",
            f"{verdict.repetition:.1%}",
        )
    lines: list[Any] = [numbers]
    for number, prompt in enumerate(prompts):
        lines.append(f"After {prompt!r}:")
        lines += [f"  {name}: {verdict.written[number]!r}" for name, verdict in rows.items()]
    return lines


def show(console: Console, rows: dict[str, Verdict], prompts: tuple[str, ...], text: str) -> None:
    """Prints the table of `table`, and what each model wrote."""
    numbers, *written = table(rows, prompts, visible(text))
    console.print(numbers, highlight=False, markup=False)
    for one in written:
        print_line(console, one)
