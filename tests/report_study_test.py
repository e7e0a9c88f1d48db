"""The study's sentence and table, and the tables for a README, against plain arithmetic."""

import csv
import html
import json
import random
import statistics

import pytest
from report_synthetic import COLUMNS, row, write_rows

from swe_prune import report
from swe_prune.config import RECOVERIES, SCHEDULES, SCOPES
from swe_prune.report import markdown, missing, read, records, study
from swe_prune.study import results as experiment_results

NBSP, TIMES = "\N{NO-BREAK SPACE}", "\N{MULTIPLICATION SIGN}"


def entry(seed, after, **changes):
    """A row of a study that ends so far from a control of 2.0."""
    values = {"rule": "global", "requested": 0.5, "schedule": "one-shot", "recovery": "finetune",
              "options": "", "allocation": "", "pattern": "", "control_loss": 2.0,
              "finetuned_loss": 2.0 + after, "seed": seed, "generalisation_gap": 0.2,
              "control_gap": 0.25, "criterion": "magnitude"}  # fmt: skip
    return {**row(), **values, **changes}


def write(path, rows):
    """Writes results.csv with the later columns too."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *read.ADDED], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def combine(tmp_path, table):
    """The combinations of {recovery: differences by seed}."""
    rows = [
        entry(seed, after, recovery=recovery)
        for recovery, afters in table.items()
        for seed, after in enumerate(afters)
    ]
    return study.combinations(read.load(write(tmp_path, rows)).study)


def test_the_columns_are_those_the_experiment_writes():
    assert [*read.COLUMNS, *read.ADDED] == list(experiment_results.COLUMNS)
    assert set(records.RULES) == set(SCOPES)
    assert records.USUAL[0] in SCHEDULES
    assert records.USUAL[1] in RECOVERIES


def test_a_model_better_than_its_control_on_every_seed_is_said_to_be(tmp_path):
    found = combine(tmp_path, {"rewind": [-0.05, -0.06, -0.055], "finetune": [0.01, 0.02, 0.03]})
    said = study.answer(found).replace(NBSP, " ")
    assert said.startswith("Some pruned and fine-tuned model does generalise better")
    assert "of 2 combinations over 3 seeds the best (magnitude, equal global sparsity, one-shot, " \
        "50 %, rewind) ends 0.0550 ± 0.0050 nats per token below" in said  # fmt: skip
    assert said.count(". ") == 0
    assert said.endswith(".")


def test_none_better_is_said_as_plainly(tmp_path):
    found = combine(tmp_path, {"rewind": [0.02, 0.01], "finetune": [0.03, 0.04]})
    said = study.answer(found).replace(NBSP, " ")
    assert said.startswith("No pruned and fine-tuned model generalises better than its control: ")
    assert "ends 0.0150 ± 0.0071 nats per token above" in said


def test_a_best_of_many_that_the_choice_explains_is_not_shown(tmp_path):
    # Each is the best on the seeds that it is chosen by and bad on the other one.
    found = combine(
        tmp_path,
        {
            "finetune": [0.09, -0.1, -0.1],
            "rewarm": [-0.1, 0.09, -0.1],
            "rewind": [-0.1, -0.1, 0.09],
        },
    )
    said = study.answer(found)
    assert said.startswith("It is not shown that")
    out = study.held_out(found)
    assert out is not None
    assert out.mean == pytest.approx(0.09)
    assert "measured on the one left out, the best is 0.0900" in said.replace(NBSP, " ")


def test_one_seed_cannot_say(tmp_path):
    said = study.answer(combine(tmp_path, {"finetune": [-0.2]}))
    assert said.startswith("Whether some") and "cannot be said from one seed" in said  # noqa: PT018


def test_nothing_recovered_cannot_say(tmp_path):
    rows = [entry(seed, 0, recovery="none", finetuned_loss="", control_loss="") for seed in (0, 1)]
    found = study.combinations(read.load(write(tmp_path, rows)).study)
    assert "no combination was recovered" in study.answer(found)


def test_a_combination_that_lacks_a_seed_cannot_win(tmp_path):
    found = combine(tmp_path, {"finetune": [0.01, 0.02, 0.01], "rewind": [-0.5, -0.5]})
    assert study.answer(found).startswith("No pruned")


def test_a_gain_below_the_margin_is_called_small(tmp_path):
    found = combine(tmp_path, {"finetune": [-0.004, -0.0041, -0.0042]})
    assert "which is less than the 0.01" in study.answer(found)


def test_held_out_is_the_plain_computation_on_random_numbers(tmp_path):
    rng = random.Random(3)
    table = {name: [rng.gauss(0, 0.1) for _ in range(4)] for name in ("a", "b", "c", "d", "e")}
    worth = []
    for left in range(4):
        best = min(table, key=lambda name: sum(v for s, v in enumerate(table[name]) if s != left))
        worth.append(table[best][left])
    out = study.held_out(combine(tmp_path, table))
    assert out is not None
    assert out.mean == pytest.approx(statistics.fmean(worth), rel=1e-9)
    assert out.sd == pytest.approx(statistics.stdev(worth), rel=1e-9)


def test_the_table_lists_every_combination_best_first_by_recovery(tmp_path):
    rows = [
        entry(0, 0.3, recovery="rewind", schedule="cubic"),
        entry(0, 0.1, recovery="rewind"),
        entry(0, 0.2, options="power=1", criterion="swe", allocation="erk"),
        entry(0, 0, recovery="none", finetuned_loss="", control_loss=""),
    ]
    table = study.table(study.combinations(read.load(write(tmp_path, rows)).study))
    shown = [(r[0], r[1], r[3], r[7].replace("\N{MINUS SIGN}", "-")) for r in table.rows]
    assert shown == [
        ("rewind", "magnitude", "one-shot", "+0.1000"),
        ("rewind", "magnitude", "cubic", "+0.3000"),
        ("finetune", "swe power=1 erk", "one-shot", "+0.2000"),
        ("none", "magnitude", "one-shot", "\N{EN DASH}"),
    ]
    assert table.rows[0][8:10] == ["+0.2000", "+0.2500"]
    assert all(len(r) == len(table.head) for r in table.rows)


def test_comparisons_leave_out_what_was_not_pruned_at_once_and_fine_tuned(tmp_path):
    rows = [entry(0, 0.1), entry(0, 0.2, recovery="rewind"), entry(0, 0.3, schedule="cubic")]
    results = read.load(write(tmp_path, rows))
    assert len(results.study) == 3
    assert [one.finetuned_loss for one in results.rows] == [2.1]


def test_without_usual_cells_all_are_compared_under_longer_names(tmp_path):
    rows = [entry(0, 0.2, recovery="rewind"), entry(0, 0.3, schedule="cubic")]
    results = read.load(write(tmp_path, rows))
    names = [one.criterion for one in results.rows]
    assert names == ["magnitude one-shot rewind", "magnitude cubic finetune"]
    assert report.build(tmp_path)


def test_the_page_has_the_study_and_the_tables_are_beside_it(tmp_path):
    rows = [entry(s, -0.05 - 0.001 * s, recovery=r) for s in (0, 1) for r in ("rewind", "finetune")]
    page, *_, tables = report.build(write(tmp_path, rows))
    text = html.unescape(page.read_text())
    said = study.answer(study.combinations(read.load(tmp_path).study))
    assert said in text
    assert 'id="study"' in text
    assert said in tables.read_text()
    assert "| Recovery | Criterion |" in tables.read_text()


def test_a_grid_of_usual_cells_has_no_study(tmp_path):
    page, *_ = report.build(write(tmp_path, [entry(0, 0.1)]))
    assert 'id="study"' not in page.read_text()


def test_tables_for_a_readme_are_the_plain_arithmetic(tmp_path):
    rows = []
    pruned = {"magnitude": [2.4, 2.6], "swe": [2.2, 2.3]}
    tuned = {"magnitude": [2.1, 2.3], "swe": [1.9, 2.2]}
    for name, losses in pruned.items():
        for seed, loss in enumerate(losses):
            after = tuned[name][seed] - 2.0
            rows.append(entry(seed, after, criterion=name, pruned_loss=loss, dense_loss=2.0))
    results = read.load(write(tmp_path, rows))
    lines = markdown.document(results).replace(NBSP, " ").splitlines()
    assert lines[-4] == "| criterion | 50 % before | 50 % after |"
    assert lines[-3] == "| --- | ---: | ---: |"
    assert lines[-2] == f"| `swe` | +0.250 ± 0.071 (0.50{TIMES}) | +0.050 ± 0.212 (0.25{TIMES}) |"
    assert lines[-1] == "| `magnitude` | +0.500 ± 0.141 | +0.200 ± 0.141 |"


def test_missing_cells_of_the_list_are_named_as_the_run_names_them(tmp_path):
    cells = [
        {"criterion": "magnitude", "scope": "global", "sparsity": 0.5, "options": {},
         "schedule": "one-shot", "recovery": "finetune", "recovery_steps": 500, "seeds": None},
        {"criterion": "swe", "scope": "global", "sparsity": 0.5, "options": {"power": 1.0},
         "allocation": None, "pattern": None, "schedule": "cubic", "recovery": "rewind",
         "recovery_steps": 7, "seeds": [0]},
    ]  # fmt: skip
    write(tmp_path, [entry(0, 0.1)])
    study_settings = {"cells": cells, "seeds": [0, 1]}
    config = {"study": study_settings, "finetune": {"steps": 500}}
    (tmp_path / "config.json").write_text(json.dumps({"fingerprint": "x", "config": config}))
    said = " ".join(missing.missing(read.load(tmp_path))).replace(NBSP, " ")
    assert "2 of 3 cells not finished: magnitude global 50 % (seed 1), " in said
    assert ", swe power=1 cubic rewind-7 global 50 % (seed 0)." in said
    done = entry(0, 0, criterion="swe", options="power=1", schedule="cubic", recovery="rewind-7")
    write(tmp_path, [entry(0, 0.1), entry(1, 0.1), done])
    assert not any("not finished" in line for line in missing.missing(read.load(tmp_path)))


def test_a_table_of_before_the_later_columns_is_read_as_usual_cells(tmp_path):
    results = read.load(write_rows(tmp_path, [row()]))
    assert results.study == results.rows
    assert results.rows[0].plain
    assert results.rows[0].generalisation_gap is None
