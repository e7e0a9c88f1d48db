"""A study whose cells differ in every way that cells can, at a tiny size."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny

from swe_prune import schedules, study, sweep, tree
from swe_prune.config import (
    CalibrationConfig,
    ScheduleConfig,
    StudyConfig,
    from_dict,
    load,
    validate,
)
from swe_prune.errors import InputError
from swe_prune.recipe import Recipe, score
from swe_prune.runtime import storage
from swe_prune.study import gradual, grid, prune_phase, recovery, saved
from swe_prune.study.feeds import calibration_windows
from swe_prune.training import optimizer
from swe_prune.training.metrics import write_json
from swe_prune.training.progress import Progress

CELLS = sweep.chain(
    [
        {"scope": "global"},
        {"scope": "global", "recovery": "none"},
        {"scope": "global", "criterion": "swe_curvature"},
        {"scope": "row", "criterion": "wanda"},
        {"scope": "global", "criterion": "taylor"},
        {"allocation": "erk"},
        {"pattern": "neuron", "sparsity": 0.25},
        {"pattern": "2:4", "recovery": "none"},
        {"scope": "global", "schedule": "cubic", "recovery": "rewarm"},
        {
            "scope": "global",
            "criterion": "swe",
            "schedule": "iterative",
            "recovery": "rewind",
            "recovery_steps": 6,
        },
        {"method": "sparsegpt"},
        {"schedule": "rigl", "scope": "global"},
        {"schedule": "set", "allocation": "erk"},
        {"schedule": "ste", "scope": "global"},
        {"schedule": "movement", "criterion": "movement"},
        {"schedule": "elsa"},
        {"recovery": "rewind_weights", "recovery_steps": 8},
        {"include": ["/mlp/"], "scope": "global"},
        {"include": ["^block_0/mlp/up", "attention/"], "method": "sparsegpt"},
    ]
)
NAMES = [
    "global-magnitude-0.5",
    "global-magnitude-0.5-none",
    "global-swe_curvature-0.5",
    "row-wanda-0.5",
    "global-taylor-0.5",
    "tensor-magnitude-0.5-erk",
    "tensor-magnitude-0.25-neuron",
    "tensor-magnitude-0.5-2-4-none",
    "global-magnitude-0.5-cubic-rewarm",
    "global-swe-0.5-iterative-rewind-6",
    "tensor-blockwise-sparsegpt-0.5",
    "global-magnitude-0.5-rigl",
    "tensor-magnitude-0.5-erk-set",
    "global-magnitude-0.5-ste",
    "tensor-movement-0.5-movement",
    "tensor-magnitude-0.5-elsa",
    "tensor-magnitude-0.5-rewind_weights-8",
    "global-magnitude-0.5-of-mlp-",
    "tensor-blockwise-sparsegpt-0.5-of-block_0-mlp-up,attention-",
]


def completed(cell):
    """A cell with magnitude and half the weights where it does not say otherwise."""
    usual = {} if "method" in cell else {"criterion": "magnitude"}
    return {**usual, **({} if "rate" in cell else {"sparsity": 0.5}), **cell}


def config(plays_dir, cells=CELLS, seeds=(0,), **changes):
    study = from_dict({"study": {"cells": [completed(cell) for cell in cells]}}).study
    study = dataclasses.replace(study, std_criteria=(), criteria=(), seeds=seeds)
    usual = tiny.config(plays_dir).train
    changes = {"train": dataclasses.replace(usual, keep_every=8)} | changes
    made = tiny.config(
        plays_dir, study=study, calibration=CalibrationConfig(windows=6, batch=4), **changes
    )
    validate(made)
    return made


@pytest.fixture(scope="module")
def done(tmp_path_factory, plays_dir):
    """The study run once."""
    settings = config(plays_dir, keep_finetuned=True)
    shared = study.setup(settings, tmp_path_factory.mktemp("study") / "work")
    with study.claim(shared.workdir, settings):
        study.run(shared, Progress())
    return shared


@pytest.fixture(scope="module")
def table(done):
    with done.workdir.results.open() as file:
        rows = list(csv.DictReader(file))
    return {cell.name: row for cell, row in zip(done.cells, rows, strict=True)}


def test_every_cell_has_a_readable_name_and_a_row(done, table):
    assert [cell.name for cell in done.cells] == list(table) == NAMES


def test_every_count_is_met(table):
    prunable = 12 * 16 * 16
    for name, row in table.items():
        total = prunable
        if "neuron" in name or row["include"]:  # attention has no neurons; the rules choose as many
            total = prunable * 2 // 3
        removed = round(float(row["sparsity"]) * total)
        of = total if row["include"] else prunable  # what the cell may prune
        assert float(row["sparsity_prunable"]) == removed / of
        assert int(row["nonzero_params"]) == int(table[NAMES[0]]["nonzero_params"]) + (
            prunable // 2 - removed
        )


def test_a_cell_prunes_what_its_rules_include_and_trains_the_rest_on(done):
    dense = dict(tree.named_leaves(saved.load_dense(done, 0).params))
    for cell, rules in ((done.cells[-2], ("/mlp/",)), (done.cells[-1], ("0/mlp/up", "attention/"))):
        leaves = tree.named_leaves(saved.load_masks(done, cell))
        masks = {name: np.asarray(mask) for name, mask in leaves if mask is not None}
        pruned = [mask for name, mask in masks.items() if any(rule in name for rule in rules)]
        assert sum(mask.sum() for mask in pruned) == sum(mask.size for mask in pruned) / 2
        others = [mask for name, mask in masks.items() if not any(rule in name for rule in rules)]
        assert others
        assert all(mask.all() for mask in others)
        tuned = dict(tree.named_leaves(saved.load_finetuned(done, cell)))
        assert all((tuned[name] != dense[name]).any() for name in tuned)


def test_a_cell_without_recovery_ends_where_its_pruning_left_it(table):
    tuned, untouched = table["global-magnitude-0.5"], table["global-magnitude-0.5-none"]
    assert untouched["finetuned_loss"] == untouched["control_loss"] == ""
    assert untouched["steps"] == "0"
    for column in ("pruned_loss", "pruned_train_loss", "sparsity_prunable"):
        assert untouched[column] == tuned[column]
    gap = float(untouched["pruned_loss"]) - float(untouched["pruned_train_loss"])
    assert float(untouched["generalisation_gap"]) == pytest.approx(gap, rel=1e-12)


def test_every_recovery_has_a_control_of_its_own(done, table):
    folders = {path.name for path in (done.workdir.path / "seed_0").glob("control*")}
    assert folders == {"control", "control-rewarm", "control-rewind-6", "control-rewind_weights-8"}
    by_recovery = {row["recovery"]: row["control_loss"] for row in table.values()}
    assert set(by_recovery) == {"none", "finetune", "rewarm", "rewind-6", "rewind_weights-8"}
    assert len(set(by_recovery.values())) == 5
    for cell, row in zip(done.cells, table.values(), strict=True):
        assert row["control_loss"] == by_recovery[row["recovery"]], cell.name


def test_gaps_are_validation_minus_training_loss(done, table):
    dense = saved.load_dense(done, 0)
    for row in table.values():
        assert float(row["dense_train_loss"]) == done.training_loss(dense.params)
        if row["finetuned_loss"]:
            gap = float(row["finetuned_loss"]) - float(row["finetuned_train_loss"])
            assert float(row["generalisation_gap"]) == pytest.approx(gap, rel=1e-12)
            gap = float(row["control_loss"]) - float(row["control_train_loss"])
            assert float(row["control_gap"]) == pytest.approx(gap, rel=1e-12)


def test_the_training_windows_are_fixed_and_of_the_training_text(done):
    assert sum(len(batch["inputs"]) for batch in done.training) == sum(
        len(batch["inputs"]) for batch in done.validation
    )
    first = done.training[0]["inputs"][0]
    np.testing.assert_array_equal(first, done.data.train[: len(first)])


def test_scores_are_those_of_the_formulas_in_float64(done):
    dense = saved.load_dense(done, 0)
    source = prune_phase.load_and_measure(done, 0, done.cells)
    by_name = {cell.name: cell for cell in done.cells}
    leaf = ("block_0", "mlp", "up", "kernel")

    def at(values):
        for key in leaf:
            values = values[key]
        return np.asarray(values, np.float64)

    def scores(source, cell):
        return score(cell.recipe, dense.params, source.evidence, done.prunable)

    weight = at(dense.params)
    adam = next(s for s in jax.tree.leaves(dense.opt_state, is_leaf=_is_adam) if _is_adam(s))
    second = at(adam.nu)
    late_mean = at(dense.stats.buffers["late_mean"])
    found = at(scores(source, by_name["global-swe_curvature-0.5"]))
    np.testing.assert_allclose(found, late_mean**2 * np.sqrt(second), rtol=1e-5)
    gradient = _mean_gradient(done, dense.params)
    found = at(scores(source, by_name["global-taylor-0.5"]))
    np.testing.assert_allclose(found, np.abs(weight * at(gradient)), rtol=1e-4, atol=1e-12)


def _is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def _mean_gradient(shared, params):
    def loss(params, batch):
        logits = shared.model.apply({"params": params}, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    grad = jax.jit(jax.grad(loss))
    parts = [(len(b["inputs"]), grad(params, b)) for b in shared.calibration]
    total = sum(n for n, _ in parts)
    return jax.tree.map(
        lambda *g: (
            sum(np.asarray(x, np.float64) * n for x, (n, _) in zip(g, parts, strict=True)) / total
        ),
        *(g for _, g in parts),
    )


def test_block_after_block_pruning_goes_on_with_the_weights_it_changed(done):
    dense = saved.load_dense(done, 0)
    cell = next(cell for cell in done.cells if cell.recipe.method is not None)
    start = saved.starting_values(done, dense, cell)
    kept = saved.load_masks(done, cell)["block_0"]["mlp"]["up"]["kernel"]
    before, after = (np.asarray(p["block_0"]["mlp"]["up"]["kernel"]) for p in (dense.params, start))
    assert (before[kept] != after[kept]).any()
    np.testing.assert_array_equal(
        start["embedding"]["embedding"], dense.params["embedding"]["embedding"]
    )


def test_gradual_masks_are_held_and_those_of_fixed_scores_are_one_shot_masks(done):
    for cell in done.cells:
        if cell.gradual:
            masks = saved.load_masks(done, cell)
            params = saved.load_finetuned(done, cell)
            revived = tree.map_tracked(lambda m, w: int((~m & (w != 0)).sum()), masks, params)
            assert sum(jax.tree.leaves(revived)) == 0
    swe = next(cell for cell in done.cells if cell.schedule == "iterative")
    _, once = prune_phase.pruned(done, swe, prune_phase.load_and_measure(done, 0, [swe]))
    for ours, theirs in zip(
        jax.tree.leaves(saved.load_masks(done, swe)), jax.tree.leaves(once), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_what_a_gradual_cell_has_pruned_stays_so(done):
    dense = saved.load_dense(done, 0)
    cell = next(cell for cell in done.cells if cell.schedule == "cubic")
    source = prune_phase.load_and_measure(done, 0, [cell])
    # Kept are the smaller halves, which a criterion that forgets what is gone would not choose.
    masks = tree.map_tracked(lambda keep: ~keep, prune_phase.pruned(done, cell, source)[1])
    state = dataclasses.replace(dense, masks=masks)
    renewed = gradual._further(done, cell, source, schedules.OneShot(0.75, at=0))(0, state, None)
    kept, given = (
        np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(each)])
        for each in (renewed.masks, masks)
    )
    assert kept.sum() == kept.size // 4
    assert not (kept & ~given).any()
    weights, sizes = (
        np.concatenate(
            [
                np.abs(np.asarray(leaf)).ravel()
                for leaf in jax.tree.leaves(tree.map_tracked(lambda _, w: w, masks, params))
            ]
        )
        for params in (renewed.params, dense.params)
    )
    assert sizes[kept].min() >= sizes[given & ~kept].max()
    assert (weights[~kept] == 0).all()


def test_calibration_is_of_the_training_text_and_the_same_for_every_seed(done):
    settings = done.config.calibration
    expected = calibration_windows(done.data.train, 16, settings)
    for ours, theirs in zip(done.calibration, expected, strict=True):
        np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])
    joined = {tuple(row) for batch in done.calibration for row in batch["inputs"].tolist()}
    text = done.data.train.tolist()
    assert joined <= {tuple(text[at : at + 16]) for at in range(len(text) - 16)}


def test_weights_are_rewound_to_their_early_values_under_the_late_mask(done):
    cell = next(cell for cell in done.cells if cell.recovery.kind == "rewind_weights")
    early = saved.load_dense(done, 0, 16).params
    start = saved.recovery_start(done, 0, cell.recovery, saved.load_dense(done, 0).params)
    jax.tree.map(np.testing.assert_array_equal, start, early)
    assert done.tunings[cell.recovery].steps == 8


def test_rigl_and_set_exchange_weights_and_keep_the_count(done):
    for schedule in ("rigl", "set"):
        cell = next(cell for cell in done.cells if cell.schedule == schedule)
        dense = prune_phase.load_and_measure(done, 0, [cell])
        _, first = prune_phase.pruned(done, cell, dense)
        last = saved.load_masks(done, cell)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
            assert int(a.sum()) == int(b.sum())
        differ = [
            bool((a != b).any())
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True)
        ]
        assert any(differ), schedule


def test_a_gradual_cell_that_is_killed_ends_as_if_it_had_not_been(done, tmp_path):
    shutil.copytree(done.workdir.path, tmp_path / "work")
    cell = next(cell for cell in done.cells if cell.schedule == "iterative")
    copy = dataclasses.replace(done, workdir=study.Workdir(tmp_path / "work"), cells=[cell])
    path = copy.workdir.cell(cell) / "result.json"
    whole = storage.read_json(path)
    for name in ("finetuned_loss", "finetuned_train_loss"):
        whole.pop(name)
    write_json(path, whole)
    tuning = copy.tunings[cell.recovery]
    steps = 0

    def dies(state, batch):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return tuning.step(state, batch)

    mortal = dataclasses.replace(tuning, step=dies)
    with pytest.raises(KeyboardInterrupt):
        study.finetune(dataclasses.replace(copy, tunings={cell.recovery: mortal}), Progress())
    assert "finetuned_loss" not in storage.read_json(path)
    steps = -20  # now it lives; the checkpoint is of step 4, so two of the six are left
    study.finetune(dataclasses.replace(copy, tunings={cell.recovery: mortal}), Progress())
    assert steps == -18
    ours = storage.read_json(path)
    theirs = storage.read_json(done.workdir.cell(cell) / "result.json")
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs


def test_evaluate_computes_every_recorded_loss_again(done):
    compared = study.evaluate(done, Progress())
    assert len(compared) == 1 + 19 + 17
    for row in compared:
        assert row["computed"] == pytest.approx(row["recorded"], rel=1e-6), row["model"]


def test_results_say_what_they_were_calibrated_on(done):
    told = {}
    for cell in done.cells:
        result = json.loads((done.workdir.cell(cell) / "result.json").read_text())
        told[cell.name] = result.get("calibration")
    calibrated = {"row-wanda-0.5", "global-taylor-0.5", "tensor-blockwise-sparsegpt-0.5", NAMES[-1]}
    assert {name for name, said in told.items() if said} == calibrated
    assert told["row-wanda-0.5"] == {"windows": 6, "seed": 0}


def test_calibration_windows_are_random_ones_of_the_text_they_are_given():
    tokens = np.arange(100, dtype=np.uint8)
    settings = CalibrationConfig(windows=5, batch=2, seed=3)
    batches = calibration_windows(tokens, 8, settings)
    assert [len(b["inputs"]) for b in batches] == [2, 2, 1]
    inputs = np.concatenate([b["inputs"] for b in batches])
    targets = np.concatenate([b["targets"] for b in batches])
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert len({row[0] for row in inputs}) == 5
    again = calibration_windows(tokens, 8, settings)
    np.testing.assert_array_equal(batches[0]["inputs"], again[0]["inputs"])
    other = calibration_windows(tokens, 8, dataclasses.replace(settings, seed=4))
    assert (other[0]["inputs"] != batches[0]["inputs"]).any()
    with pytest.raises(InputError, match=r"windows = 93 is more than the 92 windows.*lower it"):
        calibration_windows(tokens, 8, CalibrationConfig(windows=93))


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 80, 101])
@pytest.mark.parametrize("kind", ["cubic", "iterative"])
def test_a_gradual_schedule_ends_with_its_sparsity_before_the_recovery_does(kind, steps):
    cell = grid.Cell(Recipe("magnitude", sparsity=0.8), schedule=kind)
    plan = gradual.ramp(cell, steps)
    due = plan.due_steps()
    assert due[-1] < steps
    shares = [plan.sparsity(step) for step in due]
    assert shares[-1] == 0.8
    assert shares == sorted(shares)
    assert len(due) <= 12


def test_the_settings_of_a_schedule_say_when_and_how_often_masks_change():
    def due(kind, **options):
        cell = grid.Cell(Recipe("magnitude", sparsity=0.8), kind)
        cell = dataclasses.replace(cell, schedule_options=ScheduleConfig(**options))
        return gradual.ramp(cell, 80).due_steps()

    assert due("cubic") == (0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 48)
    assert due("cubic", updates=2, ramp_end=0.5) == (0, 20, 40)
    assert due("cubic", ramp_end=1.0)[-1] == 79
    assert due("iterative") == (0, 12, 24, 36, 48)
    assert due("iterative", rounds=3, ramp_end=0.5) == (0, 20, 40)
    assert due("iterative", rounds=1) == (0,)


@pytest.mark.parametrize("schedule", ["rigl", "set"])
def test_without_a_drop_fraction_or_after_the_end_nothing_is_exchanged(done, schedule):
    cell = next(cell for cell in done.cells if cell.schedule == schedule)
    state = dataclasses.replace(saved.load_dense(done, 0), masks=saved.load_masks(done, cell))

    def unchanged(step, **options):
        options = ScheduleConfig(updates=20, **options)
        update = gradual._exchange(done, dataclasses.replace(cell, schedule_options=options), 20)
        return update(step, state, next(iter(done.calibration))) is state

    assert not unchanged(4)
    assert unchanged(4, drop_fraction=0.0)
    assert unchanged(4, exchange_end=0.2)
    assert unchanged(16)
    assert not unchanged(16, exchange_end=1.0)


def test_a_sweep_over_the_settings_of_a_schedule_has_a_name_for_each(plays_dir):
    options = [{}, {"drop_fraction": 0.1}, {"drop_fraction": 0.1, "updates": 3}]
    cells = sweep.product({"schedule": ["rigl"], "schedule_options": options})
    made = grid.cells(config(plays_dir, cells))
    usual = "tensor-magnitude-0.5-rigl"
    more = ("", "-drop_fraction=0.1", "-updates=3-drop_fraction=0.1")
    assert [cell.name for cell in made] == [usual + one for one in more]
    assert made[2].schedule_text == "rigl updates=3 drop_fraction=0.1"


def test_a_pruning_step_prunes_when_due_and_goes_on_where_a_phase_resumes():
    @dataclasses.dataclass(frozen=True)
    class State:
        step: int
        pruned: tuple = ()

    def step(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {}

    def update(number, state, batch):
        if not plan.is_due(number):
            return state
        return dataclasses.replace(state, pruned=(*state.pruned, (number, plan.sparsity(number))))

    plan = schedules.Iterative(0.5, rounds=3, every=2)
    whole = State(0)
    run = gradual.updating_step(step, update)
    for _ in range(6):
        whole, _ = run(whole, None)
    assert whole.pruned == tuple((t, plan.sparsity(t)) for t in (0, 2, 4))
    resumed = State(3, whole.pruned[:2])
    run = gradual.updating_step(step, update)
    for _ in range(3):
        resumed, _ = run(resumed, None)
    assert resumed == whole


def test_rewarming_reaches_the_dense_peak_and_rewinding_the_dense_schedules_end(plays_dir):
    settings = tiny.config(plays_dir)
    settings = dataclasses.replace(
        settings, finetune=dataclasses.replace(settings.finetune, learning_rate=1e-4)
    )
    shapes = {"train_steps": 24, "epoch": 100}

    def rates(kind, steps=None):
        built = recovery.build(settings, grid.Recovery(kind, steps), None, **shapes)
        params = {"w": np.ones((2, 2), np.float32)}
        state = built.optimizer.init(params)
        found = []
        for _ in range(built.steps):
            # Adam's update of a constant gradient is the learning rate; decay adds rate · 0.1 · w.
            updates, state = built.optimizer.update(
                {"w": np.ones((2, 2), np.float32)}, state, params
            )
            found.append(-float(updates["w"][0, 0]) / 1.1)
        return found

    dense = [float(optimizer.schedule(settings.train, 24)(step)) for step in range(24)]
    warmed = dataclasses.replace(settings.finetune, learning_rate=3e-3)
    peak = [float(optimizer.schedule(warmed, 4)(step)) for step in range(4)]
    usual = [float(optimizer.schedule(settings.finetune, 4)(step)) for step in range(4)]
    np.testing.assert_allclose(rates("finetune"), usual, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(rates("rewarm"), peak, rtol=1e-4, atol=1e-12)
    assert max(rates("rewarm")) == pytest.approx(3e-3, rel=1e-4)
    np.testing.assert_allclose(rates("rewind", 7), dense[-7:], rtol=1e-4)
    with pytest.raises(InputError, match="goes back 25 steps and the dense phase has 24"):
        recovery.build(settings, grid.Recovery("rewind", 25), None, **shapes)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ({"criterion": "swee"}, "criterion must be one of .*, got 'swee'.*'swe'"),
        ({"options": {"power": 1}}, "criterion 'magnitude' has no option 'power'"),
        ({"criterion": "movement"}, "scores that movement pruning learns"),
        (
            {"method": "sparsegp"},
            "method must be one of .*, got 'sparsegp'; did you mean 'sparsegpt'",
        ),
        ({"method": "wanda", "scope": "global"}, "kernel by kernel.*'tensor'"),
        ({"method": "wanda", "pattern": "row"}, "knows no pattern 'row'"),
        ({"method": "wanda", "options": {"x": 1}}, "no option 'x'.*block, damping"),
        ({"method": "wanda", "criterion": "swe"}, "both were given; give one"),
        ({"criterion": "blockwise:wanda"}, "unknown criterion.*give method='wanda'"),
        ({"criterion": "forecast", "options": {"horizon": "a/b"}}, "horizon.*a finite number"),
        ({"criterion": "forecast", "options": {"horizon": True}}, "horizon.*a finite number"),
        ({"method": "sparsegpt", "options": {"block": 0}}, "block must be 1 or more"),
        ({"method": "sparsegpt", "options": {"damping": -1.0}}, "damping must be 0 or more"),
        ({"method": "sparsegpt", "options": {"block": 6}, "pattern": "2:4"}, "multiple of 4"),
        ({"allocation": "erkk"}, "allocation must be one of .*, got 'erkk'.*'erk'"),
        ({"allocation": "table"}, "allocation 'table' needs the option"),
        ({"pattern": "2:5"}, "'2:5'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "keeps 2 of 4.*make the two agree"),
        (
            {"pattern": "2:4", "schedule": "cubic"},
            "schedule must be 'one_shot', since .* n:m pattern prunes at once",
        ),
        (
            {"schedule": "ste", "criterion": "swe"},
            "criterion must be 'magnitude', by which schedule 'ste' ranks",
        ),
        (
            {"schedule": "rigl", "pattern": "neuron"},
            "pattern must be None, since schedule 'rigl' prunes single weights",
        ),
        ({"schedule": "rigl", "recovery_steps": 1}, "of which 1 step is too short; give 2"),
        ({"pattern": "2:4", "allocation": "erk"}, "fixes the sparsity of every tensor"),
        ({"pattern": "column", "scope": "row"}, "give scope 'tensor' or 'global'"),
        ({"pattern": "blok:4x4"}, "'blok:4x4'"),
        ({"schedule": "cubic", "recovery_steps": 1}, "of which 1 step is too short; give 2"),
        ({"recovery": "rewind_weights", "recovery_steps": 3}, "step 21, which is not retained"),
        ({"recovery": "rewind_weights", "recovery_steps": 24}, "cannot go back to step 0"),
        ({"recovery_steps": 0}, "recovery 'finetune' has 0 steps"),
        (
            {"include": ["/mpl/"]},
            "include rule '/mpl/' matches no prunable weight",
        ),
        ({"include": ["embed"]}, "include rule 'embed' matches no prunable weight"),
        ({"include": ["("]}, "rule '\\(' is not a regular expression"),
        ({"include": []}, "include must be at least one rule, or None"),
        (
            {"include": ["/mlp/"], "schedule": "rigl"},
            "include must be None, since schedule 'rigl' prunes all prunable weights",
        ),
    ],
)
def test_a_cell_that_cannot_work_is_named_before_any_training(cell, sentence, tmp_path, plays_dir):
    with pytest.raises(InputError, match=sentence):
        study.setup(config(plays_dir, [cell]), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_names_are_unique_and_doubles_are_dropped(plays_dir):
    settings = config(plays_dir, [{}, {"recovery_steps": 4}, {"sparsity": 0.6}])
    assert [cell.name for cell in grid.cells(settings)] == NAMES_OF_TWO
    near = config(plays_dir, [{"sparsity": 0.5}, {"sparsity": 0.50000001}])
    with pytest.raises(InputError, match=r"would both be called 'tensor-magnitude-0\.5'"):
        grid.cells(near)


def test_folders_of_many_rules_have_names_that_file_systems_take(plays_dir):
    rules = [f"^block_{n}/mlp/(up|gate|down)/kernel$" for n in range(12)]
    made = grid.cells(config(plays_dir, [{"include": rules}, {"include": rules[:-1]}]))
    names = [cell.name for cell in made]
    assert len(set(names)) == 2
    assert max(map(len, names)) <= 200


NAMES_OF_TWO = ["tensor-magnitude-0.5", "tensor-magnitude-0.6"]


SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweeps").glob("*.py"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_can_be_run(path, plays_dir, tmp_path):
    settings = load(path, [f"data.data_dir={plays_dir}"])
    shared = study.setup(settings, tmp_path / "work")
    assert {cell.seed for cell in shared.cells} == {0, 1, 2}
    assert f"{len(shared.cells)} cells" in path.read_text()
    assert {"magnitude", "random"} <= {cell.recipe.name for cell in shared.cells}


def test_a_study_without_cells_of_its_own_is_the_grid(plays_dir):
    settings = tiny.config(plays_dir)
    assert StudyConfig().cells == ()
    assert all(cell.settings == [] for cell in grid.cells(settings))
