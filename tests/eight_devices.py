"""Runs files of tests/multidevice in a process with eight host devices.

A process has as many host devices as it was started with. Each group is a test file, because
pytest-xdist gives whole files to its workers.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "multidevice"
GROUPS = {
    "core": ("core", "contract"),
    "training": ("allocation", "calibration", "sparse_training", "vision"),
    "study": ("experiment", "interop", "pretrained", "scale"),
}


def check(group, marked="multidevice"):
    """Asserts that every test of the group with these marks passes, and that none is skipped."""
    env = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]
    files = [str(FOLDER / f"sharded_{name}_test.py") for name in GROUPS[group]]
    done = subprocess.run(
        [*command, *files],
        env=env, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
