"""Tables as Markdown, to be pasted into a README: criteria at equal sparsity, and the study."""

import math
from collections.abc import Sequence

from swe_prune.report import language, stats, study
from swe_prune.report.formats import DASH, mean_sd, number, percent, seeds_of
from swe_prune.report.records import RULES, Results
from swe_prune.report.stats import Cell, Spread
from swe_prune.report.tables import Table
from swe_prune.report.words import rule_title

YARDSTICK = "magnitude"
TIMES = "\N{MULTIPLICATION SIGN}"


def document(results: Results) -> str:
    """Returns the tables of an experiment: criteria by scope, then the study where there is one."""
    cells = stats.summarise(results.rows)
    parts = [f"# {results.name}"]
    for rule in RULES[1:]:
        own = [cell for cell in cells if cell.rule == rule]
        if own:
            parts.append(criteria(own, rule))
    written = language.of(results)
    if written is not None:
        parts += ["## Perplexity and samples", *map(_table, written.values())]
    if any(not row.plain for row in results.study):
        found = study.combinations(results.study)
        parts += ["## The study", study.answer(found), _table(study.table(found))]
    return "\n\n".join(parts) + "\n"


def criteria(cells: Sequence[Cell], rule: str) -> str:
    """Returns the comparison of criteria under one rule, before and after fine-tuning.

    Args:
        cells: of this rule alone.
        rule: a scope of equal sparsity.
    """
    levels = sorted({cell.requested for cell in cells})
    by_name = {(cell.criterion, cell.requested): cell for cell in cells}
    head = ["criterion"]
    head += [f"{percent(level)} {when}" for when in ("before", "after") for level in levels]
    rows = []
    for name in stats.order(cell.criterion for cell in cells):
        row = [f"`{name}`"]
        for field in ("pruned_minus_dense", "minus_control"):
            for level in levels:
                mine, other = (by_name.get((one, level)) for one in (name, YARDSTICK))
                row.append(_entry(_get(mine, field), _get(other, field), name))
        rows.append(row)
    caption = (
        f"Validation loss in nats per token, mean ± standard deviation over "
        f"{seeds_of([len(cell.seeds) for cell in cells])}, paired by seed. Before fine-tuning: "
        "above the dense model's. After it: above the control's, the dense model trained for the "
        f"same extra steps. In brackets: as a multiple of {YARDSTICK}'s."
    )
    return f"## {rule_title(rule)}\n\n{caption}\n\n{_lines(head, rows)}"


def _get(cell: Cell | None, field: str) -> Spread | None:
    return None if cell is None else getattr(cell, field)


def _entry(mine: Spread | None, other: Spread | None, name: str) -> str:
    text = mean_sd(mine, 3, sign=True)
    if mine is None or other is None or name == YARDSTICK:
        return text
    # A multiple of what is nothing, or of a gain, would say nothing.
    if not (math.isfinite(mine.mean) and math.isfinite(other.mean)) or other.mean <= 0:
        return text
    return f"{text} ({number(mine.mean / other.mean, 2)}{TIMES})"


def _table(table: Table) -> str:
    return f"{table.caption}\n\n{_lines(table.head, table.rows, table.words)}"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    rule = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in [head, rule, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or DASH
