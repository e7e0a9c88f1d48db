"""Processes that share a working directory do everything once, and each cell alike."""

import csv
import dataclasses
import itertools
import multiprocessing
import time
from pathlib import Path

import pytest
import tiny
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from swe_prune import cli, study
from swe_prune.config import StudyConfig
from swe_prune.errors import InputError
from swe_prune.recipe import Recipe
from swe_prune.runtime import processes, supervisor
from swe_prune.runtime.locks import lock_for_run
from swe_prune.study import grid, phases, prune_phase
from swe_prune.study.shard import Shard
from swe_prune.training.progress import Progress


@pytest.mark.parametrize("text", ["1/3", "01/03", " 1 / 3 "])
def test_a_number_of_many_is_read_alike_by_a_process_a_shard_and_the_parent(tmp_path, text):
    where = processes.process_address("host:1234", text)
    assert (where.index, where.count) == (1, 3)
    assert study.parse(text) == Shard(1, 3)
    sign = supervisor._sign(epath.Path(tmp_path), processes.numbered(text))
    missing = supervisor._absent(epath.Path(tmp_path), sign, processes.numbered(text), 60)
    assert missing.startswith("process 0, 2 of 3 did not come up")


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_item_is_of_exactly_one_shard(count, items):
    parts = [Shard(index, count).part(range(items)) for index in range(count)]
    assert sorted(itertools.chain(*parts)) == list(range(items))
    assert all(item % count == index for index, part in enumerate(parts) for item in part)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 5))
def test_shards_have_whole_seeds_where_their_numbers_allow(sizes, count):
    cells = [
        grid.Cell(Recipe("magnitude", sparsity=number / 10, seed=seed))
        for seed, size in enumerate(sizes)
        for number in range(1, size + 1)
    ]
    dealt = [Shard(index, count).part(grid.in_turns(cells)) for index in range(count)]
    assert sorted(itertools.chain(*dealt), key=cells.index) == cells
    if len(set(sizes)) == 1 and len(sizes) % count == 0:
        for part in dealt:
            assert len({cell.seed for cell in part}) <= len(sizes) // count


def settings_of(plays_dir):
    study = StudyConfig(
        std_criteria=(), criteria=("magnitude", "random"), sparsities=(0.5,), seeds=(0,),
        scopes=("tensor", "global"),
    )  # fmt: skip
    return tiny.config(plays_dir, study=study)


def table(path):
    with (path / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def run(settings, path, shard, commands=(phases.run,)):
    shared = study.setup(settings, path, shard)
    with study.claim(shared.workdir, settings, shard):
        for command in commands:
            command(shared, Progress())
    return shared


@pytest.fixture(scope="module")
def whole(tmp_path_factory, plays_dir):
    """The study done by one process."""
    return run(settings_of(plays_dir), tmp_path_factory.mktemp("whole"), None)


@pytest.mark.slow
def test_shards_do_what_one_process_does(whole, tmp_path, plays_dir):
    settings = settings_of(plays_dir)
    first = run(settings, tmp_path / "shared", Shard(1, 2))
    assert [cell.name for cell in first.cells] == ["tensor-random-0.5", "global-random-0.5"]
    assert len(table(tmp_path / "shared")) == 2
    stamp = (tmp_path / "shared/seed_0/dense/result.json").stat().st_mtime_ns
    assert cli.main(["run", f"--workdir={tmp_path / 'shared'}", "--shard=0/2"]) == 0
    assert (tmp_path / "shared/seed_0/dense/result.json").stat().st_mtime_ns == stamp
    assert table(tmp_path / "shared") == table(whole.workdir.path)


def test_shards_share_a_workdir_and_a_whole_run_does_not(tmp_path, plays_dir):
    settings = settings_of(plays_dir)
    workdir = study.Workdir(tmp_path)
    with study.claim(workdir, settings, Shard(0, 2)):
        with study.claim(workdir, settings, Shard(1, 2)):
            pass
        for other in (None, Shard(0, 2)):
            with (
                pytest.raises(InputError, match="is in use by another run"),
                study.claim(workdir, settings, other),
            ):
                pass
    changed = dataclasses.replace(settings, log_every=7)
    with (
        pytest.raises(InputError, match="made by another config: log_every"),
        study.claim(workdir, changed, Shard(0, 2)),
    ):
        pass


def _hold(folder, ready, done):
    with lock_for_run(folder, "it", lambda _: None):
        ready.set()
        done.wait(30)


def test_who_comes_second_says_so_and_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        said = []

        def say(text):
            said.append((text, time.monotonic()))
            done.set()

        with lock_for_run(tmp_path, "dense model of seed 0", say):
            assert said[0][0] == "another process is at the dense model of seed 0; waiting for it"
    finally:
        done.set()
        other.join()
    said.clear()
    with lock_for_run(tmp_path, "dense model of seed 0", lambda text: said.append(text)):
        assert said == []


@pytest.mark.slow
def test_what_another_process_finished_meanwhile_is_not_done_again(whole, monkeypatch):
    cells = [(0, grid.cells(whole.config))]
    monkeypatch.setattr(
        prune_phase, "todo", lambda *_: cells
    )  # as it was before the other finished
    finished = Path(whole.workdir.path).glob("seed_*/**/result.json")
    stamps = {p: p.stat().st_mtime_ns for p in finished}
    assert len(stamps) == 6
    phases.prune(whole, Progress())
    phases.finetune(whole, Progress())
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
