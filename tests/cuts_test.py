"""Cuts of a study: smaller arrays, recovered, next to smaller shapes, and when they have paid."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from swe_prune import calibration, cli, importance, structured, study, tree
from swe_prune.config import CellConfig, CutConfig, LedgerConfig, StudyConfig, validate
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.structured.refit import refit
from swe_prune.study import cut_shapes, cuts, saved, serving

CUT = CutConfig(criterion="swe", sparsity=0.5, smaller=(0.5, 0.25))
NAME = "seed_0/cuts/neurons-swe-0.5-restored"


def config(plays_dir, **changes):
    usual = tiny.config(plays_dir)
    return dataclasses.replace(
        usual,
        data=dataclasses.replace(usual.data, eval_batch=2),
        calibration=dataclasses.replace(usual.calibration, windows=8, batch=4),
        study=StudyConfig(
            std_criteria=(), criteria=("magnitude",), sparsities=(0.5,), scopes=("tensor",),
            seeds=(0,),
        ),
        cuts=(CUT,),
        # A margin that any model of this size is within, so that the smallest shape is chosen.
        ledger=LedgerConfig(windows=3, window_seconds=0.01, batch=2, margin=9.0),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plays_dir):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("cut")
    path = tiny.config_file(folder, config(plays_dir))
    assert cli.main(["run", f"--config={path}", f"--workdir={folder / 'work'}"]) == 0
    return folder / "work"


def read(folder, name):
    return json.loads((folder / NAME / name).read_text())


@pytest.mark.slow
def test_the_cut_model_is_smaller_and_has_its_shapes_next_to_it(finished, plays_dir):
    result = read(finished, "result.json")
    sizes = result["parameters"]
    assert sizes["cut"] == sizes["smaller_0.5"] < sizes["smaller_0.25"] < sizes["dense"]
    assert result["kept"] == 32
    assert {len(values) for values in result["losses"].values()} == {4}  # batches
    settings = config(plays_dir)
    shared = study.setup(settings, finished)
    small = cuts._smaller(shared, CUT, 0.5)
    params = saved.restored(finished / NAME / "recovered", small.abstract_params)
    assert tree.size(params) == sizes["cut"]
    assert cuts._losses(small, params) == result["losses"]["recovered"]


@pytest.mark.slow
def test_every_phase_of_a_cut_is_in_the_ledger(finished):
    rows = list(csv.DictReader((finished / "ledger.csv").read_text().splitlines()))
    phases = [row["phase"] for row in rows if row["cell"] == "seed_0/neurons-swe-0.5-restored"]
    assert phases == ["cut", "recover", "smaller", "smaller", "serve"]
    (recovered,) = [row for row in rows if row["phase"] == "recover"]
    assert int(recovered["tokens"]) == 4 * 4 * 16


@pytest.mark.slow
def test_serving_is_measured_in_turns_and_says_how(finished):
    found = read(finished, "serving.json")
    assert {name: len(some) for name, some in found["windows"].items()} == {
        "dense": 3, "cut": 3, "smaller": 3,
    }  # fmt: skip
    assert (found["batch"], found["prompt"], found["new"], found["context"]) == (2, 8, 4, 16)
    assert found["smaller"] == "smaller_0.5"
    assert found["source"]
    assert len(found["tracking"]) == 2


@pytest.mark.slow
def test_the_report_says_when_it_has_paid_and_draws_it(finished):
    page = (finished / "report" / "report.html").read_text()
    for part in ("against the dense model:", "A mask of the same weights: never", "per request",
                 "Tokens to break even", "What a cut costs and saves"):  # fmt: skip
        assert part in page
    # A cut model has trained longer than the dense one; the control has, too.
    control = json.loads((finished / "seed_0" / "control" / "result.json").read_text())
    recovered = np.mean(read(finished, "result.json")["losses"]["recovered"])
    more = recovered - control["control_loss"]
    said = f"the dense model's loss is {control['control_loss']:.4f} nats per token, and the cut"
    assert f"{said} one's {abs(more):.4f} {'above' if more > 0 else 'below'} it" in page.replace(
        "\u2019", "'"
    )
    (figure,) = (finished / "report").glob("energy_*.png")
    assert figure.stat().st_size > 5000


@pytest.mark.slow
def test_running_again_changes_nothing_and_what_is_damaged_is_made_again(
    finished, tmp_path, capsys
):
    import shutil

    work = tmp_path / "work"
    shutil.copytree(finished, work)
    stamps = {p: p.stat().st_mtime_ns for p in work.glob("seed_*/**/*.json")}
    assert cli.main(["run", f"--workdir={work}"]) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    shutil.rmtree(work / NAME / "recovered/0/tree")
    (work / NAME / "serving.json").write_text("{}")
    assert cli.main(["run", f"--workdir={work}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for why in ("serving.json or its model is damaged (it cannot", "result.json or its model is"):
        assert why in said
    assert read(work, "result.json") == read(finished, "result.json")
    assert set(read(work, "serving.json")) == set(read(finished, "serving.json"))


def test_the_smallest_shape_that_reaches_the_loss_is_compared():
    losses = {"recovered": [2.0, 2.2], "a": [2.3, 2.3], "b": [2.1, 2.1], "c": [2.0, 2.0]}
    shapes = {"a": 0.5, "b": 0.3, "c": 0.1}
    assert serving.rival(losses, shapes, 0.01) == 0.3
    assert serving.rival(losses, shapes, 0.3) == 0.5
    assert serving.rival({**losses, "recovered": [1.0]}, shapes, 0.01) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"criterion": "magnitud"}, r"cuts\[0\]: criterion.*magnitude"),
        ({"criterion": "forecast", "options": {"horizn": 1.0}}, r"cuts\[0\]: .*horizn.*horizon"),
        ({"criterion": "weight_norm", "options": {"a": 1}}, "has no options"),
        ({"criterion": "weight_norm", "reduce": "sum"}, "leave out reduce"),
        ({"criterion": "mutual_information", "units": "heads"}, "scores neurons, not heads"),
        ({"criterion": "angular_distance"}, "scores layers, not neurons"),
        ({"criterion": "movement"}, "schedule 'movement'"),
        ({"units": "layers", "restore": False, "criterion": "weight_norm"}, "within a layer"),
        ({"units": "heads", "sparsity": 0.9}, r"cuts\[0\]: sparsity = 0.9 leaves"),
        ({"seeds": (0, 5)}, r"cuts\[0\].seeds must be .* trains, \[0\], got \[0, 5\]"),
        ({"smaller": (0.5, 0.50000001)}, r"cuts\[0\].smaller must be different shares"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused_before_any_training(plays_dir, changes, sentence):
    given = dataclasses.replace(config(plays_dir), cuts=(dataclasses.replace(CUT, **changes),))
    with pytest.raises(InputError, match=sentence):
        cut_shapes.check(given)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsity": 1.0}, r"config.cuts\[0\].sparsity"),
        ({"smaller": (0.5, -0.1)}, r"config.cuts\[0\].smaller"),
        ({"units": "neuron"}, "'neurons'"),
        ({"reduce": "men"}, r"cuts\[0\].reduce must be one of sum, mean"),
        ({"multiple": 0}, r"cuts\[0\].multiple"),
        ({"seed": 2}, r"cuts\[0\].seed must be left out; give seeds = \(2,\)"),
        ({"units": "layers"}, r"cuts\[0\].restore must be False"),
    ],
)
def test_numbers_of_a_cut_out_of_their_range_are_refused(plays_dir, changes, sentence):
    given = dataclasses.replace(config(plays_dir), cuts=(dataclasses.replace(CUT, **changes),))
    with pytest.raises(InputError, match=sentence):
        validate(given)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, plays_dir):
    given = config(plays_dir)
    model = dataclasses.replace(given.model, layers=2, hidden=16)
    given = dataclasses.replace(given, model=model)
    return study.setup(given, tmp_path_factory.mktemp("experiment") / "work")


def test_a_study_cuts_by_redundancy_as_the_library_does(experiment):
    cut = CutConfig(criterion="mutual_information", multiple=8)
    model, own = experiment.model, experiment.config.model
    state = experiment.fresh_state(0)
    params, batches = state.params, experiment.calibration
    given = {"layout": experiment.layout}
    groups = structured.groups(own, "neurons")
    leaves = list(structured.readers(groups, params, **given).values())
    drawn = calibration.samples(model, params, batches, leaves=leaves, seed=3)
    scores = structured.redundancy_scores(
        groups, structured.redundant_units(groups, params, drawn, **given)
    )
    keep = structured.choose(groups, scores, sparsity=0.5, multiple=8)
    moments = calibration.moments(model, params, batches, leaves=leaves, gram=True)
    fitted, reports = refit(params, groups, keep, moments, **given)
    found = cuts._cut(experiment, 3, cut, state)
    jax.tree.map(np.testing.assert_array_equal, found.params, structured.cut(fitted, groups, keep))
    assert found.refits == reports
    assert found.config == structured.cut_config(own, keep) == cut_shapes.shape(own, cut, 0.5)
    for name, one in found.redundant.items():
        removed = one.as_json()["removed"][: 16 - len(keep[name])]
        assert sorted([*keep[name].tolist(), *(unit["unit"] for unit in removed)]) == [*range(16)]


def test_a_study_cuts_layers_by_their_influence(experiment):
    cut = CutConfig("layers", criterion="block_influence", restore=False)
    state = experiment.fresh_state(0)
    blocks = structured.residual_states(experiment.model, gpt.BLOCKS)
    turns = structured.depth_scores(blocks, state.params, experiment.calibration)
    assert cuts._cut(experiment, 0, cut, state).keep["layers"].tolist() == [int(turns.argmax())]


def test_the_scores_of_a_unit_are_reduced_as_asked(experiment):
    cut = CutConfig(criterion="magnitude", reduce="max", restore=False)
    state = experiment.fresh_state(0)
    groups = structured.groups(experiment.config.model, "neurons")
    scores = importance.score("magnitude", state.params, prunable=experiment.prunable)
    keep = structured.choose(groups, structured.unit_scores(groups, scores, "max"), sparsity=0.5)
    jax.tree.map(np.testing.assert_array_equal, cuts._cut(experiment, 0, cut, state).keep, keep)


def test_what_is_unusual_of_a_cut_is_in_its_name_and_result():
    assert CUT.name == "neurons-swe-0.5-restored"
    assert list(CUT.as_json()) == [
        "units", "sparsity", "criterion", "restore", "smaller", "seeds",
    ]  # fmt: skip
    more = dataclasses.replace(CUT, criterion="forecast", options={"horizon": 2.0}, reduce="mean")
    assert more.name == "neurons-forecast-0.5-restored-horizon=2.0-reduce=mean"
    assert more.as_json()["options"] == {"horizon": 2.0}
    assert more.as_json()["reduce"] == "mean"


def test_cuts_of_no_seed_that_is_trained_are_refused(plays_dir):
    given = config(plays_dir)
    others = dataclasses.replace(
        given.study, criteria=(), cells=(CellConfig(criterion="swe", sparsity=0.5, seeds=(3,)),)
    )
    with pytest.raises(InputError, match=r"trains, \[3\], got \[0\]"):
        cut_shapes.check(dataclasses.replace(given, study=others))


def test_one_window_has_no_interval_and_is_refused_before_any_training(plays_dir):
    given = dataclasses.replace(config(plays_dir), ledger=LedgerConfig(windows=1))
    with pytest.raises(InputError, match=r"ledger.windows must be at least 2 for config.cuts"):
        validate(given)
    validate(dataclasses.replace(given, cuts=()))


def test_texts_longer_than_the_context_are_refused(plays_dir):
    given = dataclasses.replace(config(plays_dir), ledger=LedgerConfig(prompt=14))
    with pytest.raises(InputError, match="model's context is 16"):
        cut_shapes.check(given)
