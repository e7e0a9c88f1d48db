import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from swe_prune import cli, masks, study, tree
from swe_prune.config import StudyConfig, TrajectoryConfig
from swe_prune.errors import InputError
from swe_prune.recipe import Evidence, Recipe, prune
from swe_prune.study import grid, results, saved
from swe_prune.training.metrics import read_lines
from swe_prune.training.progress import Progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plays_dir):
    """The tiny experiment run once through the command line."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny.config_file(folder, tiny.config(plays_dir))
    code = cli.main(["run", f"--config={config}", f"--workdir={folder / 'work'}"])
    assert code == 0
    return folder / "work"


def table(workdir):
    with (workdir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_per_cell_with_every_column_filled(finished, plays_dir):
    rows = table(finished)
    cells = grid.cells(tiny.config(plays_dir))
    assert len(rows) == len(cells) == 4 + 12
    assert tuple(rows[0]) == results.COLUMNS
    for row, cell in zip(rows, cells, strict=True):
        asked = cell.recipe
        assert (int(row["seed"]), row["criterion"], row["scope"]) == (
            cell.seed,
            asked.criterion,
            asked.scope,
        )
        assert [row["sparsity"], row["rate"]] == [
            "" if amount is None else str(amount) for amount in (asked.sparsity, asked.rate)
        ]
        assert (row["schedule"], row["recovery"]) == ("one_shot", "finetune")
        empty = ("method", "options", "allocation", "pattern", "restore", "include")
        assert [row[name] for name in empty] == [""] * 6
        words = ("criterion", "scope", "schedule", "recovery", "sparsity", "rate", *empty)
        of_samples = [
            name for name in results.COLUMNS if name.endswith(("_kl", "_repetition", "_mae"))
        ]
        assert [row[name] for name in of_samples] == [""] * 8  # no samples, no prices
        for column in results.COLUMNS:
            if column not in (*words, *of_samples):
                assert np.isfinite(float(row[column]))


def test_equal_sparsity_is_met_to_the_weight(finished):
    for path in finished.glob("seed_*/cells/*/result.json"):
        cell = json.loads(path.read_text())
        tensors = cell["tensors"].values()
        total = sum(t["total"] for t in tensors)
        removed = total - sum(t["kept"] for t in tensors)
        assert cell["sparsity_prunable"] == removed / total
        if cell["rate"] == "":
            assert removed == int(total * cell["sparsity"] + 0.5)
        if cell["rate"] == "" and cell["scope"] == "tensor":
            assert all(2 * t["kept"] == t["total"] for t in tensors)
        assert sum(cell["histogram"]["dense"]) == total
        assert sum(cell["histogram"]["pruned"]) == total - removed
        assert sum(cell["histogram"]["finetuned"]) == total - removed


def test_swe_spread_ranks_as_magnitude_within_a_tensor_and_swe_does_not(finished, plays_dir):
    settings = tiny.config(plays_dir)
    shared = study.setup(settings, finished)
    dense = saved.load_dense(shared, 0)
    evidence = Evidence(stats=dense.stats)

    def mask(criterion):
        request = Recipe(criterion, sparsity=0.5)
        return prune(request, dense.params, evidence, prunable=shared.prunable)[1]

    def agree(a, b):
        return all(
            (np.asarray(x) == np.asarray(y)).all()
            for (_, x), (_, y) in zip(tree.named_leaves(a), tree.named_leaves(b), strict=True)
            if x is not None
        )

    assert agree(mask("swe_spread"), mask("magnitude"))
    assert not agree(mask("swe"), mask("magnitude"))


def test_the_masks_on_disk_are_those_of_the_table(finished, plays_dir):
    settings = tiny.config(plays_dir)
    shared = study.setup(settings, finished)
    for row, cell in zip(table(finished), grid.cells(settings), strict=True):
        summary = masks.summary(saved.load_masks(shared, cell))
        assert float(row["sparsity_prunable"]) == summary.sparsity


@pytest.mark.slow
def test_running_again_changes_nothing(finished, plays_dir, capsys):
    before = (finished / "results.csv").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in finished.glob("seed_*/**/result.json")}
    assert stamps
    assert cli.main(["run", f"--workdir={finished}"]) == 0
    assert (finished / "results.csv").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_every_phase_is_in_the_ledger_once(finished, plays_dir):
    rows = list(csv.DictReader((finished / "ledger.csv").read_text().splitlines()))
    settings = tiny.config(plays_dir)
    cells = [f"seed_{cell.seed}/{cell.name}" for cell in grid.cells(settings)]
    by_phase = {}
    for row in rows:
        by_phase.setdefault(row["phase"], []).append(row["cell"])
        assert row["status"] == "done"
        assert 0 <= float(row["joules_low"]) <= float(row["joules"]) <= float(row["joules_high"])
    assert sorted(by_phase["prune"]) == sorted(by_phase["finetune"]) == sorted(cells)
    assert (
        len(by_phase["train"])
        == len(by_phase["control"])
        == len({c.seed for c in grid.cells(settings)})
    )
    (trained, *_) = (row for row in rows if row["phase"] == "train")
    per_step = settings.data.batch * settings.window
    assert int(trained["tokens"]) == settings.train.steps * per_step
    page = (finished / "report" / "report.html").read_text()
    assert "CO2e" in page
    assert "finetune" in page


def test_evaluate_computes_the_recorded_losses_again(finished, plays_dir):
    shared = study.setup(tiny.config(plays_dir), finished)
    rows = study.evaluate(shared, Progress())
    assert len(rows) == 2 + 16
    for row in rows:
        assert row["computed"] == pytest.approx(row["recorded"], rel=1e-6), row["model"]


def test_trajectory_samples_follow_the_weights(finished):
    lines = read_lines(finished / "seed_0" / "dense" / "trajectory.jsonl")
    assert [line["step"] for line in lines] == list(range(0, 25, 3))
    first, last = lines[0]["values"], lines[-1]["values"]
    for name in first:
        assert len(first[name]) == 48
        assert first[name] != last[name]
    cell = json.loads((finished / "seed_0/cells/tensor-magnitude-0.5/result.json").read_text())
    for name, kept in cell["sample_kept"].items():
        kept = np.array(kept)
        sizes = np.abs(last[name])
        assert sizes[kept].min() >= sizes[~kept].max()


@pytest.mark.slow
def test_a_phase_at_a_time_ends_with_the_same_table(finished, tmp_path, plays_dir):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'work'}"]
    for command in ("train", "prune", "finetune"):
        assert cli.main([command, *arguments]) == 0
    for ours, theirs in zip(table(tmp_path / "work"), table(finished), strict=True):
        ours.pop("seconds"), theirs.pop("seconds")
        assert ours == theirs


@pytest.mark.slow
def test_a_rate_that_prunes_everything_stops_before_fine_tuning_and_keeps_the_rest(
    finished, tmp_path, plays_dir, capsys
):
    settings = tiny.config(plays_dir)
    study = dataclasses.replace(settings.study, std_rates=(0.5, 90.0))
    config = tiny.config_file(tmp_path, dataclasses.replace(settings, study=study))
    work = tmp_path / "work"
    assert cli.main(["run", f"--config={config}", f"--workdir={work}"]) == 2
    assert "'std-swe-90' of seed 0: rate = 90.0 prunes every weight; lower it" in (
        capsys.readouterr().err
    )
    assert (work / "seed_0/dense/result.json").exists()
    assert (work / "seed_0/cells/std-swe-0.5/result.json").exists()
    assert not (work / "seed_0/control/result.json").exists()


def test_a_diverged_run_says_where_and_saves_no_checkpoint_of_it(tmp_path, plays_dir, capsys):
    settings = tiny.config(plays_dir)
    train = dataclasses.replace(settings.train, learning_rate=1e38, warmup=0, steps=24)
    config = tiny.config_file(tmp_path, dataclasses.replace(settings, train=train))
    work = tmp_path / "work"
    assert cli.main(["train", f"--config={config}", f"--workdir={work}"]) == 1
    message = capsys.readouterr().err
    assert "training diverged; lower the learning rate" in message
    assert len(message.strip().splitlines()[-1].split("swe_prune: ")) == 2
    assert not list((work / "seed_0/dense/checkpoints").glob("[0-9]*"))


def test_a_damaged_result_is_made_again(finished, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    damaged = work / "seed_0/cells/tensor-swe-0.5/result.json"
    before = json.loads(damaged.read_text())
    damaged.write_text(damaged.read_text()[:100])
    assert cli.main(["prune", f"--workdir={work}"]) == 0
    assert "cell tensor-swe-0.5: damaged" in capsys.readouterr().err
    assert json.loads(damaged.read_text())["pruned_loss"] == before["pruned_loss"]


def test_another_config_is_refused_with_the_difference(finished, tmp_path, plays_dir, capsys):
    settings = dataclasses.replace(tiny.config(plays_dir), log_every=7)
    config = tiny.config_file(tmp_path, settings)
    assert cli.main(["run", f"--config={config}", f"--workdir={finished}"]) == 2
    assert "made by another config: log_every (4 there, 7 now)" in capsys.readouterr().err


def test_a_second_run_on_the_workdir_is_refused(tmp_path, plays_dir):
    settings = tiny.config(plays_dir)
    workdir = study.Workdir(tmp_path)
    with (
        study.claim(workdir, settings),
        pytest.raises(InputError, match="is in use by another run"),
        study.claim(workdir, settings),
    ):
        pass
    with study.claim(workdir, settings):
        pass


def test_cells_are_unique_and_their_needs_are_checked(plays_dir):
    settings = tiny.config(plays_dir)
    assert grid.measures(settings) == ("late_mean",)
    doubled = dataclasses.replace(
        settings, study=dataclasses.replace(settings.study, sparsities=(0.5, 0.5))
    )
    assert grid.cells(doubled) == grid.cells(settings)
    lacking = dataclasses.replace(settings, trajectory=TrajectoryConfig(measures=("votes",)))
    with pytest.raises(InputError, match="lacks 'late_mean'"):
        grid.measures(lacking)
    nothing = dataclasses.replace(settings, study=StudyConfig(std_criteria=(), criteria=()))
    with pytest.raises(InputError, match="no cells"):
        grid.cells(nothing)


def test_late_mean_values_can_go_on_instead_of_the_final_ones(finished, plays_dir):
    settings = tiny.config(plays_dir)
    averaged = dataclasses.replace(
        settings, prune=dataclasses.replace(settings.prune, values_from="late_mean")
    )
    shared = study.setup(averaged, finished)
    dense = saved.load_dense(shared, 0)
    values = saved.starting_values(shared, dense)
    late = dense.stats.buffers["late_mean"]["block_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(values["block_0"]["mlp"]["up"]["kernel"], late)
    np.testing.assert_array_equal(
        values["final_norm"]["scale"], dense.params["final_norm"]["scale"]
    )
