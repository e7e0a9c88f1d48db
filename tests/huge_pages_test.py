"""The program asks for huge pages, and leaves alone what the user or the system has decided."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swe_prune.runtime import huge_pages

ON_REQUEST, ALWAYS = "always [madvise] never\n", "[always] madvise never\n"
ASKED = f"{huge_pages.HUGE_PAGES}=1"


@pytest.mark.parametrize(
    ("given", "libc", "setting", "wanted"),
    [
        ({}, "glibc 2.36", ON_REQUEST, ASKED),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc 2.36", ON_REQUEST,
         f"glibc.malloc.check=1:{ASKED}"),
        ({"GLIBC_TUNABLES": ASKED}, "glibc 2.36", ON_REQUEST, None),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc 2.36", ON_REQUEST, None),
        ({}, "glibc 2.35", ON_REQUEST, ASKED),
        ({}, "glibc 2.31", ON_REQUEST, None),
        ({}, "musl 1.2", ON_REQUEST, None),
        ({}, "", ON_REQUEST, None),
        ({}, "glibc 2.36", ALWAYS, None),
        ({}, "glibc 2.36", "", None),
    ],
)  # fmt: skip
def test_the_tunable_is_set_where_it_is_known_and_undecided(given, libc, setting, wanted):
    assert huge_pages.tunables(given, libc, setting) == wanted


@pytest.mark.skipif(
    huge_pages.tunables({}, huge_pages._libc(), huge_pages._setting()) is None,
    reason="no huge pages on request",
)
@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_the_program_starts_again_with_it_as_the_same_process(given):
    env = {name: value for name, value in os.environ.items() if name != huge_pages.TUNABLES}
    env |= {} if given is None else {huge_pages.TUNABLES: given}
    command = [sys.executable, "-m", "swe_prune", "--version"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    wanted, seen = f"{huge_pages.TUNABLES}={given or ASKED}", ""
    deadline = time.monotonic() + 60
    # Importing takes longer than a look.
    while wanted not in seen and process.poll() is None and time.monotonic() < deadline:
        seen = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        time.sleep(0.005)
    text, _ = process.communicate(timeout=60)
    assert wanted in seen.split("\0")
    assert seen.count(huge_pages.TUNABLES) == 1
    assert text.startswith("swe_prune ")
    assert process.returncode == 0
