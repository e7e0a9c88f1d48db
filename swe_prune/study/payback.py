"""What a cut has cost by the ledger, and after how many served tokens it has paid for itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from swe_prune import ledger, recipe
from swe_prune.config import Config, CutConfig
from swe_prune.ledger import BreakEven, Entry, Interval
from swe_prune.ledger.interval import ZERO
from swe_prune.study.workdir import Workdir, read_json

PHASES = {"cut": "score, cut and restore", "recover": "recover"}
"""Phases of the ledger that a cut costs, and what they do."""


@dataclasses.dataclass(frozen=True)
class Payback:
    """A cut, what it cost, and when it has paid.

    Attributes:
        name: Name of the cut.
        seed: Seed of its dense model.
        spent: Joules by what they were spent on; failed and killed attempts count.
        tracking: Energy of tracking as a share of the training's, None if not measured.
        loss: Loss of each model, nats per token; "control" is the dense one after as many more
            steps as the cut one has had.
        dense: Break-even against the dense model.
        smaller: Break-even against a smaller dense model of the cut one's loss, None: no shape
            trained from random weights reached that loss.
        rival: Name of that model.
        served: How serving was measured: batch, prompt, new, crops, context, device, source,
            idle_watts.
    """

    name: str
    seed: int
    spent: Mapping[str, Interval]
    tracking: Interval | None
    loss: Mapping[str, float]
    dense: BreakEven
    smaller: BreakEven | None
    rival: str | None
    served: Mapping[str, Any]

    @property
    def sentences(self) -> list[str]:
        """What came out, a sentence each."""
        load, text = self.served, ledger.text
        count = len(load["windows"]["dense"])
        small = "no smaller shape trained from random weights reaches its loss"
        if self.smaller is not None:
            small = f"against {self.rival} from random weights: {self.smaller.verdict}"
        saved = self.dense.per()
        request = self.dense.per(load["prompt"] + load["new"])
        found = [
            f"Cut {self.name} of seed {self.seed}, against the dense model: {self.dense.verdict}.",
            *self._against_control(),
            f"{small[0].upper()}{small[1:]}.",
            "A mask of the same weights: never, since its arrays are as large as the dense "
            "model's.",
            f"It saves {text(saved, 'J')} per million tokens and {text(request, 'J')} per request, "
            f"and its making took {text(self.dense.spent, 'J')}. Measured in {count} windows of "
            f"{load['seconds']:g} s of each model in turns, batch {load['batch']}, "
            f"{load['prompt']} tokens of prompt{_of_picture(load)} and {load['new']} new ones of a "
            "context of "
            f"{load['context']}, {load['device']}, {load['source']}; idle "
            f"{text(Interval(**load['idle_watts']), 'W')}.",
        ]
        if self.tracking is not None:
            share = self.tracking * 100
            found.append(f"Tracking took {text(share)} % of the training's energy.")
        return found

    def _against_control(self) -> list[str]:
        """A loss that is better only because the cut model has trained on says nothing of a cut."""
        if "control" not in self.loss:
            return []
        more = self.loss["recovered"] - self.loss["control"]
        return [
            f"After as many more steps the dense model's loss is {self.loss['control']:.4f} nats "
            f"per token, and the cut one's {abs(more):.4f} {'above' if more > 0 else 'below'} it."
        ]


def _of_picture(load: Mapping[str, Any]) -> str:
    crops = load.get("crops")
    return f" with a picture of {crops} crops" if crops else ""


def paybacks(workdir: epath.Path, config: Config, entries: Sequence[Entry]) -> list[Payback]:
    """Returns what every cut that is measured has cost and saves, in the order of the config.

    Raises:
        InputError: A file is damaged.
    """
    found = []
    for cut in config.cuts:
        for seed in config.study.seeds_of(cut):
            folder = workdir / f"seed_{seed}" / "cuts" / cut.name
            if (folder / "result.json").exists() and (folder / "serving.json").exists():
                result, served = (read_json(folder / f"{n}.json") for n in ("result", "serving"))
                control = Workdir(workdir).control(seed) / "result.json"
                if control.exists():
                    result["losses"]["control"] = [read_json(control)["control_loss"]]
                found.append(_payback(config, cut, seed, result, served, entries))
    return found


def _payback(
    config: Config,
    cut: CutConfig,
    seed: int,
    result: Mapping[str, Any],
    served: Mapping[str, Any],
    entries: Sequence[Entry],
) -> Payback:
    own = f"seed_{seed}/{cut.name}"
    spent = {
        what: _joules([e for e in entries if (e.phase, e.cell) == (phase, own)])
        for phase, what in PHASES.items()
    }
    tracking = None
    if served.get("tracking"):
        more = ledger.of_samples(served["tracking"]) - 1
        tracking = more.map(lambda end: max(0.0, end))
        if cut.recipe is not None and recipe.measures([cut.recipe]):
            training = _joules(
                [e for e in entries if (e.phase, e.cell) == ("train", f"seed_{seed}")]
            )
            # Of the energy with tracking, share / (1 + share) is the tracking's.
            spent["track"] = training * (tracking / (tracking + 1))
    windows = {
        name: [Interval(**one["joules"]) * (1 / one["tokens"]) for one in some]
        for name, some in served["windows"].items()
    }
    total = sum(spent.values(), ZERO)
    losses, margin = result["losses"], config.ledger.margin
    dense = ledger.break_even(
        total, windows["dense"], windows["cut"], worse=_worse(losses, "dense"), margin=margin
    )
    smaller, rival = None, served["smaller"]
    if rival is not None:
        smaller = ledger.break_even(
            total, windows["smaller"], windows["cut"], worse=_worse(losses, rival), margin=margin
        )
    loss = {name: float(np.mean(values)) for name, values in losses.items()}
    return Payback(cut.name, seed, spent, tracking, loss, dense, smaller, rival, served)


def _joules(entries: Sequence[Entry]) -> Interval:
    return ledger.total(entries).joules


def _worse(losses: Mapping[str, Sequence[float]], other: str) -> Interval:
    """Returns the loss of the cut model minus another's, by the bootstrap over the batches."""
    pairs = zip(losses["recovered"], losses[other], strict=True)
    found = [a - b for a, b in pairs]
    return ledger.of_samples(found) if len(found) > 1 else ledger.interval(found[0])
