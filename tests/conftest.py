import pytest

from swe_prune import data
from swe_prune.config import DataConfig


@pytest.fixture(scope="session")
def plays_dir(tmp_path_factory):
    """Where the plays are prepared, once for all the tests, away from the user's own datasets."""
    folder = tmp_path_factory.mktemp("tfds")
    data.load(DataConfig(data_dir=str(folder)), 8)
    return folder
