"""Sentences made of the findings: every verdict is computed, with the numbers beside it."""

import math

from swe_prune.report.findings import Bout, Claims, Contest, Findings, Knee
from swe_prune.report.formats import NBSP, listing, number, percent, plural, signed
from swe_prune.report.stats import MARGIN, Cell, Spread, Verdict

RULE_PHRASES = {
    "std": "the paper's rule",
    "tensor": "equal sparsity per tensor",
    "global": "equal global sparsity",
    "row": "equal sparsity per row",
}


def rule_phrase(rule: str) -> str:
    """Returns how a comparison is called inside a sentence."""
    return RULE_PHRASES[rule]


def change(value: Spread) -> str:
    """Returns a change in loss with its spread: `0.0123 ± 0.0040 nats per token above`."""
    if not math.isfinite(value.mean):
        return "beyond measure (the loss diverged) above"
    size = f"{number(abs(value.mean))}"
    if value.sd is not None:
        size += f"{NBSP}±{NBSP}{number(value.sd)}"
    return f"{size} nats per token {'below' if value.mean < 0 else 'above'}"


def headline(found: Findings) -> str:
    """Returns the finding in one or two sentences."""
    main = found.main
    tested = f"{main.criterion} under {rule_phrase(main.rule)}"
    if main.moderate is None:
        return f"No cell of {tested} lies near 60{NBSP}% sparsity yet. {_knee_clause(main.knee)}"
    at = percent(main.moderate.sparsity.mean)
    if main.against_control is None or main.moderate.minus_control is None:
        return f"At {at} sparsity, {tested}: {_before(main.moderate)}; {_untuned(main.moderate)}."
    verb = {
        "lower": "lowers the loss",
        "equal": "costs nothing",
        "higher": "costs",
        "undecided": "cannot be called free or costly",
    }[main.against_control]
    return (
        f"Moderate pruning {verb} here: at {at} sparsity ({tested}) the fine-tuned model ends "
        f"{change(main.moderate.minus_control)} the control. {_knee_clause(main.knee)}"
    )


def _untuned(cell: Cell) -> str:
    if cell.finetuned is None:
        return "nothing there is fine-tuned yet, so neither claim can be judged"
    return "the control was not run yet, so neither claim can be judged"


def _before(cell: Cell) -> str:
    if cell.pruned_minus_dense is None:
        return "the dense model diverged, so there is nothing to compare with"
    return f"straight after pruning the loss is {change(cell.pruned_minus_dense)} the dense model"


def _knee_clause(found: Knee | None) -> str:
    if found is None:
        return "No fine-tuned cell can be compared with a control yet."
    if found.free is None and found.costly is None:
        return "No level is clearly free and none clearly costs: the seeds scatter too much."
    if found.free is None:
        assert found.costly is not None
        return f"Every level costs: already at {percent(found.levels[0].sparsity.mean)}, " + (
            f"and at {percent(found.last.sparsity.mean)} the loss is {_above(found.last)}."
        )
    free = percent(found.free.sparsity.mean)
    if found.costly is None:
        return f"No level up to {percent(found.last.sparsity.mean)} was shown to cost anything."
    return (
        f"The knee lies after {free}; at {percent(found.last.sparsity.mean)} the loss is "
        f"{_above(found.last)}."
    )


def _above(cell: Cell) -> str:
    assert cell.minus_control is not None
    mean = cell.minus_control.mean
    if not math.isfinite(mean):
        return "not finite any more"
    perplexity = f"{100 * math.expm1(mean):+.0f}{NBSP}%".replace("-", "\N{MINUS SIGN}")
    return f"{signed(mean, 3)} nats per token against the control ({perplexity} perplexity)"


CLAIM_ONE = {
    "lower": "holds, and more: the loss is lower",
    "equal": "holds",
    "higher": "does not hold",
    "undecided": "can be neither confirmed nor refuted: the seeds scatter across the margin",
}


def claim_one(main: Claims) -> list[str]:
    """Returns what became of `pruning to about 60 % costs nothing`, against both yardsticks."""
    cell = main.moderate
    where = f"{main.criterion}, {rule_phrase(main.rule)}"
    if cell is None:
        return [
            f"Claim 1, moderate pruning costs nothing: not tested, for no cell of {where} lies "
            f"near 60{NBSP}% sparsity."
        ]
    start = f"Claim 1, moderate pruning costs nothing ({where}, {percent(cell.sparsity.mean)} of"
    start += " the prunable weights removed)"
    if cell.minus_control is None or main.against_control is None:
        return [f"{start}: not judged; {_untuned(cell)}. For now, {_before(cell)}."]
    sentences = [
        f"{start}: {CLAIM_ONE[main.against_control]}. After fine-tuning, the loss is "
        f"{change(cell.minus_control)} the control {_over(cell.minus_control)}."
    ]
    if cell.minus_dense is not None and main.against_dense is not None:
        same = (main.against_dense in ("lower", "equal")) == (
            main.against_control in ("lower", "equal")
        )
        sentences.append(
            f"Against the dense model before fine-tuning it {CLAIM_ONE[main.against_dense]}: the "
            f"loss is {change(cell.minus_dense)} it. The control is the fairer yardstick, since "
            "both models then had the same extra steps"
            + ("." if same else ", and here the choice of yardstick decides the verdict.")
        )
    return sentences


def _over(value: Spread) -> str:
    if value.n == 1:
        return "(one seed, so no spread can be given)"
    return f"(mean of {value.n} seeds ± standard deviation, paired by seed)"


def claim_two(main: Claims) -> str:
    """Returns what became of `more pruning destroys`: where the knee is and how steep after."""
    start = f"Claim 2, more pruning destroys ({main.criterion}, {rule_phrase(main.rule)}): "
    found = main.knee
    if found is None:
        return f"{start}not judged, for no fine-tuned cell has a control yet."
    last = percent(found.last.sparsity.mean)
    if found.costly is None:
        reason = "every level" if found.free is found.last else "no level beyond the margin"
        if found.free is found.last:
            return f"{start}not seen. The largest sparsity tested, {last}, is within the margin."
        return f"{start}not seen up to {last}; {reason} is clear of the scatter over seeds."
    if found.free is None:
        text = f"{start}holds, but there is no free range before it: every level tested that can "
        text += "be decided costs"
    else:
        text = f"{start}holds. The knee, the largest sparsity within the margin of the control, is "
        text += f"{percent(found.free.sparsity.mean)}"
    text += f"; the cost is clear from {percent(found.costly.sparsity.mean)} on, and at {last} "
    text += f"the loss is {_above(found.last)}"
    if found.slope is not None and math.isfinite(found.slope):
        text += f", on average {signed(found.slope, 3)} nats for each further 10 points of sparsity"
    if found.dip is not None:
        text += f". The curve is not monotone: {percent(found.dip.sparsity.mean)} costs more"
    return text + "."


def standing(one: Contest) -> str:
    """Returns who is ahead over all levels: beats, loses to, ties with, or mixed against."""
    wins, losses = one.count("win"), one.count("loss")
    if wins and not losses:
        return "beats"
    if losses and not wins:
        return "loses to"
    return "is mixed against" if wins else "ties with"


def _bout(bout: Bout) -> str:
    if not math.isfinite(bout.change.mean):
        gap = "diverged where its rival did not" if bout.change.mean > 0 else "its rival diverged"
        return f"{percent(bout.sparsity)}: {gap}"
    gap = signed(bout.change.mean)
    if bout.change.sd is not None:
        gap += f"{NBSP}±{NBSP}{number(bout.change.sd)}"
    return f"{gap} nats per token at {percent(bout.sparsity)}"


PHASES = {"pruned": "before fine-tuning", "finetuned": "after fine-tuning"}


def contest(one: Contest) -> str:
    """Returns a clause on one contest: standing, tally and the gap at the moderate level."""
    tally = [f"{one.count(o)} {w}" for o, w in (("win", "won"), ("tie", "tied"), ("loss", "lost"))]
    return (
        f"{PHASES[one.phase]} it {standing(one)} {one.rival} ({', '.join(tally)} of "
        f"{plural(len(one.bouts), 'level')}; {_bout(one.moderate)})"
    )


def rivalry(found: Findings, rival: str) -> list[str]:
    """Returns how the criterion of the claims fares against a rival at each equal sparsity."""
    hero = found.main.criterion
    if hero == rival:
        return []
    sentences = []
    for rule in ("tensor", "global", "row"):
        mine = [c for c in found.contests
                if (c.rule, c.criterion, c.rival) == (rule, hero, rival)]  # fmt: skip
        if mine:
            clauses = "; ".join(contest(one) for one in mine)
            sentences.append(f"{hero} against {rival}, {rule_phrase(rule)}: {clauses}.")
    if not sentences:
        sentences.append(f"{hero} and {rival} were not both measured at equal sparsity.")
    return sentences


def losers(found: Findings) -> list[str]:
    """Returns one plain sentence for each criterion that loses to magnitude somewhere."""
    places: dict[str, list[str]] = {}
    for one in found.contests:
        if one.rival == "magnitude" and standing(one) == "loses to":
            places.setdefault(one.criterion, []).append(
                f"{rule_phrase(one.rule)} {PHASES[one.phase]} "
                f"({one.count('loss')} of {plural(len(one.bouts), 'level')})"
            )
    return [f"{name} loses to magnitude: {listing(where)}." for name, where in places.items()]


def yardstick(found: Findings) -> str:
    """Returns how the verdicts were reached and over how many seeds."""
    numbers = sorted({len(cell.seeds) for cell in found.cells})
    rule = (
        f"Called free: no more than {MARGIN:g} nats per token (1{NBSP}% of perplexity) above the "
        "yardstick, by the paired difference plus one standard deviation over seeds; called "
        "costly: clear of that margin by one standard deviation; otherwise undecided."
    )
    if numbers == [1]:
        return (
            f"{rule} Every cell has one seed, so no spread can be given and chance is not judged."
        )
    if numbers[0] == 1:
        return f"{rule} Cells with one seed have no spread and are judged by their value alone."
    return rule


def sentences(found: Findings) -> list[str]:
    """Returns all that was found, one plain statement each, in the order of their weight."""
    return [
        " ".join(claim_one(found.main)),
        claim_two(found.main),
        *rivalry(found, "magnitude"),
        *rivalry(found, "random"),
        *losers(found),
    ]


VERDICTS: dict[Verdict | None, str] = {
    "lower": "lower",
    "equal": "free",
    "higher": "costs",
    "undecided": "undecided",
    None: "\N{EN DASH}",
}
