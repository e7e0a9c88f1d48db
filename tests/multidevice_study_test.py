import eight_devices
import pytest


@pytest.mark.slow
def test_experiment_and_pretrained_models_on_eight_devices():
    eight_devices.check("study")
