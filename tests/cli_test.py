"""Every wrong input of a user: one sentence with what, why and how to fix it, exit code 2."""

import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
import tiny

import swe_prune
from swe_prune import cli
from swe_prune.cli import parsing
from swe_prune.errors import InputError
from swe_prune.pretrained import settings


def fails(capsys, arguments):
    """Returns the one sentence that a command with wrong input prints."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("swe_prune: ")
    return lines[0].removeprefix("swe_prune: ")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ("config.train has no setting 'stepz'", "'steps'")),
        ("nonsense=3", ("config has no setting 'nonsense'", "Known:")),
        ("model.width='wide'", ("config.model.width must be an integer", "'wide'")),
        ("model.width=31", ("config.model.width must be a multiple of model.heads", "got 31")),
        ("model.activation=gelo", ("'gelo'", "'gelu'")),
        ("model.vocab_size=9", ("vocab_size = 9 is too small", "raise it")),
        ("study.criteria=['swee']", ("criterion must be one of", "got 'swee'; did you mean 'swe'")),
        (
            "study.sparsities=[1.0]",
            (
                "config.study.sparsities must be a finite number of at least 0 and below 1",
                "got 1.0",
            ),
        ),
        (
            "study.sparsities=[-0.1]",
            (
                "config.study.sparsities must be a finite number of at least 0 and below 1",
                "got -0.1",
            ),
        ),
        (
            "study.scopes=['layer']",
            ("config.study.scopes[0] must be one of tensor, global, row", "got 'layer'"),
        ),
        (
            "study.std_rates=[-1.0]",
            ("config.study.std_rates must be a finite number of at least 0", "got -1.0"),
        ),
        (
            "trajectory.measures=['late_men']",
            ("measure must be one of", "got 'late_men'; did you mean 'late_mean'"),
        ),
        ("trajectory.every=1000", ("0 snapshots", "lower")),
        ("trajectory.window_start=99", ("the window starts at 99", "lower")),
        ("prune.include=['kernl$']", ("include rule 'kernl$' matches no weight", "Names:")),
        ("prune.exclude=['nothing_like_it']", ("exclude rule 'nothing_like_it'", "matches no")),
        ("data.dataset=no_such_dataset", ("no_such_dataset",)),
        ("data.dataset=/no/such/file.txt", ("/no/such/file.txt",)),
        ("data.train_split=training", ("'training'", "train")),
        (
            "data.eval_windows=9",
            ("config.data.eval_windows must be a multiple of data.eval_batch", "got 9"),
        ),
        ("train.steps='many'", ("duration must be", "got 'many'; write e.g. 500")),
        (
            "train.accumulate=3",
            ("config.train.accumulate must be a divisor of data.batch = 4", "got 3"),
        ),
        ("parallel.data=3", ("must give a mesh of", "got data 3 x fsdp 1 x tensor 1 = 3; make")),
        ("parallel.rules=[{'pattern': 'x', 'axes': ['fsdp']}]", ("rule 'x' matches no", "correct")),
        ("train.steps=0", ("config.train.steps is 0", "at least one")),
    ],
)
def test_a_wrong_setting_is_named_with_the_fix(override, parts, tmp_path, plays_dir, capsys):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    work = tmp_path / "work"
    message = fails(
        capsys, ["run", f"--config={config}", f"--workdir={work}", f"--config.{override}"]
    )
    for part in parts:
        assert part in message
    assert not (work / "seed_0").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--sparsity=\u0660.\u0665", "must be a number"),  # digits of another script
        ("--include=\udcff", "bytes that are not UTF-8"),  # as a file name of Latin-1 is given
        ("--at-once=3", "--at-once: takes no value, got '3'"),
        ("--criterion=" + "x" * 100_000, "criterion must be one of"),
    ],
)
def test_texts_that_no_option_is_are_refused(tmp_path, capsys, option, sentence):
    message = fails(capsys, ["plan", f"--model={tmp_path}", option])
    assert sentence in message
    assert len(message) < 2000


def test_a_config_that_is_none(tmp_path, capsys):
    work = f"--workdir={tmp_path / 'work'}"
    assert "is not a file" in fails(capsys, ["run", "--config=absent.py", work])
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_here")
    assert "fails to run: ModuleNotFoundError" in fails(capsys, ["run", f"--config={broken}", work])
    empty = tmp_path / "empty.py"
    empty.write_text("")
    assert "defines no get_config()" in fails(capsys, ["run", f"--config={empty}", work])
    assert "no config.json" in fails(capsys, ["run", work])
    message = fails(capsys, ["run", work, "--confg=x"])
    assert "run has no option --confg" in message
    assert "did you mean '--config'" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"abc\x00def" * 400, "binary"),
        (b"\xff\xfe\xfa" * 400, ""),
        (b"hi", "has 2 characters"),
    ],
    ids=["empty", "binary", "not utf-8", "short"],
)
def test_a_text_that_cannot_be_trained_on(content, part, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    config = tiny.config_file(tmp_path, tiny.config())
    data = (f"dataset={text}", "train_chars=None", "validation_chars=None")
    overrides = [f"--config.data.{setting}" for setting in data]
    message = fails(
        capsys, ["run", f"--config={config}", f"--workdir={tmp_path / 'w'}", *overrides]
    )
    assert "mine.txt" in message
    assert part in message


def test_a_workdir_that_cannot_be_written(tmp_path, plays_dir, capsys):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for place in (in_the_way, in_the_way / "below", "/proc/none"):
        message = fails(capsys, ["run", f"--config={config}", f"--workdir={place}"])
        assert "cannot be written" in message
        assert "choose another --workdir" in message


def test_phases_out_of_order_say_what_comes_first(tmp_path, plays_dir, capsys):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'work'}"]
    for command, missing in (("prune", "train"), ("finetune", "train"), ("report", "results.csv")):
        code = cli.main([command, *(arguments if command != "report" else arguments[1:])])
        assert code == 2
        assert missing in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2", "2/2", "-1/2", "a/b", "0/0", "1.0/2", ""])
def test_a_shard_that_is_none(text, tmp_path, plays_dir, capsys):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    work = tmp_path / "work"
    message = fails(capsys, ["run", f"--config={config}", f"--workdir={work}", f"--shard={text}"])
    assert f"--shard={text} is not a share of the work" in message
    assert not work.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "--workdir=s3://bucket/run"],
            "--workdir must be a folder or gs://BUCKET/..., got 's3://bucket/run'",
        ),
        (["plan", "--devices=0"], "--devices must be at least 1, got 0"),
        (["run", "--workdir=w", "--process=0/2"], "belong together"),
        (["run", "--workdir=w", "--coordinator=a:1", "--process=2/2"], "--process must be I/N"),
        (["run", "--workdir=w", "--coordinator=a", "--process=1/2"], "--coordinator must be HOST"),
    ],
    ids=lambda value: "".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_place_that_is_none(arguments, said, tmp_path, plays_dir, capfd, monkeypatch):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, f"--config={config}"]) == 2
    sentences = [line for line in capfd.readouterr().err.splitlines() if "swe_prune: " in line]
    assert len(sentences) == 1
    assert said in sentences[0]
    assert not list(tmp_path.rglob("seed_*"))
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a command must be given, one of run, plan"),
        (["rnu"], "the command must be one of run, plan, .*, got 'rnu'; did you mean 'run'"),
        (["run"], "run needs --workdir; give it"),
        (["run", "--workdir"], "argument --workdir: expected one argument"),
        (["run", "--workdir=w", "--distributed=2"], "--distributed: takes no value, got"),
        (["run", "--workdir=w", "--shrad=1/2"], "no option --shrad .*; did you mean '--shard'"),
        (["run", "--workdir=w", "--work=v"], "no option --work .*; did you mean '--workdir'"),
        (["run", "--workdir=w", "config.py"], "run takes no 'config.py'; write options as --NAME"),
        (["run", "--workdir=w", "--model=m"], "run has no option --model"),
        (["run", "--config=C", "--workdir=w", "--config.train.steps"], "has no '='"),
        (["plan", "--devices=two"], "--devices must be an integer, got 'two'"),
        (["plan", "--devices=2.0"], "--devices must be an integer, got 2.0"),
        (["prune"], "prune needs --workdir; give it, or --model=PATH"),
        (["prune", "--model=m", "--criterion=wanda"], "prune needs --out; give it$"),
        (["prune", "--model="], "prune needs --model"),
        (["prune", "--sparsity=0.5", "--workdir=w"], "--sparsity is for a pretrained model; give"),
        (["prune", "--model=m", "--shard=0/2"], "--shard is for an experiment; leave out either"),
        (["prune", "--model=m", "--config.log_every=1"], "--config.log_every is for an experiment"),
        (["finetune", "--model=m", "--out=o", "--steps=x"], "--steps must be an integer, got 'x'"),
        (["evaluate", "--model=m", "--dtype=int8"], "--dtype must be one of float32, .*'int8'"),
        (["evaluate", "--model=m", "--at-most=9"], "--at-most has no effect without --dense; give"),
        (["report", "--workdir=w", "--config.log_every=1"], "no --config was given"),
        (["report", "--workdir=w", "--config=C"], "workdir 'w' has no config.json"),
        (["evaluate", "--model=m", "--promt=x"], "no option --promt .*; did you mean '--prompt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_is_one_sentence(arguments, said, tmp_path, capsys):
    (tmp_path / "c.py").write_text(tiny.CONFIG_FILE.format(values={}))
    given = [one.replace("=C", f"={tmp_path / 'c.py'}") for one in arguments]
    message = fails(capsys, given)
    assert re.search(said, message), message
    assert not (tmp_path / "w").exists()


NEEDING = [
    (command, field)
    for command, cls in settings.COMMANDS.items()
    for field in dataclasses.fields(cls)
    if "needs" in field.metadata
]


@pytest.mark.parametrize(
    ("command", "field"), NEEDING, ids=[f"{command} {field.name}" for command, field in NEEDING]
)
def test_an_option_without_the_one_it_needs_is_refused_even_with_its_default(command, field):
    value = field.default[0] if isinstance(field.default, tuple) else field.default
    given = [f"--model=m --out=o {parsing.flag(field)}={1 if value is None else value}".split()]
    given = [one for one in given[0] if command == "finetune" or "--out" not in one]
    needed = "--" + field.metadata["needs"].replace("_", "-")
    with pytest.raises(InputError, match=f"no effect without {needed}; give {needed}"):
        parsing.parse([command, *given])
    with_it = needed if field.metadata["needs"] == "track" else f"{needed}=2"
    parsing.parse([command, *given, with_it])


def test_options_become_the_types_of_their_settings_and_text_stays_as_typed():
    common = ["--model=m", "--out=o"]
    given = parsing.parse(
        ["prune", *common, "--criterion=wanda", "--sparsity=1", "--dtype=bfloat16", "--at-once",
         "--prompt='Tis", "--prompt=5", "--option=p=0.5", "--eval-windows=3", "--seed", "7"]
    ).settings  # fmt: skip
    assert given == settings.PruneSettings(
        model="m", out="o", criterion="wanda", sparsity=1.0, dtype="bfloat16", at_once=True,
        prompts=("'Tis", "5"), options=("p=0.5",), eval_windows=3, seed=7,
    )  # fmt: skip
    assert type(given.sparsity) is float
    assert (
        parsing.parse(["finetune", *common, "--learning-rate=1e-3"]).settings.learning_rate == 1e-3
    )
    parsed = parsing.parse(["run", "--workdir=w", "--config.train.steps=9", "--config", "c.py"])
    assert parsed == ("run", parsing.RunSettings(workdir="w", config="c.py"), ["train.steps=9"])
    assert parsing.parse(["plan"]).settings == parsing.PlanSettings()


@pytest.mark.parametrize("command", parsing.COMMANDS)
def test_help_shows_every_option_of_both_uses(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    experiment, _, model = shown.partition("options for a pretrained model:")
    of_experiment = parsing.COMMANDS[command].settings
    assert ("options of an experiment" in experiment) == (of_experiment is not None)
    if of_experiment is not None:
        assert f"python -m swe_prune {command} --config=FILE" in experiment
        assert "--config.GROUP.NAME=VALUE" in experiment
        for field in dataclasses.fields(of_experiment):
            assert f"--{field.name}" in experiment
    assert bool(model) == (command in settings.COMMANDS)
    if model:
        assert f"python -m swe_prune {command} --model=PATH" in experiment
        for field in dataclasses.fields(settings.COMMANDS[command]):
            name = field.metadata.get("name", field.name).replace("_", "-")
            assert f"  --{name} " in model
            assert field.metadata["help"].split()[0] in model


def test_a_wrong_command_line_is_refused_before_what_computes_is_imported():
    code = (
        "import sys; from swe_prune import cli; cli.main(['prune', '--workdir=w', '--sparsity=1']);"
        "print(sorted({'orbax', 'grain', 'swe_prune.study', 'swe_prune.models'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--sparsity is for a pretrained model" in done.stderr
    assert done.stdout == "[]\n"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"swe_prune {swe_prune.__version__}\n"


def test_a_run_without_the_extra_for_its_report_says_so_first(
    tmp_path, plays_dir, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    message = fails(capsys, ["run", f"--config={config}", f"--workdir={tmp_path / 'work'}"])
    assert "pip install 'swe-prune[report]'" in message
    assert not (tmp_path / "work").exists()


def test_plan_trains_nothing_and_names_every_tensor(tmp_path, plays_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    named = dataclasses.replace(tiny.config(plays_dir), name="tiny[red]")
    config = tiny.config_file(tmp_path, named)
    assert cli.main(["plan", f"--config={config}"]) == 0
    shown = capsys.readouterr().out
    parts = ["tiny[red]", "block_0/mlp/up/kernel", "dense: embedding", "dense: fewer than two axes"]
    parts += ["16 cells over seeds 0, 1", "Tracking late_mean takes 12.29 kB", "About "]
    for part in parts:
        assert part in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny_config.py"]


def test_a_plan_for_programs_says_what_the_plan_for_people_does(tmp_path, plays_dir, capsys):
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    assert cli.main(["plan", "--json", f"--config={config}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tracking"] == {"late_mean": 12288}
    assert found["prunable"] == 12288 // 4 < found["weights"]
    kernels = {name for name, about in found["tensors"].items() if about["dense"] is None}
    assert "block_0/mlp/up/kernel" in kernels
    assert found["tensors"]["block_0/mlp/up/kernel"]["shape"] == [16, 64]
    assert "embedding" in found["tensors"]["embedding/embedding"]["dense"]
    assert sum(math.prod(found["tensors"][name]["shape"]) for name in kernels) == found["prunable"]
    assert len(found["cells"]) == 16
    assert found["seeds"] == [0, 1]
    # Two dense models of 24 steps, and 4 more of each cell and each seed's control.
    assert found["steps"] == 2 * 24 + 4 * (16 + 2)
    assert found["seconds"] > 0


@pytest.mark.slow
def test_a_scanned_model_trains_and_is_pruned_by_what_its_layers_are_given(
    tmp_path, plays_dir, capsys
):
    """Calibration looks into the layers of the plain model, and the workdir is that one's too."""
    small = tiny.config(plays_dir)
    study = dataclasses.replace(
        small.study, seeds=(0,), std_criteria=(), criteria=("wanda",), scopes=("tensor",)
    )
    model = dataclasses.replace(small.model, layers=2)
    small = dataclasses.replace(small, study=study, model=model)
    config = tiny.config_file(tmp_path, small)
    switches = ["--config.model.scan_layers=True", "--config.model.remat=True"]
    switches += ["--config.train.accumulate=2", "--config.finetune.accumulate=2"]
    tables = []
    for name, given in (("scanned", switches), ("plain", [])):
        work = f"--workdir={tmp_path / name}"
        assert cli.main(["run", f"--config={config}", work, *given]) == 0
        with (tmp_path / name / "results.csv").open() as file:
            (row,) = csv.DictReader(file)
        tables.append(row)
    # rtol: the parts of a batch are added in another order, for 24 + 4 steps.
    for column in ("dense_loss", "pruned_loss", "finetuned_loss", "control_loss"):
        scanned, plain = (float(row[column]) for row in tables)
        assert scanned == pytest.approx(plain, rel=1e-5), column
    capsys.readouterr()
    times = iter([100.0, 440.0])
    again = ["run", f"--config={config}", f"--workdir={tmp_path / 'scanned'}"]
    assert cli.main(again, clock=lambda: next(times)) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Finished in 5 min 40 s. Energy at the meter: ")


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_the_same_command_goes_on(tmp_path, plays_dir):
    small = tiny.config(plays_dir)
    study = dataclasses.replace(small.study, seeds=(0,), std_criteria=(), criteria=("swe",))
    config = tiny.config_file(tmp_path, dataclasses.replace(small, study=study))
    command = [sys.executable, "-m", "swe_prune", "train", f"--config={config}"]
    command.append(f"--workdir={tmp_path / 'work'}")
    limited = ["bash", "-c", 'ulimit -f 12; exec "$@"', "limited", *command]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    first = subprocess.run(limited, capture_output=True, text=True, env=environment)
    assert first.returncode == 1, first.stderr
    assert "Traceback" not in first.stderr
    assert "run the same command again" in first.stderr.splitlines()[-1]
    assert subprocess.run(command, env=environment).returncode == 0


def test_version_prints_the_version_and_ends_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"swe_prune {swe_prune.__version__}\n"


def test_a_path_that_cannot_be_is_no_full_disk(tmp_path, capsys):
    model = tmp_path / ("m" * 300)
    assert cli.main(["prune", f"--model={model}", f"--out={tmp_path / 'o'}", "--sparsity=0.5"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "(File name too long); see to this path and its rights" in said
    assert "make room" not in said
