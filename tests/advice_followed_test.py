"""What a message tells the user to do works where it was told: each is provoked and followed."""

import dataclasses
import json
import shutil

import pretrained_tiny
import pytest
import tiny

from swe_prune import cli, interop
from swe_prune.report import read

QUICK = ["--window=32", "--eval-windows=8", "--new-tokens=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fails(capsys):
    """Returns a function that runs a command, which must fail with these words."""

    def run(arguments, *said):
        capsys.readouterr()
        assert cli.main([str(one) for one in arguments]) in (1, 2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        for part in said:
            assert part in error, error

    return run


def works(arguments):
    assert cli.main([str(one) for one in arguments]) == 0


def of_model(place, name, *more, model=None):
    """A command for the tiny model, with texts where it reads some."""
    texts = {"prune": "calibration", "cut": "calibration", "finetune": "text"}
    given = [name, f"--model={model or place.model}"]
    if name in texts:
        given += [*QUICK, f"--evaluation={place.held_out}", f"--{texts[name]}={place.train}"]
    if texts.get(name) == "calibration":
        given += ["--calibration-windows=8"] * (not any("-windows" in one for one in more))
        given += ["--calibration-window=32"] * (not any("-window=" in one for one in more))
    if name == "finetune":
        given += ["--batch=4", "--train-window=32"]
    return [*given, *more]


MAGNITUDE = ["--criterion=magnitude", "--sparsity=0.5"]
NEURONS = ["--units=neurons", "--criterion=magnitude"]
FOLLOWED = {
    "a name that is near": (
        "plan", ["--criterion=wandaa", "--sparsity=0.5"], "did you mean 'wanda'",
        ["--criterion=wanda", "--sparsity=0.5"],
    ),
    "an option that is near": (
        "plan", ["--criterion=wanda", "--sparsty=0.5"], "did you mean '--sparsity'",
        ["--criterion=wanda", "--sparsity=0.5"],
    ),
    "at once": (
        "plan", ["--criterion=wanda", "--sparsity=0.5", "--scope=row"], "--at-once",
        ["--criterion=wanda", "--sparsity=0.5", "--scope=row", "--at-once"],
    ),
    "two that agree": (
        "plan", ["--criterion=wanda", "--sparsity=0.6", "--pattern=2:4"], "make the two agree",
        ["--criterion=wanda", "--sparsity=0.5", "--pattern=2:4"],
    ),
    "an amount": ("cut", NEURONS, "give one of them", [*NEURONS, "--sparsity=0.5"]),
    "the example of a budget": (
        "cut", [*NEURONS, "--budget=1e8"], "--budget=params=1e8",
        [*NEURONS, "--budget=params=1e8"],
    ),
    "no refit of layers": (
        "cut", ["--units=layers", "--criterion=block_influence", "--sparsity=0.5", "--restore"],
        "leave it out", ["--units=layers", "--criterion=block_influence", "--sparsity=0.5"],
    ),
    "snapshots": (
        "finetune", ["--steps=1", "--track"], "lower it",
        ["--steps=1", "--track", "--track-every=1"],
    ),
    "a model to compare": (
        "bench", ["--runs=1", "--warmup=1", "--prompt-tokens=4", "--new-tokens=2",
                  "--energy-windows=0", "--against-prefix=x."],
        "give --against=PATH",
        ["--runs=1", "--warmup=1", "--prompt-tokens=4", "--new-tokens=2", "--energy-windows=0",
         "--against=MODEL"],
    ),
}  # fmt: skip


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_option_that_a_message_names_works(place, tmp_path, fails, name):
    command, wrong, said, right = FOLLOWED[name]
    out = [f"--out={tmp_path / 'out'}"] * (command not in ("plan", "bench"))
    fails(of_model(place, command, *wrong, *out), said)
    right = [one.replace("MODEL", str(place.model)) for one in right]
    works(of_model(place, command, *right, *out))


@pytest.mark.slow
def test_what_is_said_of_folders_works(place, tmp_path, fails, capsys):
    out = tmp_path / "new" / "out"
    prune = of_model(place, "prune", *MAGNITUDE, "--compress", f"--out={out}")
    fails(prune, "create it first")
    out.parent.mkdir()
    works(prune)
    assert "interop.export(DIR, interop.load(PATH)) writes an ordinary folder" in (
        capsys.readouterr().out.replace("\n", "")
    )
    plain = interop.export(tmp_path / "plain", interop.load(out))
    works(["plan", f"--model={plain}", *MAGNITUDE])
    fails(prune, "already exists; remove it")
    shutil.rmtree(out)
    works(prune)

    # A fine-tuning that was begun with other settings.
    tune = [*of_model(place, "finetune", model=plain), f"--out={tmp_path / 'tuned'}"]
    diverging = ["--learning-rate=3e38", "--weight-decay=1e38", "--warmup=0"]
    fails([*tune, "--steps=2", *diverging], "training diverged; remove", "tuned.work")
    fails([*tune, "--steps=1"], "go back to those, or remove it")
    shutil.rmtree(tmp_path / "tuned.work")
    works([*tune, "--steps=1"])


def _stop_before_its_end(dense):
    """Makes a finished phase one that was killed after its checkpoint of step 4."""
    shutil.rmtree(dense / "checkpoints/8")
    (dense / "checkpoints/8.checksums").unlink()
    (dense / "result.json").unlink()


@pytest.mark.slow
def test_what_is_said_of_a_run_works(tmp_path, plays_dir, fails):
    small = tiny.config(plays_dir)
    train = dataclasses.replace(small.train, steps=8)
    study = dataclasses.replace(
        small.study, std_criteria=(), criteria=("magnitude",), seeds=(0,), scopes=("tensor",)
    )
    small = dataclasses.replace(small, train=train, study=study)
    config = f"--config={tiny.config_file(tmp_path, small)}"
    work = f"--workdir={tmp_path / 'work'}"
    fails(["run", work], "or --config to make a new one")
    fails(["report", work], "run the experiment first")
    fails(["prune", work, config], "run the command 'train' first")
    works(["train", work, config])
    _stop_before_its_end(tmp_path / "work/seed_0/dense")
    log = tmp_path / "work/seed_0/dense/metrics.jsonl"
    log.write_text("\n".join(["{", *log.read_text().splitlines()[1:], ""]))
    fails(["train", work], "metrics.jsonl is damaged", "remove it and run the same command again")
    log.unlink()
    works(["train", work])
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 8
    fails(["finetune", work], "run the command 'prune' first")
    works(["prune", work])
    works(["finetune", work])
    other = [config, "--config.log_every=9"]
    fails(["run", work, *other], "choose another --workdir or go back to that config")

    # Damaged files of the run: what the report says of each is done, and it works.
    folder = tmp_path / "work"
    cell = folder / "seed_0/cells/tensor-magnitude-0.5/result.json"
    results = (folder / "results.csv").read_text()
    for path, said, does in (
        (folder / "results.csv", "run the experiment's command again", lambda path: None),
        (cell, "remove it and run the experiment's command again", lambda path: path.unlink()),
        (next((folder / "ledger").glob("*.json")), "move it away", lambda path: path.unlink()),
        (folder / "seed_0/dense/metrics.jsonl", "remove it", lambda path: path.unlink()),
    ):
        path.write_text("damaged\n")
        fails(["report", work], path.name, said)
        does(path)
        for command in ("prune", "finetune") if "command again" in said else ():
            works([command, work])
        read.load(folder)
    kept = [line.rsplit(",", 1)[0] for line in results.splitlines()]  # but for the seconds
    assert [one.rsplit(",", 1)[0] for one in (folder / "results.csv").read_text().splitlines()] == (
        kept
    )
