"""Sentences made of the findings: every verdict is computed, with the numbers beside it."""

import dataclasses
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
PHASES = {"pruned": "before fine-tuning", "finetuned": "after fine-tuning"}
VERDICTS: dict[Verdict | None, str] = {
    "lower": "lower",
    "equal": "free",
    "higher": "costs",
    "undecided": "undecided",
    None: "\N{EN DASH}",
}
_HOLDS = {
    "lower": "holds; the loss is even lower",
    "equal": "holds",
    "higher": "does not hold",
    "undecided": "undecided, for the seeds scatter across the margin",
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """One finding: what it comes to, and the numbers it rests on."""

    lead: str
    body: str


def rule_phrase(rule: str) -> str:
    """Returns how a comparison is called inside a sentence."""
    return RULE_PHRASES[rule]


def rule_title(rule: str) -> str:
    """Returns the name of a comparison with a capital."""
    return RULE_PHRASES[rule][0].upper() + RULE_PHRASES[rule][1:]


def size(value: Spread) -> str:
    """Returns the size of a change with its spread: `0.0123 ± 0.0040`, fewer digits if large."""
    digits = 4 if abs(value.mean) < 0.1 else 3
    text = number(abs(value.mean), digits)
    return text if value.sd is None else f"{text}{NBSP}±{NBSP}{number(value.sd, digits)}"


def change(value: Spread) -> str:
    """Returns a change in loss with its direction: `0.0123 ± 0.0040 nats per token above`."""
    if not math.isfinite(value.mean):
        return "beyond measure (it diverged) above"
    return f"{size(value)} nats per token {'below' if value.mean < 0 else 'above'}"


def headline(found: Findings) -> str:
    """Returns the finding in one or two sentences."""
    main = found.main
    tested = f"{main.criterion} under {rule_phrase(main.rule)}"
    if main.moderate is None:
        return f"No cell of {tested} lies near 60{NBSP}% sparsity yet. {_knee_clause(main.knee)}"
    at = percent(main.moderate.sparsity.mean)
    if main.against_control is None or main.moderate.minus_control is None:
        return (
            f"At {at} sparsity with {tested}, {_before(main.moderate)}; {_untuned(main.moderate)}."
        )
    verb = {
        "lower": "lowers the loss here",
        "equal": "costs nothing here",
        "higher": "is not free here",
        "undecided": "cannot be called free or costly here",
    }[main.against_control]
    change_here = main.moderate.minus_control
    alone = " (one seed, so no spread)" if change_here.n == 1 else ""
    return (
        f"Moderate pruning {verb}: at {at} sparsity ({tested}) the loss of the fine-tuned model is "
        f"{change(change_here)} the control's{alone}. {_knee_clause(main.knee)}"
    )


def _untuned(cell: Cell) -> str:
    if cell.finetuned is None:
        return "nothing there is fine-tuned yet, so neither claim can be judged"
    return "the control was not run yet, so neither claim can be judged"


def _before(cell: Cell) -> str:
    if cell.pruned_minus_dense is None:
        return "the dense model diverged, so there is nothing to compare with"
    return f"straight after pruning the loss is {change(cell.pruned_minus_dense)} the dense model's"


def _knee_clause(found: Knee | None) -> str:
    if found is None:
        return "No fine-tuned cell can be compared with a control yet."
    last = percent(found.last.sparsity.mean)
    if found.free is None and found.costly is None:
        return "No level is clearly free and none clearly costs: the seeds scatter too much."
    if found.free is None:
        return f"No level tested is free; at {last} the loss is {_above(found.last)}."
    if found.costly is None:
        return f"No level up to {last}, the sparsest tested, was shown to cost anything."
    free = percent(found.free.sparsity.mean)
    return f"The knee lies after {free}; at {last} the loss is {_above(found.last)}."


def _above(cell: Cell) -> str:
    assert cell.minus_control is not None  # a knee is made of such cells alone
    mean = cell.minus_control.mean
    if not math.isfinite(mean):
        return "not finite any more"
    # exp overflows a float at 710 nats, far beyond any loss that is still a model's.
    perplexity = f"{100 * math.expm1(min(mean, 700)):+.0f}".replace("-", "\N{MINUS SIGN}")
    side = "below" if mean < 0 else "above"
    return (
        f"{number(abs(mean), 3)} nats per token {side} the control's "
        f"({perplexity}{NBSP}% perplexity)"
    )


def claim_one(found: Findings) -> Statement:
    """Returns what became of `pruning to about 60 % costs nothing`, against both yardsticks."""
    main, cell = found.main, found.main.moderate
    start = "Claim 1, moderate pruning costs nothing: "
    if cell is None:
        where = f"{main.criterion} under {rule_phrase(main.rule)}"
        return Statement(f"{start}not tested.", f"No cell of {where} lies near 60{NBSP}% sparsity.")
    at = f"With {percent(cell.sparsity.mean)} of the prunable weights removed "
    at += f"({main.criterion}, {rule_phrase(main.rule)})"
    if cell.minus_control is None or main.against_control is None:
        return Statement(f"{start}not judged.", f"{at}, {_before(cell)}; {_untuned(cell)}.")
    body = f"{at}, the loss after fine-tuning is {change(cell.minus_control)} the control's "
    body += f"{_over(cell.minus_control)}"
    if cell.minus_dense is not None and main.against_dense is not None:
        body += f", and {change(cell.minus_dense)} that of the dense model before "
        body += f"(against which the claim {_dense_verdict(main.against_dense)})"
    body += ". The control is the fairer yardstick: both models had the same extra steps."
    return Statement(f"{start}{_HOLDS[main.against_control]}.", f"{body}{_elsewhere(found)}")


def _dense_verdict(against: Verdict) -> str:
    return {"higher": "does not hold", "undecided": "is undecided"}.get(against, "holds")


def _over(value: Spread) -> str:
    if value.n == 1:
        return "(one seed, so no spread can be given)"
    return f"(mean of {value.n} seeds ± standard deviation, paired by seed)"


def _elsewhere(found: Findings) -> str:
    judged = [one.against_control for one in found.claims if one.against_control]
    if len(judged) < 2:
        return ""
    free = sum(verdict in ("lower", "equal") for verdict in judged)
    costly = judged.count("higher")
    return (
        f" Of all {len(judged)} pairs of criterion and comparison near 60{NBSP}%: {free} "
        f"free, {costly} costly, {len(judged) - free - costly} undecided."
    )


def claim_two(main: Claims) -> Statement:
    """Returns what became of `more pruning destroys`: where the knee is and how steep after."""
    start, found = "Claim 2, more pruning harms the model: ", main.knee
    where = f"{main.criterion}, {rule_phrase(main.rule)}"
    if found is None:
        return Statement(f"{start}not judged.", "No fine-tuned cell has a control yet.")
    last = percent(found.last.sparsity.mean)
    if found.costly is None:
        shown = "is within the margin" if found.free is found.last else "is not shown to cost"
        return Statement(
            f"{start}not seen.", f"Even the largest sparsity tested, {last} ({where}), {shown}."
        )
    if found.free is None:
        body = f"No level tested is free ({where}); the cost is clear"
    else:
        body = "The knee, the largest sparsity within the margin of the control, is "
        body += f"{percent(found.free.sparsity.mean)} ({where}). The cost is clear"
    body += f" from {percent(found.costly.sparsity.mean)} on, and at {last} the fine-tuned loss is "
    body += _above(found.last)
    if found.slope is not None and math.isfinite(found.slope):
        body += f": on average {signed(found.slope, 3)} nats per further 10 points of sparsity"
    if found.dip is not None:
        body += f". The curve is not monotone: {percent(found.dip.sparsity.mean)} costs already"
    if found.last.pruned_minus_dense is not None:
        body += f". Before fine-tuning, {last} was {change(found.last.pruned_minus_dense)} dense"
    return Statement(f"{start}holds.", f"{body}.")


def standing(one: Contest) -> str:
    """Returns who is ahead over all levels: beats, loses to, ties with, or mixed against."""
    wins, losses = one.count("win"), one.count("loss")
    if wins and not losses:
        return "beats"
    if losses and not wins:
        return "loses to"
    return "mixed against" if wins else "ties with"


def _gap(bout: Bout) -> str:
    if not math.isfinite(bout.change.mean):
        who = "it" if bout.change.mean > 0 else "its rival"
        return f"{who} diverged at {percent(bout.sparsity)}"
    sign = "\N{MINUS SIGN}" if bout.change.mean < 0 else "+"
    return f"{sign}{size(bout.change)} nats per token at {percent(bout.sparsity)}"


def contest(one: Contest) -> str:
    """Returns a clause on one contest: standing, tally and the gap at the moderate level."""
    result = standing(one)
    verb = f"is {result}" if result.startswith("mixed") else result
    named = (("win", "won"), ("tie", "tied"), ("loss", "lost"))
    tally = [f"{one.count(outcome)} {word}" for outcome, word in named if one.count(outcome)]
    levels = plural(len(one.bouts), "level")
    won = f"{', '.join(tally)} of {levels}"
    return f"{PHASES[one.phase]} it {verb} {one.rival} ({won}; {_gap(one.moderate)})"


def rivalry(found: Findings, rival: str) -> list[Statement]:
    """Returns how the criterion of the claims fares against a rival at each equal sparsity."""
    hero = found.main.criterion
    mine = [c for c in found.contests if (c.criterion, c.rival) == (hero, rival)]
    if hero == rival:
        return []
    lead = f"{hero} against {rival}."
    if not mine:
        return [Statement(lead, "They were not both measured at equal sparsity.")]
    clauses = [
        f"{rule_title(rule)}: {'; '.join(contest(one) for one in mine if one.rule == rule)}."
        for rule in dict.fromkeys(one.rule for one in mine)
    ]
    return [Statement(lead, " ".join(clauses))]


def losers(found: Findings) -> list[Statement]:
    """Returns a plain statement for each criterion that magnitude beats at more levels than not."""
    return _against_magnitude(found, "loses to", ("loss", "lost"), ("win", "won"))


def winners(found: Findings) -> list[Statement]:
    """Returns a plain statement for each criterion that beats magnitude at more levels than not."""
    return _against_magnitude(found, "beats", ("win", "won"), ("loss", "lost"))


def _against_magnitude(
    found: Findings, verb: str, this: tuple[str, str], other: tuple[str, str]
) -> list[Statement]:
    places: dict[str, list[str]] = {}
    for one in found.contests:
        more, less = one.count(this[0]), one.count(other[0])
        if one.rival == "magnitude" and more > less:
            tally = f"{more} of {plural(len(one.bouts), 'level')} {this[1]}"
            places.setdefault(one.criterion, []).append(
                f"{rule_phrase(one.rule)} {PHASES[one.phase]} "
                f"({tally}, {less or 'none'} {other[1]})"
            )
    return [
        Statement(f"{name} {verb} magnitude.", f"With {listing(where)}.")
        for name, where in places.items()
    ]


def yardstick(found: Findings) -> str:
    """Returns how the verdicts were reached and over how many seeds."""
    numbers = sorted({len(cell.seeds) for cell in found.cells})
    rule = (
        f"Free means: no more than {MARGIN:g} nats per token (1{NBSP}% of perplexity) above the "
        "yardstick, by the paired difference plus one standard deviation over seeds; costly means: "
        "above that margin even after taking one standard deviation off; else undecided."
    )
    if numbers == [1]:
        return f"{rule} Every cell has one seed: no spread can be given, and chance is not judged."
    if numbers[0] == 1:
        return f"{rule} Cells with one seed have no spread and are judged by their value alone."
    return rule


def statements(found: Findings) -> list[Statement]:
    """Returns all that was found, in the order of its weight."""
    return [
        claim_one(found),
        claim_two(found.main),
        *rivalry(found, "magnitude"),
        *rivalry(found, "random"),
        *losers(found),
        *winners(found),
    ]
