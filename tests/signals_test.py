"""SIGTERM, Ctrl-C and a closed terminal, once or often, at any moment: one line and the code."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from swe_prune import early_signals
from swe_prune.errors import Preempted
from swe_prune.runtime.preemption import PreemptionHandler

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")


CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}


@pytest.fixture(autouse=True, scope="module")
def heard():
    """Hears SIGHUP here and in the processes started from here, also if pytest is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(folder, plays_dir, before=(), **more):
    small = tiny.config(plays_dir)
    train = dataclasses.replace(small.train, steps=100_000, checkpoint_every=50_000)
    config = tiny.config_file(folder, dataclasses.replace(small, train=train))
    command = [sys.executable, "-m", "swe_prune", "train", f"--config={config}"]
    command.append(f"--workdir={folder / 'work'}")
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*before, *command], **(pipes | more))


def wait_for(process, ready):
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def importing(process):
    return "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_imports_is_one_line(tmp_path, plays_dir, number):
    process = start(tmp_path, plays_dir)
    wait_for(process, lambda: importing(process))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == CODES[number]
    assert errors.startswith("swe_prune: ")
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_thirty_signals_are_as_one(tmp_path, plays_dir, number):
    process = start(tmp_path, plays_dir)
    metrics = tmp_path / "work/seed_0/dense/metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_size > 0)
    for _ in range(30):
        process.send_signal(number)
        time.sleep(0.02)
        if process.poll() is not None:
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == CODES[number], errors
    assert errors.splitlines()[-1].startswith("swe_prune: ")
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("setsid"), reason="needs setsid")
def test_a_run_whose_terminal_is_closed_saves_first(tmp_path, plays_dir):
    ours, theirs = os.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = start(tmp_path, plays_dir, before=["setsid", "--ctty"], **terminal)
    os.close(theirs)
    metrics = tmp_path / "work/seed_0/dense/metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.close(ours)
    assert process.wait(timeout=60) == 75
    (saved,) = (tmp_path / "work/seed_0/dense/checkpoints").glob("*.checksums")
    assert int(saved.stem) > 0


def test_a_closed_terminal_is_ignored_under_nohup_and_its_output_goes_nowhere(tmp_path):
    handler, before = PreemptionHandler(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handler.installed():
            signal.raise_signal(signal.SIGHUP)
        assert not handler.given()
        signal.signal(signal.SIGHUP, before)
        with pytest.raises(Preempted, match="the terminal was closed"):
            hung_up(handler)
    finally:
        signal.signal(signal.SIGHUP, before)


def hung_up(handler):
    with handler.installed(), handler.defer():
        signal.raise_signal(signal.SIGHUP)


class Finalized:
    """Gets a signal where exceptions are dropped, as JAX's callback of the garbage collector."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_finalizer_is_not_lost(monkeypatch):
    monkeypatch.setattr(early_signals, "PROGRAM", True)
    monkeypatch.setattr(early_signals, "_AGAIN", set())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(Preempted):
            finalized(PreemptionHandler())
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def finalized(handler):
    with handler.installed():
        Finalized()
        time.sleep(5)


def test_a_second_signal_raises_nothing_and_a_deferred_one_is_not_lost(monkeypatch):
    monkeypatch.setattr(early_signals, "PROGRAM", True)
    before = signal.getsignal(signal.SIGTERM)
    handler = PreemptionHandler()
    try:
        with pytest.raises(Preempted):
            stopped_twice(handler)
        signal.raise_signal(signal.SIGTERM)  # while the process ends
        with handler.installed(), pytest.raises(Preempted):
            deferred(handler)
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_twice(handler):
    with handler.installed():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)


def deferred(handler):
    with handler.defer():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
