"""Memory in huge pages, without which a train step on a CPU may spend its time on page faults.

XLA takes the arrays of a step from the C library and gives them back after it, so the kernel maps
their pages again in each step: 4 KiB at a time, unless the program asks for huge pages of 2 MiB.
glibc asks for them if a tunable says so, which it reads only when a process starts. So the import
of this module starts `python -m swe_prune` again with the tunable set, before it has done anything.
`benchmarks/huge_pages.py` measures the difference.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from swe_prune.early_signals import PROGRAM

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
SINCE = (2, 35)
"""First version of glibc with the tunable."""

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts the program again, as the same process, if glibc does not ask for huge pages yet.

    Does nothing in a process that only uses the library, where the kernel gives no huge pages on
    request or gives them unasked, without glibc, or if the environment sets the tunable, so
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns it off.
    """
    if PROGRAM and sys.executable and (found := tunables(os.environ, _libc(), _setting())):
        # Nothing is imported or written yet, and the process id stays.
        environment = {**os.environ, TUNABLES: found}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def tunables(environment: Mapping[str, str], libc: str, setting: str) -> str | None:
    """Returns the value of GLIBC_TUNABLES to start again with, or None if there is no need.

    Args:
        environment: Environment variables of the process.
        libc: Name and version of the C library, such as "glibc 2.36".
        setting: Kernel's setting of transparent huge pages, such as "always [madvise] never".
    """
    given = environment.get(TUNABLES, "")
    name, _, version = libc.partition(" ")
    if HUGE_PAGES in given or name != "glibc" or "[madvise]" not in setting:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < SINCE:
        return None
    return ":".join(filter(None, [given, f"{HUGE_PAGES}=1"]))


def _libc() -> str:
    known = getattr(os, "confstr_names", {})
    return (os.confstr("CS_GNU_LIBC_VERSION") or "") if "CS_GNU_LIBC_VERSION" in known else ""


def _setting() -> str:
    return SETTING.read_text() if SETTING.exists() else ""


restart_with_huge_pages()
