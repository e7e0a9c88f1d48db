"""Finished phases that were damaged later are made again by themselves, with the same numbers."""

import csv
import dataclasses
import json
import shutil

import pytest
import tiny

from swe_prune import cli
from swe_prune.config import CellConfig
from swe_prune.runtime import storage

TIMES = {"seconds"}
DENSE = "seed_0/dense"
CELL = "seed_0/cells/tensor-magnitude-0.5"


def study(plays_dir):
    small = tiny.config(plays_dir)
    train = dataclasses.replace(small.train, steps=8, checkpoint_every=4, keep_every=4)
    cells = (
        CellConfig(criterion="magnitude", sparsity=0.25, recovery="rewind_weights",
                   recovery_steps=4),
    )  # fmt: skip
    grid = dataclasses.replace(
        small.study, std_criteria=(), criteria=("magnitude", "random"), seeds=(0,),
        scopes=("tensor",), cells=cells,
    )  # fmt: skip
    return dataclasses.replace(small, train=train, study=grid)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plays_dir):
    folder = tmp_path_factory.mktemp("finished")
    config = tiny.config_file(folder, study(plays_dir))
    assert cli.main(["run", f"--config={config}", f"--workdir={folder / 'work'}"]) == 0
    return folder / "work"


@pytest.fixture
def work(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "work")


def rows(work):
    with (work / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def flip(folder):
    """Flips a bit in the largest file of a checkpoint."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unfinish(work, cell="seed_0/cells/tensor-random-0.5"):
    """Makes one cell one that is not fine-tuned yet."""
    path = work / cell / "result.json"
    result = json.loads(path.read_text())
    gone = ("finetuned", storage.CHECKSUM)
    left = {k: v for k, v in result.items() if not k.startswith(gone)}
    path.write_text(json.dumps(storage.sealed(left)))


def cut(path):
    path.write_text(path.read_text()[:50])


def flipped_dense(work):
    flip(work / DENSE / "checkpoints/8")
    unfinish(work, CELL)
    (work / CELL / "masks/0.checksums").unlink()
    cut(work / "seed_0/control/result.json")
    return "checkpoint 4", "its checksums cannot be read"


def lost_checksums(work):
    (work / DENSE / "checkpoints/8.checksums").unlink()
    unfinish(work, CELL)
    shutil.rmtree(work / CELL / "masks/0")
    return "checkpoint 4", "it is missing"


def lost_early_values(work):
    (work / DENSE / "checkpoints/4/_CHECKPOINT_METADATA").write_text('["of another kind"]')
    (work / CELL / "result.json").write_text('{"finetuned_train_loss": []}')  # and no checksum
    return "from the start", "its result cannot be read"


def lost_folders(work):
    shutil.rmtree(work / DENSE / "checkpoints")
    unfinish(work, CELL)
    shutil.rmtree(work / CELL / "masks")
    return "from the start", "does not exist"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "command"),
    [
        (flipped_dense, "run"),
        (lost_checksums, "finetune"),
        (lost_early_values, "run"),
        (lost_folders, "run"),
    ],
)
def test_it_is_made_again_with_the_same_numbers(finished, work, capsys, damage, command):
    unfinish(work)
    damages = damage(work)
    capsys.readouterr()
    code = cli.main([command, f"--workdir={work}"])
    said = " ".join(capsys.readouterr().err.split())
    if command == "finetune":  # a cell without masks is to be pruned first
        assert (code, "run the command 'prune' first" in said) == (2, True)
        assert cli.main(["run", f"--workdir={work}"]) == 0
    else:
        assert code == 0
    for part in damages:
        assert part in said
    assert rows(work) == rows(finished)


@pytest.mark.slow
def test_masks_that_only_evaluate_reads_are_made_again_as_it_says(finished, work, capsys):
    flip(work / CELL / "masks/0")
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={work}"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"remove {work / CELL} and run the command 'run'" in message
    shutil.rmtree(work / CELL)
    assert cli.main(["run", f"--workdir={work}"]) == 0
    assert rows(work) == rows(finished)
    assert cli.main(["evaluate", f"--workdir={work}"]) == 0


@pytest.mark.slow
def test_the_workdir_knows_what_made_it_when_its_config_is_lost(work, tmp_path, plays_dir, capsys):
    other = tiny.config_file(tmp_path, dataclasses.replace(study(plays_dir), log_every=7))
    for damage in ((work / "config.json").unlink, lambda: cut(work / "config.json")):
        damage()
        assert cli.main(["run", f"--config={other}", f"--workdir={work}"]) == 2
        assert "made by another config: log_every" in capsys.readouterr().err
        assert cli.main(["run", f"--workdir={work}"]) == 0
        assert json.loads((work / "config.json").read_text())["config"]["log_every"] == 4
    for path in (work / "config.json", work / "seed_0/config.json"):
        path.unlink()
    assert cli.main(["run", f"--config={other}", f"--workdir={work}"]) == 2
    assert "put the file back or choose another --workdir" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "plan", "report", "evaluate"])
def test_an_empty_workdir_is_refused(command, tmp_path, plays_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.config_file(tmp_path, study(plays_dir))
    assert cli.main([command, f"--config={config}", "--workdir="]) == 2
    assert "--workdir" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [config.name]
