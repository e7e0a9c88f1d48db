"""The comparison table and its sentence say what the numbers say, whichever way they fall out."""

import csv
import html
import json
import math
import random
import re
import statistics

import pytest
from report_synthetic import row, rows_of, write_rows

from swe_prune import report
from swe_prune.report import comparison, formats, markdown, read, records, stats, tables
from swe_prune.study import results

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def compared(rows, group="tensor", recovered=True):
    return comparison.compare(stats.summarise(rows), records.CellGroup(group), recovered)


def said(rows):
    return comparison.headline(stats.summarise(rows)).replace(formats.NBSP, " ")


def shown(found):
    """The comparison as {name: entries}, and its caption."""
    table = tables.comparison(found)
    entries = {name: [e.replace(formats.NBSP, " ") for e in rest] for name, *rest in table.rows}
    return entries, table.caption.replace(formats.NBSP, " ")


def written(rows):
    """Rows with the losses of {criterion: {level: losses minus the control's, by seed}}."""
    return [
        one
        for name, levels in rows.items()
        for level, costs in levels.items()
        for seed, cost in enumerate(costs)
        for one in rows_of({level: cost}, name, seeds=(seed,), scatter=0)
    ]


def test_every_entry_is_the_plain_arithmetic_and_the_lowest_of_a_column_is_bold():
    rng = random.Random(1)
    names, levels = ["swe", "magnitude", "votes", "random"], [0.3, 0.6, 0.9]
    costs = {name: {at: [rng.gauss(0, 0.1) for _ in range(4)] for at in levels} for name in names}
    found = compared(written(costs))
    assert (found.names, found.levels, found.seeds) == (names, levels, 4)
    entries, _ = shown(found)
    for column, at in enumerate(levels):
        best = min(names, key=lambda name: statistics.fmean(costs[name][at]))
        assert found.best[at] == best
        bold = [row[0] for row in tables.comparison(found).rows
                if isinstance(row[1 + column], tables.Bold)]  # fmt: skip
        assert bold == [best]
        for name in names:
            mean, sd = statistics.fmean(costs[name][at]), statistics.stdev(costs[name][at])
            expected = f"{formats.signed(mean)} ± {sd:.4f}"
            assert entries[name][column].removeprefix(f"{tables.NEAR} ") == expected
            changes = [a - b for a, b in zip(costs[name][at], costs[best][at], strict=True)]
            near = name != best and statistics.fmean(changes) <= statistics.stdev(changes)
            assert entries[name][column].startswith(tables.NEAR) == near
            assert (name in found.near[at]) == near


def test_the_margin_is_of_the_paired_difference_and_not_of_the_scatter_of_the_seeds():
    costs = {"swe": {0.6: [0.1, 0.3]}, "magnitude": {0.6: [0.11, 0.31]}, "votes": {0.6: [0.3, 0.1]}}
    found = compared(written(costs))
    assert found.best == {0.6: "swe"}
    assert found.near == {0.6: {"votes"}}  # its mean is equal; magnitude is worse on every seed


def test_with_one_seed_no_margin_can_be_told_and_the_table_says_so():
    found = compared(written({"swe": {0.6: [0.1]}, "magnitude": {0.6: [0.1001]}}))
    entries, caption = shown(found)
    assert entries == {"swe": ["+0.1000"], "magnitude": ["+0.1001"]}
    assert found.best == {0.6: "swe"}
    assert "n = 1 seed." in caption
    assert "with one seed no margin can be told" in caption
    assert "±" not in caption


def test_fewer_seeds_than_the_others_cannot_be_best_and_are_said():
    costs = {"swe": {0.6: [0.1, 0.1]}, "magnitude": {0.6: [0.0]}}
    found = compared(written(costs))
    entries, caption = shown(found)
    assert found.best == {0.6: "swe"}
    assert entries["magnitude"] == ["0.0000 (n=1)"]
    assert "n = 2 seeds" in caption


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_diverged_model_is_never_best_nor_near(lost):
    found = compared(written({"swe": {0.6: [lost, 0.0]}, "magnitude": {0.6: [5.0, 5.0]}}))
    entries, _ = shown(found)
    assert found.best == {0.6: "magnitude"}
    assert found.near == {0.6: set()}
    assert entries["swe"] == ["diverged (1 of 2)"]
    everything = compared(written({"swe": {0.6: [lost, lost]}}))
    assert everything.best == {}


def test_a_level_that_a_criterion_was_not_pruned_to_is_a_dash():
    found = compared([*rows_of({0.3: 0.0, 0.6: 0.1}), *rows_of({0.6: 0.2}, "random")])
    assert shown(found)[0]["random"][0] == DASH


def test_scopes_and_the_papers_rule_are_compared_apart():
    rule = rows_of({0.5: 0.0, 0.7: 0.1}, sparsity=None, rate=1.4, sparsity_prunable=0.66)[:1]
    rows = [*rows_of({0.6: 0.1}), *rows_of({0.6: 0.2}, scope="global"), *rule]
    assert shown(compared(rows))[0]["swe"][0].startswith("+0.1")
    assert shown(compared(rows, "global"))[0]["swe"][0].startswith("+0.2")
    assert compared(rows, "row") is None
    found = compared(rows, "rate")
    table = tables.comparison(found)
    assert table.head[1] == "rate 1.4"
    assert found.best == {}  # one rate leads to a different sparsity with every criterion
    assert shown(found)[0]["swe"] == [f"{MINUS}0.0010 at 66 %"]


def test_other_schedules_recoveries_patterns_and_allocations_are_rows_by_their_full_name():
    rows = [
        *rows_of({0.5: 0.1}),
        *rows_of({0.5: 0.2}, schedule="cubic", recovery="rewind-200"),
        *rows_of({0.5: 0.3}, pattern="2:4"),
        *rows_of({0.5: 0.4}, allocation="owl", options="power=1"),
        *rows_of({0.5: 0.5}, criterion="", method="sparsegpt"),
    ]
    assert compared(rows).names == [
        "swe", "swe 2:4", "swe cubic rewind-200", "swe power=1 owl", "blockwise sparsegpt",
    ]  # fmt: skip


def test_where_nothing_is_fine_tuned_the_losses_straight_after_pruning_are_compared():
    rows = [*rows_of({0.6: 0.1}, finetuned_loss=None),
            *rows_of({0.6: 0.2}, "magnitude", finetuned_loss=None)]  # fmt: skip
    assert compared(rows) is None
    found = compared(rows, recovered=False)
    entries, caption = shown(found)
    assert found.best == {0.6: "swe"}
    assert entries["swe"] == ["+1.4700 ± 0.0000"]  # 2.5 + 10 × 0.1 − 2.03
    assert "straight after pruning minus the dense model's" in caption
    text = said(rows)
    assert "swe (equal sparsity per tensor) has the lowest loss before fine-tuning, +1.4700" in text
    assert "against the dense model (" in text


def test_the_headline_names_the_winner_and_the_papers_criterion_with_their_numbers():
    costs = {"swe": {0.6: [0.04, 0.05]}, "magnitude": {0.6: [0.01, 0.02]}, "random": {0.6: [1, 1]}}
    assert said(written(costs)) == (
        "At 60 % sparsity magnitude (equal sparsity per tensor) has the lowest fine-tuned loss, "
        "+0.0150 ± 0.0071 nats per token against the control (mean ± standard deviation of 2 "
        "seeds); the paper's criterion, swe (equal sparsity per tensor), is at +0.0450 ± 0.0071, a "
        "paired difference of +0.0300 ± 0.0000 to the winner."
    )


def test_the_headline_names_the_best_other_criterion_where_the_papers_wins():
    costs = {"swe": {0.6: [0.0, 0.0]}, "votes": {0.6: [0.1, 0.2]}, "magnitude": {0.6: [0.2, 0.2]}}
    text = said(written(costs))
    assert text.startswith("At 60 % sparsity swe (")
    assert "the best other criterion, votes (" in text
    assert "magnitude" not in text


def test_the_headline_says_where_the_difference_is_within_the_margin():
    costs = {"swe": {0.6: [0.04, 0.0]}, "magnitude": {0.6: [0.01, 0.02]}}
    assert said(written(costs)).endswith(" to the winner, which is within the margin.")


def test_the_headline_concludes_nothing_from_one_seed():
    text = said(written({"swe": {0.6: [0.04]}, "magnitude": {0.6: [0.01]}}))
    assert text.endswith("; one seed cannot tell a difference from chance.")
    assert "±" not in text
    assert not re.search(r"\b(holds|margin|beats|better)\b", text)


def test_the_headline_is_about_the_level_nearest_to_sixty_per_cent():
    assert said(rows_of({0.3: 0.0, 0.5: 0.1, 0.9: 0.2})).startswith("At 50 % sparsity swe")


def test_the_headline_takes_the_winner_of_all_scopes():
    rows = [*rows_of({0.6: 0.2}), *rows_of({0.6: 0.1}, "magnitude", "global")]
    assert said(rows).startswith("At 60 % sparsity magnitude (equal global sparsity) has")


def test_the_headline_without_equal_sparsities_gives_the_sparsity_of_each():
    rows = [*rows_of({0.66: 0.1}, rate=1.4, sparsity=None),
            *rows_of({0.58: 0.05}, "magnitude", rate=1.0, sparsity=None)]  # fmt: skip
    text = said(rows)
    assert text.startswith(
        "With the paper's rule, at the rates nearest to 60 % sparsity, magnitude"
    )
    assert "magnitude (rate 1, 58 % sparsity)" in text
    assert "swe (rate 1.4, 66 % sparsity)" in text


def test_the_headline_without_the_papers_criterion_names_the_winner_alone():
    text = said(rows_of({0.6: 0.1}, "magnitude"))
    assert "paper" not in text
    assert text.endswith("(mean ± standard deviation of 3 seeds).")


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_the_headline_prints_no_nan(lost):
    rows = [*rows_of({0.6: lost}), *rows_of({0.6: 0.1}, "magnitude")]
    text = said(rows)
    assert "the paper's criterion diverged" in text
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    assert said(rows_of({0.6: lost})) == "At 60 % sparsity every model diverged."


def test_the_tables_are_beside_the_page_as_markdown(tmp_path):
    rows = [
        row(seed=seed, criterion=name, sparsity=0.6, finetuned_loss=1.95 + cost)
        for seed in (0, 1)
        for name, cost in (("swe", 0.1 + 0.01 * seed), ("votes", 0.2))
    ]
    page, *_, beside = report.build(write_rows(tmp_path, rows))
    text = beside.read_text().replace(formats.NBSP, " ")
    lines = text.splitlines()
    assert "| Criterion | 60 % |" in lines
    assert "| swe | **+0.1050 ± 0.0071** |" in lines
    assert "| votes | +0.2000 ± 0.0000 |" in lines
    assert said(read.load(tmp_path).rows) in text
    page_text = html.unescape(page.read_text()).replace(formats.NBSP, " ")
    assert "<strong>+0.1050 ± 0.0071</strong>" in page_text


def test_markdown_escapes_what_would_end_a_column():
    table = tables.Table("Caption.", ["a", "b"], [["x|y", ""]])
    assert markdown.document("t", "l", [table]).splitlines()[-1] == f"| x\\|y | {DASH} |"


def test_perplexities_and_samples_are_shown_where_a_study_writes_them(tmp_path):
    rows = [row(pruned_kl=0.5, finetuned_kl=0.25, pruned_loss=math.log(20), control_loss="")]
    found = read.load(write_rows(tmp_path, rows))
    cells = stats.summarise(found.rows)
    table = tables.perplexities(found, cells)
    assert all(len(line) == len(table.head) for line in table.rows)
    assert table.rows[-1][0] == "swe"
    assert table.rows[-1][3] == "20.00"
    assert table.rows[-1][5:7] == ["0.500", "0.250"]


def test_the_samples_of_the_first_seed_stand_beside_their_prompt(tmp_path):
    values = [row(seed=seed, pruned_kl=0.5) for seed in (3, 4)]
    write_rows(tmp_path, values)
    for one in values:
        path = tmp_path / f"seed_{one['seed']}" / "cells" / "x" / "result.json"
        path.parent.mkdir(parents=True)
        texts = {f"{stage}_samples": [{"prompt": "You", "text": f"{stage}\n {one['seed']}"}]
                 for stage in ("pruned", "finetuned")}  # fmt: skip
        path.write_text(json.dumps({**one, **texts}))
    table = tables.samples(read.load(tmp_path))
    assert table.rows == [["swe", f"60{formats.NBSP}%", "You", "pruned 3", "finetuned 3"]]
    assert "seed 3" in table.caption


def test_the_table_of_all_cells_lists_every_cell_of_a_comparison():
    rows = [*rows_of({0.3: 0.1, 0.6: 0.2}), *rows_of({0.6: 0.1}, "votes", "global"),
            *rows_of({0.6: 0.1}, recovery="none", finetuned_loss=None)]  # fmt: skip
    table = tables.cells(stats.summarise(rows), records.CellGroup("tensor"))
    assert [line[0] for line in table.rows] == ["swe", "swe", "swe no recovery"]
    assert all(len(line) == len(table.head) for line in table.rows)
    assert table.rows[2][6] == DASH


def test_the_header_of_the_table_is_the_fields_of_the_row(tmp_path):
    with (write_rows(tmp_path, [row()]) / "results.csv").open() as file:
        assert tuple(next(csv.reader(file))) == results.COLUMNS
    assert results.COLUMNS[:5] == ("seed", "criterion", "method", "options", "allocation")
    assert results.COLUMNS[-1] == "seconds"
