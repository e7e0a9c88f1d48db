"""A workdir in a bucket: the real clients (gcsfs, orbax, tensorstore) against a server here."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import tiny

from swe_prune import cli, report, study
from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import InputError, RunError
from swe_prune.runtime import lease, locks, storage
from swe_prune.training import metrics

TREE = {"w": jnp.arange(6.0).reshape(2, 3), "mask": jnp.array([True, False]), "dense": None}
ENDINGS = (".json", ".jsonl", ".csv", ".html", ".md", ".png")
TIMES = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def buckets():
    """The objects of a server that this process and those it starts find as Google's."""
    with gcs_server.serving("bucket") as (url, made), pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks by another protocol
            "GOOGLE_CLOUD_PROJECT": "tests",
        }.items():
            patch.setenv(name, value)
        # Only now: it reads the environment when it is imported.
        pytest.importorskip("gcsfs", reason="workdirs in buckets need the extra 'gcs'")
        patch.setattr("fsspec.config.conf", {"gcs": {"token": "anon"}})
        yield made


@pytest.fixture
def names(buckets):
    """The objects of the bucket, which is empty."""
    buckets["bucket"].clear()
    return buckets["bucket"]


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    if request.param == "folder":
        return storage.parse_path(tmp_path / "run")
    request.getfixturevalue("names")
    return storage.parse_path("gs://bucket/run")


def test_a_file_that_is_replaced_by_a_longer_one_is_read_whole(names, monkeypatch):
    """As another process of the run does between a cell's phases."""
    import fsspec

    path = storage.parse_path("gs://bucket/result.json")
    path.write_text('{"loss": 1}')
    files = fsspec.filesystem("gcs", finalize_on_close=True)  # epath's
    size = files.info

    def replaced(*args, **options):
        found = size(*args, **options)
        names["result.json"] = (b'{"loss": 1, "more": 2}', *names["result.json"][1:])
        return found

    monkeypatch.setattr(files, "info", replaced)
    assert json.loads(storage.read_text(path))["loss"] == 1


def test_files_are_written_found_moved_and_removed(place):
    for name in ("a/one.json", "a/b/two.json", "three.json"):
        storage.write(place / name, name)
    storage.write(place / "three.json", b"again")
    assert storage.files(place) == ["a/b/two.json", "a/one.json", "three.json"]
    assert (place / "three.json").read_text() == "again"
    storage.write(place / "c/old.json", "")
    storage.move(place / "a", place / "c")
    assert storage.files(place) == ["c/b/two.json", "c/one.json", "three.json"]
    assert (place / "c/b/two.json").read_text() == "a/b/two.json"
    storage.remove(place / "c")
    storage.remove(place / "c")
    assert not (place / "c").exists()
    assert storage.files(place) == ["three.json"]


def test_checkpoints_come_back_and_only_whole_ones(place):
    store = Checkpoints(place)
    for step in (1, 2, 3):
        store.save(step, TREE, {"position": step})
    store.close()
    for file in place.glob("3.*checksums"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"checkpoint 3 .* is incomplete"):
        store = Checkpoints(place)
    assert not (place / "3").exists()
    tree, extra = store.restore(jax.eval_shape(lambda: TREE))
    assert extra == {"position": 2}
    np.testing.assert_array_equal(tree["w"], TREE["w"])
    store.close()


def test_what_was_changed_is_not_trusted(place):
    store = Checkpoints(place)
    for step in (1, 2):
        store.save(step, TREE, {"position": step})
    store.wait()
    sizes = {name: len((place / "2" / name).read_bytes()) for name in storage.files(place / "2")}
    largest = place / "2" / max(sizes, key=lambda name: sizes[name])
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"checkpoint 2 .* is damaged.* continuing from 1"):
        assert store.restore(TREE)[1] == {"position": 1}
    assert (place / "damaged_2").exists()
    store.save(2, TREE, {"position": "again"})
    store.wait()
    assert store.restore(TREE)[1] == {"position": "again"}
    store.close()


def test_lines_in_a_bucket_are_written_together(names, monkeypatch):
    path = storage.parse_path("gs://bucket/run") / "metrics.jsonl"
    lines = metrics.JsonLines(path, 0)
    for step in (1, 2, 3):
        lines.write(step, {"loss": np.float32(step)})
    assert metrics.read_lines(path) == []
    lines.flush()
    written = names["run/metrics.jsonl"]
    assert [line["step"] for line in metrics.read_lines(path)] == [1, 2, 3]
    lines.flush()
    assert names["run/metrics.jsonl"] == written, "nothing new, so nothing is sent"
    monkeypatch.setattr(metrics, "BUCKET_SECONDS", 0.0)
    lines = metrics.JsonLines(path, 2)
    lines.write(3, {"loss": 9.0})
    assert [line["loss"] for line in metrics.read_lines(path)] == [1.0, 2.0, 9.0]


@pytest.fixture(params=["file", "gcs"])
def objects(request, tmp_path, monkeypatch):
    """A store that writes on condition: on disk, by its own locks, and in a bucket."""
    # No less: a holder that a busy machine keeps from renewing ends its process, which is this one.
    monkeypatch.setenv("SWE_PRUNE_LOST_TIMEOUT", "3")
    if request.param == "file":
        return ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
    request.getfixturevalue("names")
    return lease.store(storage.parse_path("gs://bucket/run"))


def written(objects, **changes):
    """Puts a holder's object where another process would have left it."""
    holder = dataclasses.replace(lease.Holder("someone", "elsewhere", 7, 1.5), **changes)
    objects.write("x", json.dumps(dataclasses.asdict(holder)).encode()).result()


@pytest.mark.quick(1)
def test_a_lease_is_one_processs_until_it_lets_go(objects):
    with lease.acquire(objects, "x", "thing"):
        time.sleep(4)  # longer than a dead one's would last
        with (
            pytest.raises(InputError, match=r"^thing is in use by another run \(process \d+ on "),
            lease.acquire(objects, "x", "thing"),
        ):
            pass
        found = lease.alive(objects, ["w", "x"])
        assert found is not None
        assert found.pid == os.getpid()
    assert objects.read("x").result().state == "missing"
    assert lease.alive(objects, ["x"]) is None
    with lease.acquire(objects, "x", "thing"):
        pass


@pytest.mark.slow
def test_a_dead_holder_is_waited_out_by_the_longer_of_both_times(objects):
    written(objects, patience=4)
    began = time.monotonic()
    with lease.acquire(objects, "x", "thing"):
        assert 4 < time.monotonic() - began < 8
    written(objects)
    began = time.monotonic()
    assert lease.alive(objects, ["x"]) is None
    assert 3 < time.monotonic() - began < 6
    assert objects.read("x").result().state == "missing"


@pytest.mark.quick(1)
def test_of_many_who_find_a_dead_holder_one_at_a_time_takes_over(objects):
    import threading

    written(objects)
    inside, most, together = [], [], threading.Lock()

    def enter():
        with lease.acquire(objects, "x", "thing", on_wait=lambda _: None):
            with together:
                inside.append(1)
                most.append(len(inside))
            time.sleep(0.05)
            with together:
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_holder_that_was_taken_over_ends_itself(objects):
    ends = []
    with lease.acquire(objects, "x", "thing", on_lost=ends.append):
        written(objects)
        deadline = time.monotonic() + 5
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    (says,) = ends
    assert says.startswith("the hold on the thing was lost (process 7 on elsewhere took it)")
    assert b"someone" in objects.read("x").result().value, "the other's hold is left alone"


def test_a_holder_that_cannot_reach_the_bucket_ends_before_others_take_over(names, monkeypatch):
    monkeypatch.setenv("SWE_PRUNE_LOST_TIMEOUT", "3")
    ends = []

    def refused(*_, **__):
        raise gcs_server.Refused(503)

    objects = lease.store(storage.parse_path("gs://bucket/run"))
    with lease.acquire(objects, "x", "thing", on_lost=ends.append):
        began = time.monotonic()
        monkeypatch.setattr(gcs_server.Bucket, "put", refused)
        while not ends and time.monotonic() - began < 6:
            time.sleep(0.02)
        assert time.monotonic() - began < 3
    assert "it could not be reached" in ends[0]


def fails(capsys, arguments, code=2):
    assert cli.main(arguments) == code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("swe_prune: ")]
    return line


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/run", "must be a folder or gs://BUCKET/..."),
        ("gs://", "names no bucket"),
        ("gs://other/run", "cannot be written (ValueError: NOT_FOUND"),
    ],
)
def test_an_address_that_is_none(address, said, names, plays_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.config_file(tmp_path, tiny.config(plays_dir))
    message = fails(capsys, ["train", f"--config={config}", f"--workdir={address}"])
    assert said in message
    assert address in message
    assert [file.name for file in tmp_path.iterdir()] == [config.name]


def test_without_the_extra_one_sentence_says_what_to_install(capsys, monkeypatch):
    found = storage.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "gcsfs" else found(name, *a)
    )
    message = fails(capsys, ["report", "--workdir=gs://bucket/run"])
    assert message.endswith("package 'gcsfs', which is not installed; pip install 'swe-prune[gcs]'")


def settings(plays_dir):
    base = tiny.config(plays_dir)
    study = dataclasses.replace(
        base.study, seeds=(0,), std_criteria=(), criteria=("swe", "random"), scopes=("global",)
    )
    return dataclasses.replace(base, study=study)


@pytest.fixture(scope="module")
def config(tmp_path_factory, plays_dir):
    return tiny.config_file(tmp_path_factory.mktemp("config"), settings(plays_dir))


@pytest.fixture(scope="module")
def local(tmp_path_factory, config):
    """The workdir of the same run in a folder."""
    path = storage.parse_path(tmp_path_factory.mktemp("local"))
    assert cli.main(["run", f"--config={config}", f"--workdir={path}"]) == 0
    return path


def table(workdir):
    text = (workdir / "results.csv").read_text()
    rows = csv.DictReader(text.splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def lines(workdir):
    found = metrics.read_lines(workdir / "seed_0/dense/metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


@pytest.mark.slow
def test_every_command_does_in_a_bucket_what_it_does_in_a_folder(names, config, local, capsys):
    workdir = storage.parse_path("gs://bucket/deep/run")
    commands = ["plan", "train", "prune", "finetune", "run", "evaluate", "report"]
    for command in commands:
        arguments = [f"--config={config}"] if command != "report" else []
        assert cli.main([command, *arguments, f"--workdir={workdir}"]) == 0, command
    assert table(workdir) == table(local)
    assert lines(workdir) == lines(local)
    left, here = (
        {name for name in storage.files(place) if name.endswith(ENDINGS)}
        for place in (workdir, local)
    )
    # Each attempt has a file of its own in the ledger, named by its start.
    attempts = [{name for name in some if name.startswith("ledger/")} for some in (left, here)]
    assert all(attempts)
    assert left - attempts[0] == here - attempts[1]
    assert not [name for name in names if ".lock" in name], "every lease was given back"
    assert len((workdir / "report" / "report.html").read_text()) > 10_000
    assert str(report.build("gs://bucket/deep/run")[0]) == f"{workdir}/report/report.html"
    other = ["train", f"--config={config}", "--config.log_every=5", f"--workdir={workdir}"]
    assert "was made by another config: log_every" in fails(capsys, other)


def test_shards_share_a_bucket_and_a_whole_run_does_not(names, plays_dir, monkeypatch):
    monkeypatch.setenv("SWE_PRUNE_LOST_TIMEOUT", "6")
    config, workdir = settings(plays_dir), study.Workdir(storage.parse_path("gs://bucket/run"))
    with study.claim(workdir, config, study.Shard(0, 2)):
        with study.claim(workdir, config, study.Shard(1, 2)):
            pass
        for other, what in ((None, "workdir"), (study.Shard(0, 2), "shard 0/2 of")):
            with (
                pytest.raises(InputError, match=f"^{what} 'gs://bucket/run' is in use by another"),
                study.claim(workdir, config, other),
            ):
                pass
    with study.claim(workdir, config):
        pass
    assert sorted(names) == ["run/config.json", "run/seed_0/config.json"]


def test_a_bucket_that_fails_in_the_midst_is_one_sentence(names, monkeypatch):
    folder = storage.parse_path("gs://bucket/run/seed_0")

    def refused(*_, **__):
        raise gcs_server.Refused(403)

    monkeypatch.setattr(gcs_server.Bucket, "put", refused)
    with (
        pytest.raises(RunError, match=r"run/seed_0' cannot be locked \(ValueError: PERMISSION_D"),
        locks.lock(folder, "it", lambda _: None),
    ):
        pass


def started(config, workdir, *more, command="train"):
    arguments = [sys.executable, "-m", "swe_prune", command, f"--config={config}", *more]
    return subprocess.Popen([*arguments, f"--workdir={workdir}"], stderr=subprocess.PIPE, text=True)


def wait_until(true, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_ones_lease_runs_out(
    names, config, local, capsys, monkeypatch
):
    monkeypatch.setenv("SWE_PRUNE_LOST_TIMEOUT", "10")
    workdir = storage.parse_path("gs://bucket/killed")
    process = started(config, workdir, "--config.train.steps=2000")
    wait_until(lambda: any(name.endswith("/4.checksums") for name in names), process)
    arguments = [f"--config={config}", f"--workdir={workdir}", "--config.train.steps=2000"]
    for more in ([], ["--shard=0/2"]):
        message = fails(capsys, ["train", *arguments, *more])
        assert "workdir 'gs://bucket/killed' is in use by another run" in message
        assert f"(process {process.pid} on " in message
    process.kill()
    process.communicate()
    left = set(names)
    assert "killed/.lock" in left
    again = started(config, workdir, "--config.train.steps=2000")
    began = time.monotonic()
    before = names["killed/.lock"]
    wait_until(lambda: names["killed/.lock"] != before, again)
    assert time.monotonic() - began > 2, "it was watched before it was taken over"
    saved = ".checksums"
    wait_until(lambda: any(name.endswith(saved) for name in set(names) - left), again)
    again.send_signal(signal.SIGTERM)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 75, errors
    assert not [name for name in names if ".lock" in name], "a preempted run gives its leases back"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_numbers_of_an_uninterrupted(names, config, local, monkeypatch):
    monkeypatch.setenv("SWE_PRUNE_LOST_TIMEOUT", "15")
    workdir = storage.parse_path("gs://bucket/again")
    process = started(config, workdir, command="run")
    wait_until(lambda: any(name.endswith("/8.checksums") for name in names), process)
    process.kill()
    process.communicate()
    assert cli.main(["run", f"--config={config}", f"--workdir={workdir}"]) == 0
    assert table(workdir) == table(local)
    assert lines(workdir) == lines(local)


@pytest.mark.slow
def test_shards_share_a_bucket(names, config, local):
    workdir = storage.parse_path("gs://bucket/shared")
    both = [started(config, workdir, f"--shard={i}/2", command="run") for i in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert table(workdir) == table(local)
    assert not [name for name in names if ".lock" in name]


@pytest.mark.slow
def test_two_processes_of_one_run_share_a_bucket(names, config, local):
    from distributed_test import free_port

    workdir = storage.parse_path("gs://bucket/two")
    where = f"--coordinator=127.0.0.1:{free_port()}"
    more = ["--config.data.batch=4"]
    both = [
        started(config, workdir, where, f"--process={i}/2", *more, command="run") for i in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for row, expected in zip(table(workdir), table(local), strict=True):
        # rtol: the gradient's parts are added in another order, for 24 + 4 steps.
        loss = float(expected["finetuned_loss"])
        assert float(row["finetuned_loss"]) == pytest.approx(loss, rel=1e-5)
    assert not [name for name in names if ".lock" in name]
