"""The launch scripts: what they refuse, and how they behave with stand-ins for other programs.

The stand-ins are small shell scripts: no test starts anything on a cluster.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
STARTERS = [path for path in SCRIPTS if path.name not in ("common.sh", "slurm.sbatch")]
# A virtual environment need not be activated for its programs to be found.
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMMAND = ["run", "--config=c.py", "--workdir=/nfs/demo", "--config.study.seeds=[0, 1]"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def call(script, *arguments, path=None, **environment):
    """Runs a launch script to its end, with stand-ins for other programs in the folder `path`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LAUNCH_", "SLURM_", "XLA_FLAGS"))
    }
    if path is not None:
        inherited["PATH"] = f"{path}:{inherited['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, arguments)],
        env=inherited | {"TMPDIR": "/tmp"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(script, *arguments, command=COMMAND, **environment):
    """Returns what a dry run prints, each line as a shell reads it; explanations as they stand."""
    rest = ["--", *command] if command else []
    done = call(script, *arguments, "--dry-run", *rest, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [
        line if line.startswith("#") else shlex.split(line) for line in done.stdout.splitlines()
    ]


def stand_in(folder, name, text):
    """Writes a program of bash; `$HERE` in it is its folder."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nHERE={shlex.quote(str(folder))}\n{text}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------------------------------------
# all scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it_and_it_stops_at_errors(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert path.name == "common.sh" or "\nset -euo pipefail\n" in text
    assert "/work/" not in text
    assert "/home/" not in text


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=SEARCH)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; it comes with the extras test and lint")
    found = subprocess.run([shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.name)
def test_help_is_the_comment_at_its_head(path):
    done = call(path.name, "--help")
    assert done.returncode == 0
    assert f"launch/{path.name} " in done.stdout
    assert "--dry-run" in done.stdout
    assert not any(line.startswith("#") for line in done.stdout.splitlines())


def test_the_page_names_every_script_and_its_commands_are_accepted():
    page = (LAUNCH / "README.md").read_text()
    commands = [
        shlex.split(command)
        for block in re.findall(r"^```\n(launch/.*?)^```", page, re.MULTILINE | re.DOTALL)
        for command in block.replace("\\\n", " ").splitlines()
    ]
    assert {command[0] for command in commands} == {f"launch/{path.name}" for path in STARTERS}
    for command in commands:
        cut = command.index("--")
        script, *options = command[:cut]
        done = call(script.removeprefix("launch/"), *options, "--dry-run", *command[cut:])
        assert done.returncode == 0, done.stderr
        for argument in command:
            if argument.startswith("--config="):
                assert (LAUNCH.parent / argument.removeprefix("--config=")).exists()


TPU = ("--name=a", "--zone=z", "--type=t", "--version=v")
RUN = ("--", *COMMAND)


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("local.sh", RUN, ("number of processes is missing", "give it first")),
        ("local.sh", ("0", *RUN), ("number of processes is '0'", "1 or more")),
        ("local.sh", ("two", *RUN), ("'two'", "whole number")),
        ("local.sh", ("2", "3", *RUN), ("unexpected '3'", "after --")),
        ("local.sh", ("2", "--device=2", *RUN), ("unknown option '--device=2'", "--devices=")),
        ("local.sh", ("2", "--devices=0", *RUN), ("--devices is '0'", "1 or more")),
        ("local.sh", ("2", "--devices", *RUN), ("--devices needs a value", "--devices=VALUE")),
        ("local.sh", ("2", "--port=70000", *RUN), ("--port=70000", "smaller")),
        ("local.sh", ("2", "--grace=", *RUN), ("--grace is empty", "leave it out")),
        ("local.sh", ("2",), ("no swe_prune command", "-- run --config=FILE")),
        ("local.sh", ("2", "--", "rnu"), ("unknown swe_prune command 'rnu'", "run plan train")),
        ("local.sh", ("2", "--", "run"), ("no --workdir", "all processes see")),
        ("local.sh", ("2", *RUN, "--process=0/2"), ("'--process=0/2'", "leave it out")),
        ("local.sh", ("2", *RUN, "--shard=0/2"), ("'--shard'", "use --sweep")),
        ("local.sh", ("2", "--sweep", *RUN, "--shard=0/2"), ("'--shard=0/2'", "leave it out")),
        ("local.sh", ("2", *RUN), ("'no-such-python' is not there", "set LAUNCH_PYTHON")),
        ("tpu.sh", TPU, ("'' is not a step", "run, create")),
        ("tpu.sh", ("stop", *TPU), ("'stop' is not a step", "delete")),
        ("tpu.sh", ("run", *TPU[1:], *RUN), ("--name is missing", "--name=")),
        ("tpu.sh", ("run", "--name=A_b", *TPU[1:], *RUN), ("--name=A_b", "a-z")),
        ("tpu.sh", ("log", "--name=a"), ("--zone is missing", "--zone=")),
        ("tpu.sh", ("create", "--name=a", "--zone=z"), ("--type is missing", "--type=")),
        ("tpu.sh", ("run", *TPU, "--poll=x", *RUN), ("--poll is 'x'", "whole number")),
        ("tpu.sh", ("start", *TPU, *RUN, "--distributed"), ("'--distributed'", "leave it out")),
        ("slurm.sh", ("--name=a", "--nodes=2", "--shards=2", *RUN), ("--nodes=2", "leave one")),
        ("slurm.sh", ("--name=a", "--gpus=all", *RUN), ("--gpus is 'all'", "whole number")),
        ("slurm.sh", ("submit", "--name=a", *RUN), ("unexpected 'submit'", "after --")),
    ],
)
def test_a_wrong_input_is_named_with_its_fix(script, arguments, parts):
    done = call(script, *arguments, LAUNCH_PYTHON="no-such-python")
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: ")
    for part in parts:
        assert part in line


def test_a_tool_that_is_not_there_is_named(tmp_path):
    for tool in ("bash", "dirname", "basename", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for script, arguments, tool in (
        ("tpu.sh", ("run", *TPU), "gcloud"),
        ("slurm.sh", ("--name=a",), "sbatch"),
    ):
        done = call(script, *arguments, *RUN, PATH=str(tmp_path))
        assert done.returncode == 2
        assert f"'{tool}' is not there" in done.stderr


# ---------------------------------------------------------------------------------------------
# local.sh


# What stands in for Python is told by the number of its process what to do.
PLAYER = """
number=${*: -1}; number=${number#*=}; number=${number%/*}
printf '%s\\n' "$@" >"$HERE/arguments.$number"
printf '%s\\n' "${XLA_FLAGS:-}" >"$HERE/flags.$number"
"""


def local(folder, count, part, *options, **environment):
    player = stand_in(folder, "player", PLAYER + part)
    return call("local.sh", count, *options, *RUN, LAUNCH_PYTHON=str(player), **environment)


def test_local_runs_all_and_shows_process_0_as_if_alone(tmp_path):
    part = 'echo "out $number"; echo "err $number" >&2; printf "no newline"'
    done = local(tmp_path, 3, part, "--port=4321", "--devices=2")
    assert done.returncode == 0
    assert done.stdout == "out 0\nno newline"
    assert sorted(done.stderr.splitlines()) == [
        "[process 1] err 1",
        "[process 1] no newline",
        "[process 1] out 1",
        "[process 2] err 2",
        "[process 2] no newline",
        "[process 2] out 2",
        "err 0",
    ]
    for number in range(3):
        assert (tmp_path / f"arguments.{number}").read_text().splitlines() == [
            *("-m", "swe_prune", *COMMAND),
            *("--coordinator=127.0.0.1:4321", f"--process={number}/3"),
        ]
        flags = (tmp_path / f"flags.{number}").read_text()
        assert flags == "--xla_force_host_platform_device_count=2\n"


def test_local_spreads_a_sweep_and_keeps_the_users_xla_flags(tmp_path):
    options = ("--sweep", "--devices=4")
    # What the script adds comes last, so the number of the process is that of "--shard=I/N".
    done = local(tmp_path, 2, "", *options, XLA_FLAGS="--a=b")
    assert done.returncode == 0, done.stderr
    for number in range(2):
        arguments = (tmp_path / f"arguments.{number}").read_text().splitlines()
        assert arguments == ["-m", "swe_prune", *COMMAND, f"--shard={number}/2"]
        flags = (tmp_path / f"flags.{number}").read_text()
        assert flags == "--a=b --xla_force_host_platform_device_count=4\n"


def test_local_finds_a_free_port_for_all(tmp_path):
    assert local(tmp_path, 2, "").returncode == 0
    addresses = {
        (tmp_path / f"arguments.{number}").read_text().splitlines()[-2] for number in range(2)
    }
    (address,) = addresses
    host, port = address.rsplit(":", 1)
    assert host == "--coordinator=127.0.0.1"
    assert 20000 <= int(port) < 32000


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0 0", 0), ("0 0 2", 2), ("0 75 2", 75), ("1 75 2", 1), ("75 75 75", 75)],
)
def test_local_ends_with_the_code_of_the_first_that_failed(codes, expected, tmp_path):
    done = local(tmp_path, 3, f'codes=({codes}); exit "${{codes[number]}}"')
    assert done.returncode == expected
    for number, code in enumerate(codes.split()):
        said = f"local.sh: process {number} ended with exit code {code}"
        assert (said in done.stderr.splitlines()) == (code != "0")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on_once_to_all(sent, tmp_path):
    part = f"""
trap 'echo {sent.name} >>"$HERE/got.$number"; exit 75' {sent.name.removeprefix("SIG")}
echo $$ >"$HERE/pid.$number"; mv "$HERE/pid.$number" "$HERE/ready.$number"
while true; do read -rt 0.05 <> <(:) || true; done
"""
    player = stand_in(tmp_path, "player", PLAYER + part)
    # What a shell starts in the background ignores SIGINT, and under nohup SIGHUP: so may this.
    as_in_a_terminal = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    script = ["bash", str(LAUNCH / "local.sh"), "3", *RUN]
    running = subprocess.Popen(
        [sys.executable, "-c", as_in_a_terminal, *script],
        env=os.environ | {"LAUNCH_PYTHON": str(player)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 3)
        running.send_signal(sent)
        assert running.wait(20) == 75
    finally:  # nothing stays behind where this fails
        for file in tmp_path.glob("ready.*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        running.kill()
        running.wait()
    for number in range(3):
        assert (tmp_path / f"got.{number}").read_text() == f"{sent.name}\n"


def test_local_kills_those_who_hang_after_the_grace_period(tmp_path):
    part = """
if ((number == 1)); then exit 7; fi
trap '' TERM INT
sleep 300 & echo "$! $$" >"$HERE/pids.$number"
wait
"""
    began = time.monotonic()
    done = local(tmp_path, 3, part, "--grace=1")
    assert time.monotonic() - began < 20
    assert done.returncode == 137  # process 0 was killed
    for number in (0, 2):
        assert f"local.sh: process {number} still runs 1 s after another ended" in done.stderr
        for pid in (tmp_path / f"pids.{number}").read_text().split():
            wait_until(lambda pid=pid: not alive(int(pid)))


def test_local_lets_the_rest_end_by_themselves_within_the_grace_period(tmp_path):
    done = local(tmp_path, 2, "((number == 1)) && exit 1; sleep 1; exit 75", "--grace=30")
    assert done.returncode == 75
    assert "still runs" not in done.stderr


def test_local_does_not_wait_forever_for_others_once_process_0_has_finished(tmp_path):
    done = local(tmp_path, 2, "((number == 0)) || sleep 300", "--grace=1")
    assert done.returncode == 137
    assert "process 1 still runs" in done.stderr


def test_local_gives_process_0_all_the_time_when_the_others_are_done(tmp_path):
    done = local(tmp_path, 2, "((number == 1)) || sleep 2.5", "--grace=1")
    assert done.returncode == 0
    assert not done.stderr


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---------------------------------------------------------------------------------------------
# tpu.sh

# Plays gcloud: what it answers comes from files, a line at each call, the last one again and again;
# "-" is a failure, as is a question for which there is no file.
GCLOUD = r"""
echo "$*" >>"$HERE/calls"
next() {
    [ -s "$HERE/$1" ] || return 1
    local line
    read -r line <"$HERE/$1"
    [ "$(wc -l <"$HERE/$1")" -le 1 ] || sed -i 1d "$HERE/$1"
    [ "$line" != - ] && echo "$line"
}
case "$*" in
    *"queued-resources describe"*) next slice ;;
    *"tpu-vm describe"*) next machine ;;
    *"swe_prune.exit ]"*) next probe ;;
    *"tail "*) echo "the log" ;;
    *nohup*) echo start >>"$HERE/steps"; [ "$(next start)" != fails ] ;;
    *"pip install"*) echo install >>"$HERE/steps"; [ "$(next install)" != fails ] ;;
    *"queued-resources create"*) echo create >>"$HERE/steps" ;;
    *"queued-resources delete"*) echo delete >>"$HERE/steps" ;;
esac
"""


def play(tmp_path, *options, **answers):
    """Runs `tpu.sh run` on the played gcloud; returns it and the steps that changed anything."""
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "git", "")
    for name, lines in ({"machine": "READY"} | answers).items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines.split()))
    done = call("tpu.sh", "run", *TPU, "--poll=0", *options, *RUN, path=tmp_path)
    steps = tmp_path / "steps"
    return done, steps.read_text().split() if steps.exists() else []


def test_tpu_run_to_the_end(tmp_path):
    done, steps = play(tmp_path, slice="- PROVISIONING ACTIVE", probe="running running 0")
    assert done.returncode == 0, done.stderr
    assert steps == ["create", "install", "start", "delete"]
    assert "the log" in done.stdout


def test_tpu_run_starts_again_on_75_where_the_slice_is_still_there(tmp_path):
    done, steps = play(tmp_path, slice="ACTIVE", probe="lost running 75 running 0")
    assert done.returncode == 0, done.stderr
    assert steps == ["install", "start", "start", "delete"]
    assert "interrupted (75)" in done.stderr


@pytest.mark.parametrize(
    "states",
    [
        {"slice": "ACTIVE ACTIVE SUSPENDED SUSPENDED ACTIVE", "probe": "lost running 1 running 0"},
        {
            "slice": "ACTIVE",
            "machine": "READY READY PREEMPTED PREEMPTED READY",
            "probe": "lost 1 0",
        },
    ],
    ids=["slice", "machine"],
)
def test_tpu_run_makes_what_was_preempted_again(states, tmp_path):
    done, steps = play(tmp_path, **states)
    assert done.returncode == 0, done.stderr
    assert steps == [*("install", "start"), *("delete", "create", "install", "start"), "delete"]
    assert "interrupted (GONE)" in done.stderr


def test_tpu_run_goes_on_with_a_run_that_is_there(tmp_path):
    done, steps = play(tmp_path, slice="ACTIVE", probe="running running 0")
    assert done.returncode == 0, done.stderr
    assert steps == ["delete"]


@pytest.mark.parametrize("code", [1, 2])
def test_tpu_run_ends_with_the_code_of_a_failure_and_leaves_no_cost(code, tmp_path):
    done, steps = play(tmp_path, slice="ACTIVE", probe=f"lost running {code}")
    assert done.returncode == code, done.stderr
    assert steps == ["install", "start", "delete"]


def test_tpu_run_stops_where_installing_fails(tmp_path):
    done, steps = play(tmp_path, slice="ACTIVE", probe="lost", install="fails")
    assert done.returncode == 1
    assert steps == ["install", "delete"]


def test_tpu_run_starts_again_only_so_often_and_keeps_where_asked(tmp_path):
    done, steps = play(tmp_path, "--restarts=2", "--keep", slice="ACTIVE", probe="lost 75")
    assert done.returncode == 75
    assert steps == ["install", "start", "start", "start"]
    assert "more often than --restarts=2" in done.stderr
    assert "costs money" in done.stderr


def test_tpu_run_says_that_a_silent_slice_may_still_cost(tmp_path):
    done, steps = play(tmp_path, slice="ACTIVE", probe="")
    assert done.returncode == 1
    assert steps == ["install", "start"]
    assert "did not answer 10 times" in done.stderr
    assert "may still be there and cost money" in done.stderr


def test_tpu_starts_one_run_at_a_time_and_leaves_its_exit_code(tmp_path):
    if shutil.which("flock") is None:
        pytest.skip("there is no flock")
    (tmp_path / "swe_prune_venv" / "bin").mkdir(parents=True)
    (tmp_path / "swe_prune").mkdir()
    part = 'printf "%s\\n" "$@" >"$HERE/arguments"; read -r _ <"$HERE/gate"; echo done; exit 75'
    stand_in(tmp_path / "swe_prune_venv" / "bin", "python", part)
    gate = tmp_path / "swe_prune_venv" / "bin" / "gate"
    os.mkfifo(gate)
    remote, probe = (
        next(word for word in line if word.startswith("--command=")).removeprefix("--command=")
        for line in (dry("tpu.sh", "start", *TPU)[-1], dry("tpu.sh", "status", *TPU)[-1])
    )

    def there(command):
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )

    assert there(probe).stdout == "lost\n"
    assert there(remote).returncode == 0
    wait_until(lambda: there(probe).stdout == "running\n")
    again = there(remote.replace("--timeout 60", "--timeout 0"))
    assert again.returncode == 1
    assert "a run is still going on here" in again.stderr
    gate.write_text("go\n")
    wait_until(lambda: there(probe).stdout == "75\n")
    assert (tmp_path / "swe_prune.log").read_text() == "done\n"
    arguments = (gate.parent / "arguments").read_text().splitlines()
    assert arguments == ["-m", "swe_prune", *COMMAND, "--distributed"]


# ---------------------------------------------------------------------------------------------
# slurm.sh


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_puts_a_preempted_job_back(code, requeued, tmp_path):
    part = 'printf "%s\\n" "$@" >"$HERE/srun.got"; echo "$JAX_LOCAL_DEVICE_IDS" >"$HERE/devices"'
    stand_in(tmp_path, "srun", f"{part}; exit {code}")
    stand_in(tmp_path, "scontrol", 'echo "$*" >"$HERE/scontrol.got"')
    done = call(
        *("slurm.sbatch", "4", *COMMAND),
        path=tmp_path,
        SLURM_JOB_ID="77",
        SLURM_ARRAY_TASK_ID="2",
        SLURM_GPUS_ON_NODE="4",
    )
    assert done.returncode == code, done.stderr
    arguments = (tmp_path / "srun.got").read_text().splitlines()
    assert arguments[-len(COMMAND) - 2 :] == ["swe_prune", *COMMAND, "--shard=2/4"]
    assert (tmp_path / "devices").read_text() == "0,1,2,3\n"
    got = tmp_path / "scontrol.got"
    assert got.exists() == requeued
    assert not requeued or got.read_text() == "requeue 77\n"
