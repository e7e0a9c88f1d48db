import contextlib
import gc
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

# These tests compile thousands of small programs and run each of them a few times, which is faster
# in one piece for LLVM in place of 32, and in less than half the time without the fusion emitters.
# Where a product and a sum are then fused to one instruction differs between programs, and tests
# that compare two of them to the bit would fail; AVX has no such instruction. (SSE4_2 compiles
# faster still, but XLA has no float16 for it.) Other processors keep the emitters.
FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1")
X86_FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=AVX")
PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"
CACHE = "JAX_COMPILATION_CACHE_DIR"
CACHE_FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
CACHE_BYTES = 1 << 30
MAPPINGS = 20_000
CACHE_WARNINGS = tuple(
    f"ignore:Error {verb} persistent compilation cache entry" for verb in ("reading", "writing")
)
FIRST = (
    "distributed_test.py",
    "multidevice_core_test.py",
    "multidevice_study_test.py",
    "bucket_test.py",
    "contract_test.py",
    "study_test.py",
    "resume_test.py",
    "multidevice_training_test.py",
    "mend_test.py",
    "experiment_test.py",
    "cli_test.py",
    "sparse_training_test.py",
)


def pytest_configure(config):
    """Makes compiling cheap: less optimization, and a compilation cache kept between runs.

    Compiling takes most of the time of these tests. The settings go into the environment, before
    jax is imported, so that pytest's workers and the processes that tests start have them too.
    """
    given = os.environ.get("XLA_FLAGS", "")
    wanted = FLAGS + (X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else ())
    added = _known([flag for flag in wanted if flag not in given])
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    # Tests compare with float64 to float32's precision; a GPU would round its products to TF32.
    os.environ.setdefault(PRECISION, "highest")
    if CACHE not in os.environ:
        folder = config.rootpath / ".jax_cache"
        _make_room(folder)
        os.environ[CACHE] = str(folder / version("jax"))
    os.environ.setdefault(CACHE_FROM, "0")
    # A process that may not keep bytecode compiles the whole package again: half a second each.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Traces are many objects that live long: a twentieth of the time went into looking for cycles.
    gc.set_threshold(50_000, 20, 100)
    # How long an example takes says how busy the machine is.
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")
    # Entries are not written atomically: a process that reads one while another writes it warns
    # and compiles. The same filters are in setup.cfg, for pytest itself.
    filters = os.environ.get("PYTHONWARNINGS", "")
    if CACHE_WARNINGS[0] not in filters:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [filters, *CACHE_WARNINGS]))


def _known(flags):
    """Returns the flags that the installed XLA has; it aborts a process on one that it lacks."""
    if not flags or _starts_with(flags):
        return list(flags)
    return [flag for flag in flags if _starts_with([flag])]


def _starts_with(flags):
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def _make_room(folder):
    """Removes the least recently used programs when the cache exceeds its size, and empty files.

    JAX_COMPILATION_CACHE_MAX_SIZE would do so under a lock, listing the folder for each program.
    """
    found = []
    for path in folder.rglob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another run makes room too
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in found)
    left = total if total <= CACHE_BYTES else CACHE_BYTES // 2
    for _, size, path in sorted(found):
        if total > left or not size:
            path.unlink(missing_ok=True)
            total -= size


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by mark
def pytest_collection_modifyitems(items):
    """Marks cases slow, and puts the longest files first, so that no worker ends alone with one.

    Of the cases of a function marked `quick(n)`, n run each time, spread evenly over them in their
    order; the others are slow.
    """
    cases = {}
    for item in items:
        if quick := item.get_closest_marker("quick"):
            cases.setdefault((item.path, item.originalname), (*quick.args, []))[1].append(item)
    for n, of_one in cases.values():
        for number, item in enumerate(of_one):
            if number * n % len(of_one) >= n:
                item.add_marker(pytest.mark.slow)
    names = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: names.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets go of compiled programs before a process has as many mappings as Linux allows.

    Each program takes several of 65,530 mappings; XLA crashes where it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def plays_dir(tmp_path_factory):
    """Where the plays are prepared, once for all the tests, away from the user's own datasets."""
    from swe_prune import data
    from swe_prune.config import DataConfig

    folder = tmp_path_factory.mktemp("tfds")
    data.load(DataConfig(data_dir=str(folder)), 8)
    return folder
