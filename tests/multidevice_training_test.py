import eight_devices
import pytest


@pytest.mark.slow
def test_allocation_calibration_and_sparse_training_on_eight_devices():
    eight_devices.check("training")
