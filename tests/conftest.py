import os
import shutil
import tempfile

import pytest

UNOPTIMIZED = "--xla_backend_optimization_level=0"
PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"
CACHE = "JAX_COMPILATION_CACHE_DIR"
MADE = pytest.StashKey[str]()
FIRST = ("multidevice_test.py", "distributed_test.py", "bucket_test.py", "resume_test.py")


def pytest_configure(config):
    """Has every program compiled fast, and those of several processes only once.

    Compiling takes most of the time of these tests, whose programs are tiny and run a few times.
    The settings are in the environment, for the processes that tests start, and before jax is
    imported.
    """
    if UNOPTIMIZED not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNOPTIMIZED}".strip()
    # What is compared with float64 is meant in float32; a GPU would round its products to TF32.
    os.environ.setdefault(PRECISION, "highest")
    if CACHE not in os.environ:
        config.stash[MADE] = os.environ[CACHE] = tempfile.mkdtemp(prefix="swe_prune_compiled_")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_collection_modifyitems(items):
    """Puts first what takes longest, lest one worker be left alone with it at the end."""
    names = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: names.get(item.path.name, len(FIRST)))


def pytest_unconfigure(config):
    if MADE in config.stash:
        shutil.rmtree(config.stash[MADE], ignore_errors=True)


@pytest.fixture(scope="session")
def plays_dir(tmp_path_factory):
    """Where the plays are prepared, once for all the tests, away from the user's own datasets."""
    from swe_prune import data
    from swe_prune.config import DataConfig

    folder = tmp_path_factory.mktemp("tfds")
    data.load(DataConfig(data_dir=str(folder)), 8)
    return folder
