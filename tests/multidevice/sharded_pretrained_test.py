"""A pretrained model's study over eight devices: its weights are born divided, and are the same."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import pretrained_tiny

from swe_prune import interop, study, tree
from swe_prune.config import Config, DataConfig, ModelConfig, ParallelConfig

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


def test_weights_are_read_to_their_devices_and_have_the_loss_of_one_device(place, tmp_path):
    config = Config(
        model=ModelConfig(pretrained=str(place.model)),
        data=DataConfig(
            dataset=str(place.train), validation_fraction=0.3, window=32, batch=8,
            eval_windows=8, eval_batch=8,
        ),
        parallel=ParallelConfig(fsdp=4, tensor=2),
    )  # fmt: skip
    experiment = study.setup(config, tmp_path)
    state = experiment.fresh_state(0)
    alone = dict(tree.named_leaves(interop.load(place.model).params))
    planned = dict(tree.named_leaves(experiment.abstract_params))
    divided = 0
    for name, leaf in tree.named_leaves(state.params):
        assert leaf.sharding.is_equivalent_to(planned[name].sharding, leaf.ndim), name
        np.testing.assert_array_equal(leaf, alone[name], err_msg=name)
        divided += not leaf.sharding.is_fully_replicated
    assert divided > 10
    one = study.setup(
        Config(model=config.model, data=config.data, parallel=ParallelConfig(data=8)), tmp_path
    )
    assert experiment.validation_loss(state.params) == pytest.approx(
        one.validation_loss(jax.device_put(interop.load(place.model).params, one.everywhere)),
        rel=1e-5,
    )
