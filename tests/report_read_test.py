"""What is there is read, what is malformed is refused by its name, what is missing is said."""

import json
import typing

import pytest
from etils import epath
from report_synthetic import make, row, write_rows

from swe_prune.errors import InputError
from swe_prune.report import files, read
from swe_prune.report.records import key_of
from swe_prune.report.sections import missing
from swe_prune.study.results import COLUMNS
from swe_prune.training import metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"), seeds=(0,), std_seeds=(0,), criteria=("swe",))


def test_a_whole_directory_is_read(whole):
    results = read.load(whole)
    assert len(results.rows) == 3 * 5 + 2 * 6
    assert results.name == "shakespeare"
    assert len(results.details) == len(results.rows)
    assert {key_of(row) for row in results.rows} == set(results.details)
    assert results.trajectories[0].steps[-1] == 5000
    assert results.training[0][-1]["validation_loss"] > 0
    assert missing(results) == []


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"has no results\.csv.*run the experiment"):
        read.load(tmp_path)


def test_no_finished_cell(tmp_path):
    with pytest.raises(InputError, match="no finished cell"):
        read.load(write_rows(tmp_path, []))


def test_empty_losses_are_not_measured_and_nan_is(tmp_path):
    write_rows(tmp_path, [row(finetuned_loss="", control_loss="", pruned_loss="nan")])
    (found,) = read.load(tmp_path).rows
    assert found.finetuned_loss is found.control_loss is None
    assert found.pruned_loss != found.pruned_loss


def test_control_comes_from_its_own_file_where_the_row_is_older(tmp_path):
    write_rows(tmp_path, [row(control_loss="")])
    (tmp_path / "seed_0" / "control").mkdir(parents=True)
    (tmp_path / "seed_0" / "control" / "result.json").write_text('{"control_loss": 1.25}')
    assert read.load(tmp_path).rows[0].control_loss == 1.25


def test_the_last_row_of_a_cell_counts(tmp_path):
    results = read.load(write_rows(tmp_path, [row(), row(pruned_loss=7.0)]))
    assert [one.pruned_loss for one in results.rows] == [7.0]
    assert "Rows of results.csv replaced by a later row: 1" in missing(results)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dense_loss": "low"}, "dense_loss = 'low'"),
        ({"dense_loss": ""}, "dense_loss = ''"),
        ({"seed": "1.5"}, r"seed = '1\.5'"),
        ({"scope": "globl"}, "did you mean 'global'"),
        ({"sparsity_prunable": 60}, "outside 0 to 1"),
        ({"rate": "inf"}, "one must be a finite number"),
        ({"rate": 1.0, "sparsity": 0.5}, "one must be a finite number"),
        ({"rate": "", "sparsity": ""}, "one must be a finite number"),
        ({"criterion": ""}, "neither a criterion nor a method"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path, changes, reason):
    write_rows(tmp_path, [row(), row(**changes)])
    with pytest.raises(InputError, match=rf"results\.csv' line 3 .*{reason}"):
        read.load(tmp_path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(COLUMNS[:-1]) + "\n"])
def test_other_columns_are_refused(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(InputError, match=r"results\.csv' must have the columns seed,"):
        read.load(tmp_path)


def test_a_short_row_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text(",".join(COLUMNS) + "\n0,swe\n")
    with pytest.raises(InputError, match="line 2 has 2 values and not 36"):
        read.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", b"\xff\xfe\x00"),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"config": 3}'),
        ("seed_0/dense/metrics.jsonl", b'{"step": 1}\n{"step": \n{"step": 3}\n'),
        ("seed_0/dense/metrics.jsonl", b'{"loss": 1}\n'),
        ("seed_0/dense/trajectory.jsonl", b'{"step": 0}\n'),
        ("seed_0/dense/trajectory.jsonl", b'{"step": 0, "values": {"a": 1}}\n'),
        (
            "seed_0/dense/trajectory.jsonl",
            b'{"step": 0, "values": {"a": [1]}}\n{"step": 1, "values": {"a": [1, 2]}}\n',
        ),
        ("seed_0/control/result.json", b"\xff"),
        ("seed_0/cells/x/result.json", b"{}"),
        (
            "seed_0/cells/x/result.json",
            json.dumps(
                {**row(), "histogram": {"edges": [0, 1, 2], "dense": [1], "pruned": [1, 1]}}
            ).encode(),
        ),
        ("seed_0/cells/x/result.json", json.dumps({**row(), "tensors": {"a": 3}}).encode()),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, text):
    write_rows(tmp_path, [row()])
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    with pytest.raises(InputError, match=path.name):
        read.load(tmp_path)


@pytest.mark.parametrize("cut", ['{"step": 9, "lo', '{"step": 9}', "\0\0"])
def test_both_readers_of_a_log_leave_out_an_incomplete_last_line(tmp_path, cut):
    write_rows(tmp_path, [row()])
    path = epath.Path(tmp_path / "seed_0/dense/metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "loss": 2.5}\n' + cut)
    assert read.load(tmp_path).training == {0: [{"step": 1, "loss": 2.5}]}
    assert metrics.read_lines(path) == [{"step": 1, "loss": 2.5}]


def test_both_readers_of_a_log_name_its_broken_line(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    for broken in ('{"step": ', '{"loss": 1}', '{"step": -1}', "[]"):
        path.write_text(f'{{"step": 1}}\n\n{broken}\n{{"step": 3}}\n')
        for lines in (metrics.read_lines, files.read_lines):
            with pytest.raises(InputError, match=r"metrics\.jsonl.*line 3"):
                list(lines(path))


def test_what_is_missing_is_said(tmp_path):
    make(tmp_path, seeds=(0, 1), std_seeds=(0,), finetuned=False, details=False)
    lines = (tmp_path / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(lines[:-7]))
    said = missing(read.load(tmp_path))
    assert "Cells pruned: 80 of 87" in said
    assert "Pruned cells fine-tuned: 0 of 80" in said
    assert "Controls trained: 0 of 2" in said
    assert any("Training curve: left out" in line for line in said)


def test_without_settings_nothing_is_known_of_the_missing(tmp_path):
    said = missing(read.load(write_rows(tmp_path, [row()])))
    assert any("unknown without a config.json" in line for line in said)


def test_settings_of_another_version_leave_the_number_of_cells_open(tmp_path):
    write_rows(tmp_path, [row()])
    (tmp_path / "config.json").write_text('{"config": {"unheard_of": 1}}')
    results = read.load(tmp_path)
    assert results.wanted is None
    assert results.config == {"unheard_of": 1}


def test_a_table_of_an_earlier_version_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "results.csv").write_text("seed,criterion,rule,requested\n0,swe,std,1.4\n")
    with pytest.raises(InputError, match=r"earlier version.*run the experiment again"):
        read.load(tmp_path)


def test_each_recovery_has_its_control(tmp_path):
    rows = [row(control_loss="", recovery=name) for name in ("finetune", "rewind-200", "none")]
    write_rows(tmp_path, rows)
    for folder, loss in (("control", 1.25), ("control-rewind-200", 1.5)):
        (tmp_path / "seed_0" / folder).mkdir(parents=True)
        text = json.dumps({"control_loss": loss})
        (tmp_path / "seed_0" / folder / "result.json").write_text(text)
    assert [one.control_loss for one in read.load(tmp_path).rows] == [1.25, 1.5, None]


def test_every_column_is_read_as_the_type_of_its_field(tmp_path):
    values = {"method": "sparsegpt", "criterion": "", "options": "a=1", "allocation": "erk",
              "scope": "row", "sparsity": 0.5, "pattern": "2:4", "pruned_kl": 0.25}  # fmt: skip
    (found,) = read.load(write_rows(tmp_path, [row(**values)])).rows
    assert {name: getattr(found, name) for name in values} == values
    assert found.rate is None
    hints = typing.get_type_hints(type(found))
    for column in COLUMNS:
        assert isinstance(getattr(found, column), hints[column])


@pytest.mark.parametrize("empty", ["", None])
def test_a_detail_belongs_to_its_row_however_emptiness_is_written(tmp_path, empty):
    values = row(sparsity=0.5, rate=empty, method=empty, options=empty)
    write_rows(tmp_path, [values])
    path = tmp_path / "seed_0" / "cells" / "x" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**values, "tensors": {"a": {"kept": 1, "total": 4}}}))
    results = read.load(tmp_path)
    assert results.details[key_of(results.rows[0])].tensors == {"a": (1, 4)}
