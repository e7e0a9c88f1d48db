import dataclasses
import json
import os
import sys
import typing
from typing import Any

import pytest
from ml_collections import ConfigDict

from swe_prune import config
from swe_prune.errors import InputError
from swe_prune.models import block
from swe_prune.pretrained import settings
from swe_prune.recipe import Recipe


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (0, 0), (7, 7), ("7 steps", 7), ("1 step", 1), ("5%", 100), (" 5 % ", 100), ("0.01%", 1),
        ("0%", 0), ("100%", 2000), ("33.33%", 667), ("2 epochs", 300), ("1 epoch", 150),
        ("0.5epochs", 75), (".25 epochs", 38), ("0 epochs", 0),
    ],
)  # fmt: skip
def test_durations_become_steps(duration, steps):
    assert config.to_steps(duration, total=2000, epoch=150) == steps


@pytest.mark.parametrize(
    "duration",
    [-1, "-5%", "five", "5", "", "5 hours", "%", "1e3 steps", True, None, 5.0, "5%%", "1.2.3%"],
)
def test_malformed_durations_are_refused(duration):
    with pytest.raises(InputError, match="a duration must be a number of steps"):
        config.to_steps(duration, total=100, epoch=10)


@pytest.mark.parametrize(("duration", "known"), [("5%", {"epoch": 3}), ("1 epoch", {"total": 3})])
def test_a_unit_without_a_length_is_refused(duration, known):
    with pytest.raises(InputError, match="has no length; give steps"):
        config.to_steps(duration, **known)


def test_nothing_given_is_the_defaults():
    assert config.from_dict({}) == config.Config()
    assert config.from_dict(ConfigDict()) == config.Config()


def test_groups_fill_nested_dataclasses_and_leave_the_rest():
    made = config.from_dict(ConfigDict({"model": {"layers": 2}, "study": {"seeds": [3, 4]}}))
    assert made.model == config.ModelConfig(layers=2)
    assert made.study.seeds == (3, 4)
    assert made.study.sparsities == config.StudyConfig().sparsities


def test_what_was_made_can_be_made_again():
    assert config.from_dict(dataclasses.asdict(config.Config())) == config.Config()


@pytest.mark.parametrize(
    ("values", "path", "value"),
    [
        ({"train": {"learning_rate": 1}}, "train.learning_rate", 1.0),
        ({"train": {"steps": "2 epochs"}}, "train.steps", "2 epochs"),
        ({"model": {"vocab_size": None}}, "model.vocab_size", None),
        ({"model": {"qkv_bias": False}}, "model.qkv_bias", False),
        ({"prune": {"include": ["a", "b"]}}, "prune.include", ("a", "b")),
        ({"study": {"std_rates": [1, 1.5]}}, "study.std_rates", (1.0, 1.5)),
    ],
)
def test_values_take_the_type_of_their_setting(values, path, value):
    made = config.from_dict(values)
    for key in path.split("."):
        made = getattr(made, key)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"modle": {}}, "config has no setting 'modle'; did you mean 'model'"),
        ({"model": {"layer": 2}}, "config.model has no setting 'layer'; did you mean 'layers'"),
        ({"model": {"layers": 2.0}}, "config.model.layers must be an integer, got 2.0"),
        ({"model": {"layers": True}}, "config.model.layers must be an integer, got True"),
        ({"model": {"layers": "2"}}, "config.model.layers must be an integer, got '2'"),
        ({"model": {"layers": None}}, "config.model.layers must be an integer, got None"),
        ({"model": {"use_bias": 1}}, "config.model.use_bias must be True or False, got 1"),
        ({"model": {"dropout": True}}, "config.model.dropout must be a number, got True"),
        ({"model": {"dropout": "0.1"}}, "config.model.dropout must be a number, got '0.1'"),
        ({"model": 3}, "config.model is a group of settings, got 3"),
        ({"train": {"steps": True}}, "config.train.steps must be an integer or a string, got True"),
        ({"train": {"steps": 5.0}}, "config.train.steps must be an integer or a string, got 5.0"),
        ({"study": {"seeds": 3}}, "config.study.seeds must be a list, got 3"),
        ({"study": {"criteria": "swe"}}, r"config.study.criteria must be a list, got 'swe'"),
        ({"study": {"seeds": [0, "1"]}}, r"config.study.seeds\[1\] must be an integer, got '1'"),
        ({"study": {"seeds": [0, True]}}, r"config.study.seeds\[1\] must be an integer, got True"),
        (
            {"prune": {"include": "kernel"}},
            "config.prune.include must be a list or None, got 'kernel'",
        ),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_their_path(values, sentence):
    with pytest.raises(InputError, match=sentence):
        config.from_dict(values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"model": {"width": 100, "heads": 6}},
            "model.width must be a multiple of model.heads = 6, got 100",
        ),
        (
            {"model": {"layers": 0}},
            "model.layers must be an integer of at least 1 and at most 10000, got 0",
        ),
        ({"model": {"kv_heads": 0}}, "model.kv_heads must be an integer of at least 1, got 0"),
        ({"model": {"layers": 10_001}}, "model.layers must be .* and at most 10000, got 10001"),
        ({"model": {"rope": {"theta": -1.0}}}, "model.rope.theta must be .* above 0, got -1.0"),
        ({"model": {"dropout": 1.0}}, r"model.dropout must be .* at least 0 and below 1, got 1.0"),
        (
            {"model": {"dropout": float("nan")}},
            r"model.dropout must be .* at least 0 and below 1, got nan",
        ),
        (
            {"data": {"eval_windows": 65}},
            "data.eval_windows must be a multiple of data.eval_batch = 64, got 65",
        ),
        (
            {"data": {"validation_fraction": 0.0}},
            "data.validation_fraction must be between 0 and 1, got 0.0",
        ),
        (
            {"train": {"learning_rate": 0.0}},
            "train.learning_rate must be a finite number above 0, got 0.0",
        ),
        ({"finetune": {"clip": float("inf")}}, "finetune.clip must be a finite number .*, got inf"),
        (
            {"finetune": {"accumulate": 0}},
            "finetune.accumulate must be an integer of at least 1, got 0",
        ),
        ({"train": {"checkpoint_every": 0}}, "train.checkpoint_every must be above 0, .*, got 0"),
        (
            {"trajectory": {"window_start": 0}},
            "trajectory.window_start must be an integer of at least 1, got 0",
        ),
        (
            {"study": {"std_rates": [-1]}},
            "study.std_rates must be a finite .* at least 0, got -1.0",
        ),
        (
            {"study": {"sparsities": [1.0]}},
            r"study.sparsities must be .* at least 0 and below 1, got 1.0",
        ),
        (
            {"study": {"scopes": ["row", "layer"]}},
            r"study.scopes\[1\] must be one of tensor, global, row, got 'layer'",
        ),
        ({"log_every": 0}, "log_every must be an integer of at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(values, sentence):
    with pytest.raises(InputError, match=f"config.{sentence}"):
        config.validate(config.from_dict(values))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"activation": "gellu"}}, "model.activation must be .*'gellu'; .*'gelu'"),
        ({"model": {"norm": "batch"}}, "model.norm must be one of layer, rms, got 'batch'"),
        ({"model": {"positions": None}}, "model.positions must be one of .*, got None"),
        ({"model": {"dtype": "float16"}}, "model.dtype must be one of float32, bfloat16, got"),
        ({"model": {"rope": {"scaling": "yarm"}}}, "model.rope.scaling must be .*mean 'yarn'"),
        ({"prune": {"values_from": "clone"}}, "prune.values_from must be one of final, late_mean"),
        ({"parallel": {"statistics": ["host"]}}, "parallel.statistics must be one of device, host"),
    ],
)
def test_a_choice_is_refused_with_the_known_ones_however_the_config_was_made(settings, sentence):
    with pytest.raises(InputError, match=f"config.{sentence}"):
        config.from_dict(settings)

    def made(cls, values):
        groups = {name: getattr(cls(), name) for name in values}
        return cls(
            **{
                name: made(type(groups[name]), value) if isinstance(value, dict) else value
                for name, value in values.items()
            }
        )

    with pytest.raises(InputError, match=f"config.{sentence}"):
        config.validate(made(config.Config, settings))


def test_every_activation_that_may_be_chosen_is_there():
    assert set(typing.get_args(config.Activation)) == set(block.ACTIVATIONS)


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("3", int, 3), ("3", float, 3.0), ("1e-3", float, 1e-3), ("inf", float, float("inf")),
        ("3", str, "3"), ("'3'", str, "3"), ("None", str | None, None), ("None", str, "None"),
        ("5%", int | str, "5%"), ("7", int | str, 7), ("True", bool, True), ("a=b", str, "a=b"),
        ("(1, 2)", tuple[int, ...], (1, 2)), ("['x']", tuple[str, ...] | None, ("x",)),
        ("rms", config.Norm, "rms"), ("None", config.Norm | None, None),
        ("(" * 999, str, "(" * 999),
    ],
)  # fmt: skip
def test_text_of_a_command_line_becomes_the_type_of_its_setting(text, wanted, value):
    found = config.convert(config.Text(text), wanted, "--option")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "wanted", "sentence"),
    [
        ("3.5", int, "--option must be an integer, got 3.5"),
        ("many", float, "--option must be a number, got 'many'"),
        ("5.5", int | str, "--option must be an integer or a string, got 5.5"),
        ("true", bool, "--option must be True or False, got 'true'"),
        ("swe", tuple[str, ...], "--option must be a list, got 'swe'"),
        ("rmss", config.Norm, "--option must be one of layer, rms, got 'rmss'; did you mean 'rms'"),
        ("1", config.Norm | None, "--option must be one of layer, rms, None, got 1"),
    ],
)
def test_text_of_another_type_is_refused(text, wanted, sentence):
    with pytest.raises(InputError, match=sentence):
        config.convert(config.Text(text), wanted, "--option")


def test_defaults_are_valid():
    config.validate(config.Config())


def test_fingerprint_tells_every_setting_apart_and_nothing_else():
    base = config.Config()
    assert base.fingerprint() == config.from_dict(dataclasses.asdict(base)).fingerprint()
    others = [
        {"name": "other"}, {"model": {"layers": 5}}, {"study": {"seeds": [0]}},
        {"trajectory": {"power": 0.6}},
    ]  # fmt: skip
    prints = {config.from_dict(values).fingerprint() for values in others}
    assert len(prints | {base.fingerprint()}) == 5


def test_without_switches_two_configs_are_equal_that_compute_the_same():
    base = config.Config(name="mine", parallel=config.ParallelConfig(fsdp=2))
    switches = [
        {"model": {"remat": True}}, {"model": {"scan_layers": True}}, {"parallel": {"tensor": 4}},
        {"train": {"accumulate": 2}}, {"finetune": {"steps": 500, "accumulate": 2}},
    ]  # fmt: skip
    for values in switches:
        other = config.from_dict({"name": "mine"} | values)
        assert other != base
        assert other.without_switches() == base.without_switches()
    for values in ({"model": {"dtype": "bfloat16"}}, {"train": {"clip": 2.0}}, {"log_every": 5}):
        other = config.from_dict({"name": "mine"} | values)
        assert other.without_switches() != base.without_switches()


@pytest.fixture
def write(tmp_path):
    def write(text, name="some.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


GOOD = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"name": "tiny", "model": {"layers": 2}})
"""


def test_load_reads_a_file_and_applies_overrides_over_it(write):
    path = write(GOOD)
    assert config.load(path) == config.Config(name="tiny", model=config.ModelConfig(layers=2))
    made = config.load(
        str(path),
        ["model.layers=3", "train.steps=2 epochs", "study.seeds=[5]", "name=a=b", "data.batch=8",
         "prune.include=('x',)", "model.vocab_size=None", "trajectory.power=1"],
    )  # fmt: skip
    assert made.model.layers == 3
    assert made.train.steps == "2 epochs"
    assert made.study.seeds == (5,)
    assert made.name == "a=b"
    assert made.prune.include == ("x",)
    assert made.trajectory.power == 1.0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.layers", "has no '='"),
        ("model.layer=3", "did you mean 'layers'"),
        ("modle.layers=3", "did you mean 'model'"),
        ("model.layers=three", "model.layers must be an integer, got 'three'"),
        ("model.layers.deep=3", "'layers' is not a group of settings"),
        ("model=3", "config.model is a group of settings"),
        ("=3", "config has no setting ''"),
        ("study.seeds={[]: 1}", "config.study.seeds must be a list, got"),
        (
            "model.layers=0",
            "model.layers must be an integer of at least 1 and at most 10000, got 0",
        ),
    ],
)
def test_overrides_are_checked_as_the_file_is(write, override, sentence):
    with pytest.raises(InputError, match=sentence):
        config.load(write(GOOD), [override])


DEEP_CONFIG = """
def get_config():
    values = {}
    for _ in range(10_000):
        values = {"model": values}
    return values
"""
UNFILLED_CONFIG = """
from ml_collections import config_dict

def get_config():
    return config_dict.ConfigDict({"name": config_dict.required_placeholder(str)})
"""


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (GOOD, "some.yaml", "is not Python; give a .py file"),
        ("x = 1", "some.py", "defines no get_config"),
        ("def get_config(:", "some.py", "fails to run: SyntaxError"),
        ("1 / 0", "some.py", "fails to run: ZeroDivisionError"),
        ("import nowhere_to_be_found", "some.py", "fails to run: ModuleNotFoundError"),
        ("def get_config():\n    1 / 0", "some.py", "fails to run: ZeroDivisionError"),
        ("get_config = 3", "some.py", "fails to run: TypeError"),
        ("import sys\nsys.exit(0)", "some.py", "fails to run: SystemExit: 0"),
        ("def get_config(): raise BaseException('x')", "some.py", "fails to run: BaseException: x"),
        (DEEP_CONFIG, "some.py", "fails to run: RecursionError"),
        (UNFILLED_CONFIG, "some.py", "fails to run: RequiredValueError"),
        ("def get_config(): pass", "some.py", "returns NoneType; return a ConfigDict"),
    ],
)
def test_files_that_give_no_config_are_refused(write, text, name, sentence):
    with pytest.raises(InputError, match=sentence):
        config.load(write(text, name))


def test_a_plain_dict_will_do(write):
    path = write('def get_config():\n    return {"model": {"layers": 2}}')
    assert config.load(path, ["train.clip=2"]).train.clip == 2.0


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(InputError, match="is not a file"):
            config.load(path)


def test_cells_may_be_dicts_or_dataclasses_and_come_back_from_json():
    cell = config.CellConfig(criterion="swe", options={"power": 1.0}, seeds=(0, 3), sparsity=0.7)
    as_dict = {"criterion": "swe", "options": {"power": 1.0}, "seeds": [0, 3], "sparsity": 0.7}
    made = config.from_dict(ConfigDict({"study": {"cells": [as_dict, as_dict]}}).to_dict())
    assert made.study.cells == (cell, cell)
    assert config.from_dict({"study": {"cells": (cell, as_dict)}}) == made
    back = config.from_dict(json.loads(json.dumps(dataclasses.asdict(made))))
    assert back == made
    assert back.fingerprint() == made.fingerprint()


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ({"critrion": "swe"}, r"config.study.cells\[1\] has no setting 'critrion'.*'criterion'"),
        ({"options": 3}, r"config.study.cells\[1\].options must be"),
        (
            {"scope": "layer"},
            r"config.study.cells\[1\].scope must be one of tensor, global, row, got 'layer'",
        ),
        ({"zeros": "fre"}, r"cells\[1\].zeros must be one of keep, free, .*mean 'free'"),
        ({"restore": "adm"}, r"cells\[1\].restore must be .*least_squares, None, .*mean 'admm'"),
        ({"method": "wandb"}, r"cells\[1\].method must be one of .*; did you mean 'wanda'"),
        ({"schedule": "cubical"}, r"cells\[1\].schedule must be .*'cubical'; did you mean 'cubic'"),
        ({"recovery": "rewnd"}, r"cells\[1\].recovery must be .*'rewnd'; did you mean 'rewind'"),
        ({"sparsity": 1.0}, r"cells\[1\]: sparsity must be .* in \[0, 1\), .* got 1.0"),
        ({"rate": -1.0}, r"cells\[1\]: rate must be .* got -1.0"),
        (
            {"rate": 1.0, "schedule": "cubic"},
            r"cells\[1\].schedule must be 'one_shot', since a rate",
        ),
        ({"rate": 1.0, "scope": "global"}, r"cells\[1\]: scope = 'global' and rate = 1.0 exclude"),
        ({"rate": 1.0, "sparsity": 0.5}, r"cells\[1\]: sparsity = 0.5 and rate = 1.0 exclude"),
        ({"sparsity": None}, r"cells\[1\]: a recipe must say how much"),
        ({"criterion": None}, r"cells\[1\]: a recipe must have a criterion.*neither"),
        ({"seed": 3}, r"cells\[1\].seed must be left out; give seeds = \(3,\), got 3"),
        ({"rate": 1.0, "pattern": "row"}, r"cells\[1\]: pattern = 'row' and rate = 1.0 exclude"),
        (
            {"scope": "global", "allocation": "erk"},
            r"cells\[1\]: scope 'global' would overrule.*erk",
        ),
        (
            {"schedule": "cubic", "recovery": "none"},
            r"cells\[1\].recovery must be other than 'none'",
        ),
        (
            {"schedule": "rigl", "schedule_options": {"drop_fractoin": 0.1}},
            r"cells\[1\].schedule_options has no setting .*did you mean 'drop_fraction'",
        ),
        (
            {"schedule": "rigl", "schedule_options": {"penalty": 0.1}},
            r"cells\[1\].schedule_options.penalty must be left at its default with schedule "
            r"'rigl'; it is for elsa, got 0.1",
        ),
        (
            {"schedule_options": {"updates": 3}},
            r"schedule_options.updates must be left .* 'one_shot'; it is for cubic, rigl, set",
        ),
        *(
            (
                {"schedule": schedule, "schedule_options": {name: value}},
                rf"config.study.cells\[1\].schedule_options.{name} must be .*{rule}, got {value}",
            )
            for schedule, name, value, rule in (
                ("cubic", "ramp_end", 1.5, "above 0 and at most 1"),
                ("iterative", "rounds", 0, "of at least 1"),
                ("cubic", "updates", 0, "of at least 1"),
                ("set", "exchange_end", 0.0, "above 0 and at most 1"),
                ("rigl", "drop_fraction", 1.5, "of at least 0 and at most 1"),
                ("elsa", "penalty", -1.0, "of at least 0"),
            )
        ),
        ({"seeds": []}, r"cells\[1\].seeds must be at least one seed"),
    ],
)
def test_cells_that_cannot_work_are_named_with_their_number(cell, sentence):
    usual = {"criterion": "magnitude", "sparsity": 0.5}
    base = {"criterion": "magnitude"} if "rate" in cell else usual
    with pytest.raises(InputError, match=sentence):
        config.validate(config.from_dict({"study": {"cells": [usual, base | cell]}}))


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        ({"scopes": ("row", "layer")}, r"config.study.scopes\[1\] must be one of .*, got 'layer'"),
        (
            {"cells": (config.CellConfig("swe", sparsity=0.5, zeros=typing.cast(Any, "fre")),)},
            r"config.study.cells\[0\].zeros must be one of keep, free, got 'fre'",
        ),
    ],
)
def test_choices_of_a_study_made_without_a_file_are_checked_too(study, sentence):
    with pytest.raises(InputError, match=sentence):
        config.validate(config.Config(study=config.StudyConfig(**study)))


def test_a_choice_has_the_same_values_wherever_it_can_be_made():
    classes = (Recipe, config.StudyConfig, settings.RequestSettings)
    recipe, study, command = map(typing.get_type_hints, classes)
    assert typing.get_args(study["scopes"]) == (recipe["scope"], ...)
    assert command["scope"] == recipe["scope"] | None
    assert command["zeros"] == recipe["zeros"]
    of_recipe, of_command = (typing.get_args(one["restore"])[0] for one in (recipe, command))
    fitting_any_mask = set(typing.get_args(of_recipe)) - {"least_squares"}
    assert set(typing.get_args(of_command)) == {"none", *fitting_any_mask}


@pytest.mark.parametrize("key", ["windows", "batch"])
def test_calibration_needs_windows(key):
    with pytest.raises(
        InputError, match=f"config.calibration.{key} must be an integer of at least 1, got 0"
    ):
        config.validate(config.from_dict({"calibration": {key: 0}}))


def test_a_config_may_start_from_another(tmp_path):
    (tmp_path / "first.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'name': 'first', 'log_every': 3})\n"
    )
    folder = tmp_path / "sweeps"
    folder.mkdir()
    (folder / "second.py").write_text(
        "from swe_prune.config import read\n"
        "def get_config():\n"
        "    config = read('../first.py', __file__)\n"
        "    config.name = 'second'\n"
        "    return config\n"
    )
    loaded = config.load(folder / "second.py")
    assert (loaded.name, loaded.log_every) == ("second", 3)
    (tmp_path / "first.py").unlink()
    with pytest.raises(InputError, match=r"first\.py' is not a file"):
        config.load(folder / "second.py")


def test_a_file_is_read_as_it_is_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "config.py"
    for steps in (100, 200):  # the same size and, here, the same second
        path.write_text(f"def get_config():\n    return {{'train': {{'steps': {steps}}}}}\n")
        os.utime(path, (1e9, 1e9))
        assert config.load(path, []).train.steps == steps
    assert list(tmp_path.iterdir()) == [path]
