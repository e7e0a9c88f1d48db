"""`bench`: how fast a pretrained model runs and what it takes, in turns with another model."""

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swe_prune import interop, ledger, structured, tree
from swe_prune.errors import InputError
from swe_prune.evaluation import latency
from swe_prune.evaluation.latency import Times, Workload
from swe_prune.models import gpt, phi3v
from swe_prune.pretrained.opening import opened
from swe_prune.pretrained.settings import BenchSettings
from swe_prune.training.progress import Progress, print_line


@dataclasses.dataclass(frozen=True)
class Bench:
    """What one model takes, and its times at each batch size.

    Attributes:
        path: Path of the model.
        file_bytes: Size in bytes of the files with the weights.
        parameters: Number of parameters.
        nonzero: Number of parameters that are not 0.
        flops: Operations of one token in a forward pass over prompt and new tokens.
        peak_bytes: Memory of the programs, by batch size.
        times: Seconds of the prefill and of decoding all new tokens, by batch size.
        energy: Windows in which it ran, in turns with the other model, by batch size.
    """

    path: str
    file_bytes: int
    parameters: int
    nonzero: int
    flops: float
    peak_bytes: dict[int, int]
    times: dict[int, tuple[Times, ...]]
    energy: dict[int, list[ledger.Window]]


def bench(given: BenchSettings, progress: Progress, console: Console) -> dict[str, Bench]:
    """Times a model, prints a table or JSON, and returns what was measured by "model", "against".

    Raises:
        InputError: If a number is out of range, a model cannot be read, or a batch does not fit the
            context or the memory.
    """
    loads = [Workload(batch, given.prompt_tokens, given.new_tokens) for batch in given.batch]
    for load in loads:
        load.check()
    latency.check_rounds(given.runs, given.warmup)
    book = ledger.Ledger()
    count, seconds = _windows(given, book)
    sources = _sources(given, progress)
    for source in sources.values():
        loads[0].check(source.config.context)
    models = {name: source.read(dtype=given.dtype) for name, source in sources.items()}
    built = {name: phi3v.build(one.config, one.vocab_size) for name, one in models.items()}
    # Fused, as one decodes them; their counts stay the same.
    for name, one in models.items():
        models[name] = dataclasses.replace(one, params=gpt.fuse(one.params))
    peaks: dict[str, dict[int, int]] = {name: {} for name in models}
    times: dict[str, dict[int, tuple[Times, ...]]] = {name: {} for name in models}
    energy: dict[str, dict[int, list[ledger.Window]]] = {name: {} for name in models}
    for load in loads:
        energies = f" and {count} windows of {seconds:g} s or more for energy" if count else ""
        progress.say(
            f"Batch {load.batch}: compiling, then {given.runs} runs{energies} of each model."
        )
        works = {
            name: latency.compiled(built[name], one.params, load, str(one.path))
            for name, one in models.items()
        }
        for name, found in latency.alternating(works, given.runs, given.warmup).items():
            times[name][load.batch], peaks[name][load.batch] = found, works[name].peak_bytes
        if count:
            runs = {name: work.tokens for name, work in works.items()}
            found = ledger.windows(runs, book.meters, count=count, seconds=seconds)
            for name, some in found.items():
                energy[name][load.batch] = some
    idle = ledger.idle_watts(book.meters, max(seconds, IDLE)) if count else None
    results = {
        name: Bench(
            str(one.path),
            sources[name].file_bytes,
            tree.size(one.params),
            latency.nonzero(one.params),
            structured.flops(one.config, one.params, given.prompt_tokens + given.new_tokens),
            peaks[name],
            times[name],
            energy[name],
        )
        for name, one in models.items()
    }
    notes = list(_notes(models, results))
    if idle is not None:
        notes.append(_energy_note(idle, book.source, count, results))
    if given.json:
        measured = {"source": book.source, "idle_watts": None if idle is None else vars(idle)}
        print(json.dumps(as_json(results, given, notes) | {"energy": measured}))
        return results
    console.print(table(results, given))
    for line in notes:
        print_line(console, line)
    return results


IDLE = 0.5
"""Least seconds in which the power of the idle machine is measured."""


def _windows(given: BenchSettings, book: ledger.Ledger) -> tuple[int, float]:
    """Returns how many windows measure the energy, and their least seconds."""
    count = min(given.runs, ledger.WINDOWS)
    if given.energy_windows is not None:
        count = given.energy_windows
    counted = set(book.source.split("+")) - {"modelled"}
    if count == 0 and given.energy_seconds is not None:
        raise InputError(
            "--energy-seconds is of windows, and --energy-windows=0 measures none; leave it out"
        )
    seconds = ledger.SECONDS if counted else 0.0
    if given.energy_seconds is not None:
        seconds = given.energy_seconds
    return count, seconds


def _energy_note(idle: ledger.Interval, source: str, count: int, results: dict[str, Bench]) -> str:
    shortest = min(
        one.seconds for each in results.values() for some in each.energy.values() for one in some
    )
    return (
        f"Energy: {source}, {count} windows of each model in turns, the shortest of "
        f"{shortest:.3g} s; the idle machine takes {ledger.text(idle, 'W')}. A token is one of the "
        "prompt or a new one."
    )


def _sources(given: BenchSettings, progress: Progress) -> dict[str, interop.PretrainedSource]:
    """Returns the models to time, opened; the base of the ratios first."""
    sources = {}
    if given.against is not None:
        other = dataclasses.replace(given, model=given.against, prefix=given.against_prefix)
        sources["against"] = opened(other, progress)
    return sources | {"model": opened(given, progress)}


def table(results: dict[str, Bench], given: BenchSettings) -> Table:
    """Returns the table: one column for each model, and the ratio with its quartiles."""
    turns = " of each in turns" if len(results) > 1 else ""
    made = Table(
        title=f"{given.prompt_tokens} prompt tokens, {given.new_tokens} new ones, "
        f"{given.runs} runs{turns}",
        caption=machine(),
    )
    made.add_column("", no_wrap=True)
    for name, one in results.items():
        heading = f"{name}:\n{Path(one.path).name}"
        made.add_column(escape(heading), justify="right", overflow="fold", min_width=14)
    base = results.get("against")
    if base is not None:
        made.add_column("ratio (quartiles)", justify="right", no_wrap=True)

    def row(name: str, values: list[Any], form: Any, ratio: str | None = None) -> None:
        cells = [form(value) for value in values]
        if base is not None:
            cells.append(ratio or f"{values[1] / values[0]:.3f}")
        made.add_row(name, *cells)

    every = list(results.values())
    row("file, MB", [one.file_bytes / 1e6 for one in every], "{:,.1f}".format)
    row("parameters", [one.parameters for one in every], "{:,}".format)
    row("parameters not 0", [one.nonzero for one in every], "{:,}".format)
    row("MFLOPs a token", [one.flops / 1e6 for one in every], "{:,.1f}".format)
    for batch in given.batch:
        peaks = [one.peak_bytes[batch] / 2**20 for one in every]
        row(f"batch {batch}: memory, MiB", peaks, "{:,.0f}".format)
        for part, (name, tokens) in enumerate(_parts(given)):
            times = [one.times[batch][part] for one in every]
            label = f"batch {batch}: {name},"
            ratio = None if base is None else spread(times[1], times[0])
            row(f"{label} median ms", [1e3 * t.median for t in times], "{:,.1f}".format, ratio)
            row(f"{label} p95 ms", [1e3 * t.p95 for t in times], "{:,.1f}".format)
            rates = [batch * tokens / t.median for t in times]
            row(f"{label} tokens/s", rates, "{:,.0f}".format)
        _energy_rows(row, every, batch, given)
    return made


def _energy_rows(row: Any, every: list[Bench], batch: int, given: BenchSettings) -> None:
    """Adds joules per token and per request, each with its interval, and the paired ratio."""
    if any(batch not in one.energy for one in every):
        return
    ratio = None
    if len(every) > 1:
        joules = [Times(tuple(w.per_token.value for w in one.energy[batch])) for one in every]
        if min(joules[0].seconds) > 0:
            ratio = spread(joules[1], joules[0])
    each = [ledger.per_token(one.energy[batch]) for one in every]
    tokens = given.prompt_tokens + given.new_tokens
    row(f"batch {batch}: energy a token", each, lambda one: ledger.text(one, "J"), ratio or "-")
    requests = [one * tokens for one in each]
    row(f"batch {batch}: energy a request", requests, lambda one: ledger.text(one, "J"), " ")


def _parts(given: BenchSettings) -> tuple[tuple[str, int], ...]:
    """Returns the name of each timed part, and its tokens of each text."""
    return ("prefill", given.prompt_tokens), ("decode", given.new_tokens)


def spread(times: Times, base: Times) -> str:
    """Returns the median of the paired ratios with its quartiles.

    >>> spread(Times((1.0, 2.0)), Times((2.0, 2.0)))
    '0.750 (0.625 to 0.875)'
    """
    low, middle, high = times.ratio(base)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def as_json(results: dict[str, Bench], given: BenchSettings, notes: list[str]) -> dict[str, Any]:
    """Returns plain values: what the table has, and the seconds of every run."""

    def of(one: Bench) -> dict[str, Any]:
        batches = {}
        for batch, parts in one.times.items():
            batches[str(batch)] = {"peak_bytes": one.peak_bytes[batch]}
            for (name, tokens), t in zip(_parts(given), parts, strict=True):
                batches[str(batch)][name] = {
                    "median": t.median, "p95": t.p95, "seconds": list(t.seconds),
                    "tokens_per_second": batch * tokens / t.median,
                }  # fmt: skip
                if "against" in results and one is results["model"]:
                    base = results["against"].times[batch][name == "decode"]
                    batches[str(batch)][name]["ratio"] = t.ratio(base)
            if batch in one.energy:
                batches[str(batch)]["energy"] = _energy_json(one.energy[batch], given)
        plain = ("path", "file_bytes", "parameters", "nonzero", "flops")
        return {name: getattr(one, name) for name in plain} | {"batches": batches}

    settings = ("prompt_tokens", "new_tokens", "runs", "warmup", "dtype", "compute_dtype")
    return {
        "machine": machine(),
        "settings": {name: getattr(given, name) for name in settings},
        "notes": notes,
        **{name: of(one) for name, one in results.items()},
    }


def _energy_json(found: list[ledger.Window], given: BenchSettings) -> dict[str, Any]:
    each = ledger.per_token(found)
    return {
        "joules_per_token": vars(each),
        "joules_per_request": vars(each * (given.prompt_tokens + given.new_tokens)),
        "windows": [dataclasses.asdict(one) for one in found],
    }


def machine() -> str:
    """Returns what the times are of."""
    device = jax.devices()[0]
    return (
        f"{device.device_kind}, {os.cpu_count()} cores of {platform.machine()}, "
        f"jax {jax.__version__}"
    )


def _notes(models: dict[str, interop.Pretrained], results: dict[str, Bench]) -> Any:
    """Yields what a reader must know to compare the two models."""
    found = results["model"]
    if found.nonzero < found.parameters:
        yield (
            f"{1 - found.nonzero / found.parameters:.1%} of the parameters of {found.path} are 0; "
            "dense matrix products skip none of them, so zeros save no time."
        )
    if "against" in models:
        one, other = models["model"], models["against"]
        if one.vocab_size != other.vocab_size:
            yield (
                f"The vocabularies differ, {one.vocab_size:,} tokens here and "
                f"{other.vocab_size:,} there, so a token is not the same amount of text."
            )
        if one.config.dtype != other.config.dtype:
            yield "The models compute in different dtypes."
